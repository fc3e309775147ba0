"""Judging both orders of real HH pairs: packed against a plain judge.

The plain judge takes prompts in the given order, pads batches of 8 on the left and reads the last
position only.

    python benchmarks/judge.py [--dtype bfloat16] [--shape 1b]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import side_by_side as bench
from self_judge import Judge

SIDES = ("packed", "plain, padded batches of 8")


@torch.no_grad()
def plain(
    model: Any, prompts: Sequence[Sequence[int]], letters: Sequence[int], size: int = 8
) -> torch.Tensor:
    """p(A) and p(B) after each prompt, in batches of `size` as they come."""
    found = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        found.append(logits.float().softmax(-1)[:, list(letters)])
    return torch.cat(found).cpu()


def computed(prompts: Sequence[Sequence[int]], size: int = 8) -> int:
    """Tokens that the plain judge computes, padding included."""
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    return sum(len(b) * max(map(len, b)) for b in batches)


def margins(letters_N2: torch.Tensor) -> torch.Tensor:
    """Of each pair, from p(A) and p(B) in both orders."""
    a_first, b_first = letters_N2[::2], letters_N2[1::2]
    return ((a_first[:, 0] - a_first[:, 1]) + (b_first[:, 1] - b_first[:, 0])) / 2


def agreement(found: torch.Tensor, expected: torch.Tensor) -> str:
    """How far verdicts agree where the expected one is not a toss-up."""
    clear = margins(expected).abs() > 0.02
    same = ((margins(found) > 0) == (margins(expected) > 0))[clear]
    return (
        f"probabilities differ by at most {(found - expected).abs().max():.1e}; verdicts agree on "
        f"{int(same.sum())} of {len(same)} pairs with a margin above 0.02"
    )


def main() -> None:
    """Both sides in turn."""
    given = bench.arguments(__doc__, SIDES, pairs=32)
    model = bench.model_of(given).eval()
    judge = Judge(model, bench.encoder_of(given), bench.templates_of(), max_length=1024)
    comparisons = bench.comparisons_of(bench.records_of(given, given.pairs))
    prompts = bench.judge_prompts(judge, comparisons)
    packed = functools.partial(judge.letter_probabilities, prompts)
    other = functools.partial(plain, model, prompts, judge.letter_ids)
    works = (packed, other)
    seconds, (ours, theirs) = bench.alternating(dict(zip(SIDES, works, strict=True)), given)
    bench.report(
        f"judging {len(prompts)} prompts, both orders",
        given,
        seconds,
        limit=computed(prompts) / bench.unique_tokens(prompts),
        floor=bench.flops(model, prompts, len(prompts)) / bench.matrix_rate(model),
        notes=[
            bench.way(judge.packing),
            f"packed and plain: {agreement(ours, theirs)}",
        ],
    )


if __name__ == "__main__":
    main()

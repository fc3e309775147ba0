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
def plain(model: Any, prompts: Sequence[Sequence[int]], letters: Sequence[int]) -> torch.Tensor:
    """p(A) and p(B) after each prompt, in batches of 8 as they come."""
    found = []
    for start in range(0, len(prompts), 8):
        batch = prompts[start : start + 8]
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
        found.append(logits.float().softmax(-1)[:, list(letters)].cpu())
    return torch.cat(found)


def computed(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that the plain judge computes, padding included."""
    batches = [prompts[i : i + 8] for i in range(0, len(prompts), 8)]
    return sum(len(b) * max(map(len, b)) for b in batches)


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
    margins = [((p[::2, 0] - p[::2, 1]) + (p[1::2, 1] - p[1::2, 0])) / 2 for p in (ours, theirs)]
    clear = margins[1].abs() > 0.02
    agree = ((margins[0] > 0) == (margins[1] > 0))[clear].float().mean().item()
    bench.report(
        f"judging {len(prompts)} prompts, both orders",
        given,
        seconds,
        limit=computed(prompts) / bench.unique_tokens(prompts),
        floor=bench.flops(model, prompts, len(prompts)) / bench.matrix_rate(model),
        notes=[
            bench.way(judge.packing),
            f"probabilities differ by at most {(ours - theirs).abs().max():.1e}; verdicts agree on "
            f"{100 * agree:.1f} % of {int(clear.sum())} pairs with a margin above 0.02",
            f"packing: {judge.packing.decision.route}, {judge.packing.decision.reason}",
        ],
    )


if __name__ == "__main__":
    main()

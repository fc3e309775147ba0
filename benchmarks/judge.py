"""Judging both orders of real HH pairs: packed against a plain judge.

The plain judge takes prompts in the given order, pads batches of 8 on the left and reads the last
position only.

    python benchmarks/judge.py [--dtype bfloat16] [--shape 1b]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from self_judge import Judge
from side_by_side import (
    alternating,
    arguments,
    comparisons_of,
    encoder_of,
    flops,
    matrix_rate,
    model_of,
    peak,
    peaks,
    records_of,
    report,
    templates_of,
    unique_tokens,
)


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
    given = arguments(__doc__, pairs=32)
    memory = (
        None if given.only else peaks(["packed", "plain, padded batches of 8"])
    )  # before this process holds any
    model = model_of(given).eval()
    judge = Judge(model, encoder_of(given), templates_of(), max_length=1024)
    encoded = [
        judge.encoder.encode_orders(judge.templates, principle, comparison, judge.max_length)
        for comparison in comparisons_of(records_of(given, given.pairs))
        for principle in judge.templates
    ]
    prompts = [ids for orders in encoded if orders for ids in orders]
    sides = {
        "packed": lambda: judge.letter_probabilities(prompts),
        "plain, padded batches of 8": lambda: plain(model, prompts, judge.letter_ids),
    }
    if given.only:
        sides[given.only]()
        print("peak", peak(given))
        return
    ours, theirs = (work() for work in sides.values())
    margins = [((p[::2, 0] - p[::2, 1]) + (p[1::2, 1] - p[1::2, 0])) / 2 for p in (ours, theirs)]
    clear = margins[1].abs() > 0.02
    agree = ((margins[0] > 0) == (margins[1] > 0))[clear].float().mean().item()
    seconds = alternating(sides, given.rounds, given.device)
    report(
        f"judging {len(prompts)} prompts, both orders",
        given,
        seconds,
        limit=computed(prompts) / unique_tokens(prompts),
        floor=flops(model, prompts, len(prompts)) / matrix_rate(model),
        memory=memory,
        notes=[
            f"probabilities differ by at most {(ours - theirs).abs().max():.1e}; verdicts agree on "
            f"{100 * agree:.1f} % of {int(clear.sum())} pairs with a margin above 0.02",
            f"packing: {judge.packing.decision.route}, {judge.packing.decision.reason}",
        ],
    )


if __name__ == "__main__":
    main()

"""Do verdicts in bfloat16 agree with float32? Both orders of real HH pairs, packed, no timing.

The same prompts by the same judge in both types; only pairs that float32 does not toss up count.

    python benchmarks/half_precision.py [--pairs 100] [--dtype float16]
"""

from __future__ import annotations

from typing import Any

import torch

import side_by_side as bench
from judge import agreement
from self_judge import Judge


def letters(given: Any, dtype: str, pairs: int) -> torch.Tensor:
    """p(A) and p(B) of all prompts, by a judge of this dtype."""
    given.dtype = dtype
    model = bench.model_of(given).eval()
    judge = Judge(model, bench.encoder_of(given), bench.templates_of(), max_length=1024)
    comparisons = bench.comparisons_of(bench.records_of(given, pairs))
    return judge.letter_probabilities(bench.judge_prompts(judge, comparisons))


def main() -> None:
    """Prints how many verdicts are the same."""
    given = bench.arguments(__doc__, (), pairs=100)
    half = given.dtype if given.dtype != "float32" else "bfloat16"
    found, expected = (letters(given, dtype, given.pairs) for dtype in (half, "float32"))
    print(f"{half} against float32, {len(found) // 2} pairs: {agreement(found, expected)}")


if __name__ == "__main__":
    main()

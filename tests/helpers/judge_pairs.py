"""What the tests of other judges ask, and how they compare verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from self_judge import Comparison, Verdict

QUESTION = "{context}\n\nA: {response_a}\n\nB: {response_b}\n\nWhich response is more {what}?"
ASKED = {
    what: {"user": QUESTION.replace("{what}", what), "assistant": f"The more {what} is Response"}
    for what in ("helpful", "honest")
}
PAIRS = [
    Comparison("What is the capital of France?", "Paris, on the Seine.", "I cannot say."),
    Comparison("How do I cook rice?", "No.", "Rinse it, add twice as much water, and simmer."),
    Comparison("Why is the sky blue?", "Because of scattering.", "Because it is painted."),
]


def distance(left: Sequence[Verdict], right: Sequence[Verdict]) -> float:
    """The largest difference between two judges' letter probabilities."""
    both = zip(left, right, strict=True)
    return max(
        (torch.tensor(x.probabilities) - torch.tensor(y.probabilities)).abs().max().item()
        for x, y in both
    )

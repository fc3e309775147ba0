"""Judges to whom the larger number is better."""

from __future__ import annotations

import re
from typing import Any

import torch

from self_judge import ChatEncoder, Comparison, Judge, Verdict
from self_judge.data import synthetic


class ByValue:
    """A judge to whom the larger number is better; it remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Comparison]] = []

    @property
    def asked(self) -> list[Comparison]:
        return [comparison for call in self.calls for comparison in call]

    def __call__(self, comparisons: list[Comparison]) -> list[Verdict]:
        self.calls.append(comparisons)
        return [self.verdict(c) for c in comparisons]

    def verdict(self, c: Comparison) -> Verdict:
        margin = (float(c.response_a) - float(c.response_b)) / 1000
        return Verdict(
            preferred="a" if margin > 0 else "b" if margin < 0 else None,
            score_a=0.5 + margin / 2,
            score_b=0.5 - margin / 2,
            win_rate=1.0 if margin > 0 else 0.0,
            margin=margin,
            orders_agree=True,
        )


class Undecided(ByValue):
    def verdict(self, c: Comparison) -> Verdict:
        return Verdict(None, 0.5, 0.5, 0.5, 0.0, False, (), "an exact tie")


class ValueScorer:
    """A letter scorer that reads two numbers in a judge prompt; the larger number is better.

    p(letter of the larger) is the larger, the more they differ, and ½ without a difference.
    """

    max_length = None

    def __init__(self, encoder: Any, *, knows: bool = True) -> None:
        self.encoder, self.knows, self.prompts = encoder, knows, 0

    def letter_probabilities(self, prompts: Any, letter_ids: Any, done: Any) -> torch.Tensor:
        self.prompts += len(prompts)
        texts = [self.encoder.tokenizer.decode(ids) for ids in prompts]
        found = [re.search(r"(\d+) \(A\)\n(\d+) \(B\)", text) for text in texts]
        numbers = torch.tensor([[float(m[1]), float(m[2])] for m in found if m])
        assert len(numbers) == len(prompts), texts
        p = torch.sigmoid((numbers[:, 0] - numbers[:, 1]) / 10 * self.knows)
        return torch.stack([p, 1 - p], 1).float()


def value_judge(*, knows: bool = True) -> Judge:
    """A judge of numbers, on a scorer that stands in for an engine."""
    encoder = ChatEncoder(synthetic.tiny_tokenizer())
    templates = synthetic.judge_templates(principles=False, overall=True)
    return Judge(ValueScorer(encoder, knows=knows), encoder, templates)

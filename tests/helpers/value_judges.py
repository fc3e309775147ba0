"""Judges to whom the larger number is better."""

from __future__ import annotations

from self_judge import Comparison, Verdict


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

"""Intervals and judge quality against hand-computed cases."""

from __future__ import annotations

import math
import random

import pytest

from self_judge.evaluation.statistics import (
    bootstrap_mean,
    judge_quality,
    proportion,
    win_rate,
)
from self_judge.judging.voting import aggregate, under_principle


def verdict(first: float, second: float):  # type: ignore[no-untyped-def]
    """p(A) − p(B) is `first` with a first, and p(B) − p(A) is `second` with b first."""
    return aggregate([((0.4 + first / 2, 0.4 - first / 2), (0.4 - second / 2, 0.4 + second / 2))])


def test_a_proportion_has_wilsons_interval() -> None:
    estimate = proportion(8, 10)
    z = 1.959964
    centre = (0.8 + z * z / 20) / (1 + z * z / 10)
    half = z / (1 + z * z / 10) * math.sqrt(0.8 * 0.2 / 10 + z * z / 400)
    assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_the_bootstrap_interval_of_a_mean_covers_it_and_repeats() -> None:
    generator = random.Random(3)
    values = [generator.gauss(5, 2) for _ in range(400)]
    estimate = bootstrap_mean(values, seed=1)
    assert estimate == bootstrap_mean(values, seed=1)
    assert estimate.low < estimate.value < estimate.high
    # As wide as the normal approximation has it.
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_equal_values_have_a_point_as_interval() -> None:
    assert bootstrap_mean([0.5, 0.5, 0.5]).low == 0.5


def test_a_tie_counts_half_a_win() -> None:
    assert win_rate([1, 2, 3, 0], [0, 2, 3, 1]).value == 0.5


def test_two_wins_of_two_do_not_exclude_chance() -> None:
    won = win_rate([1, 1], [0, 0])
    assert (won.value, won.low, won.high) == (1.0, proportion(2, 2).low, 1.0)
    assert won.low < 0.5


def test_judge_quality_counts_what_was_decided_and_how() -> None:
    verdicts = [verdict(0.2, 0.2), verdict(0.3, -0.1), verdict(-0.2, -0.2), verdict(0.1, -0.1)]
    quality = judge_quality(verdicts)
    assert quality.accuracy.value == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert quality.single_order == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert quality.order_agreement == pytest.approx(2 / 4)
    assert quality.undecidable == pytest.approx(1 / 4)


def test_one_principle_can_be_looked_at_alone() -> None:
    both = aggregate([((0.6, 0.2), (0.2, 0.6)), ((0.1, 0.7), (0.8, 0.1))])
    assert under_principle(both, 0).preferred == "a"
    assert under_principle(both, 1).preferred == "b"


def test_no_cases_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        judge_quality([])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])

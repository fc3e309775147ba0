"""Voting: from letter probabilities to a verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from self_judge import Comparison
from self_judge.judging.voting import aggregate, swap_averaged

A_WINS = ((0.6, 0.2), (0.3, 0.5))  # s(a) = 0.55, s(b) = 0.25; both orders say a


B_WINS = ((0.1, 0.7), (0.4, 0.2))  # s(a) = 0.15, s(b) = 0.55; both orders say b


TIE = ((0.5, 0.25), (0.5, 0.25))  # the letter A, whatever it names: pure position bias


def test_a_score_is_the_mean_likelihood_of_a_response_over_both_orders() -> None:
    assert swap_averaged(A_WINS) == pytest.approx((0.55, 0.25))
    assert swap_averaged(B_WINS) == pytest.approx((0.15, 0.55))


def test_one_principle_decides_alone() -> None:
    verdict = aggregate([A_WINS])
    assert verdict.preferred == "a"
    assert (verdict.score_a, verdict.score_b) == pytest.approx((0.55, 0.25))
    assert verdict.margin == pytest.approx(0.30)
    assert verdict.win_rate == 1.0
    assert verdict.orders_agree
    assert verdict.undecidable_because is None
    assert verdict.probabilities == (A_WINS,)


def test_the_majority_of_principles_wins_against_a_larger_mean_score() -> None:
    narrowly_a = ((0.30, 0.29), (0.29, 0.30))
    verdict = aggregate([narrowly_a, narrowly_a, B_WINS])
    assert verdict.score_b > verdict.score_a
    assert verdict.preferred == "a"
    assert verdict.win_rate == pytest.approx(2 / 3)
    assert verdict.margin < 0


def test_three_of_four_principles_are_a_majority() -> None:
    verdict = aggregate([B_WINS, B_WINS, A_WINS, B_WINS])
    assert verdict.preferred == "b"
    assert verdict.win_rate == pytest.approx(0.25)


def test_an_even_split_goes_to_the_larger_mean_score() -> None:
    verdict = aggregate([A_WINS, B_WINS, A_WINS, B_WINS])  # means 0.35 and 0.40
    assert verdict.win_rate == 0.5
    assert verdict.preferred == "b"
    assert verdict.margin == pytest.approx(-0.05)


def test_a_tied_principle_votes_for_neither() -> None:
    verdict = aggregate([TIE, A_WINS, TIE])
    assert verdict.preferred == "a"
    assert verdict.win_rate == pytest.approx(2 / 3)


def test_an_exact_tie_is_undecidable_and_says_so() -> None:
    mirrored = ((0.6, 0.2), (0.2, 0.6)), ((0.2, 0.6), (0.6, 0.2))
    for probabilities in ([TIE], [TIE] * 4, mirrored):
        verdict = aggregate(probabilities)
        assert verdict.preferred is None
        assert verdict.undecidable_because == "an exact tie"
        assert verdict.win_rate == 0.5
        assert verdict.margin == 0.0
        assert math.isfinite(verdict.score_a)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_undecidable_even_if_the_others_agree(broken: float) -> None:
    verdict = aggregate([A_WINS, A_WINS, A_WINS, ((0.1, 0.1), (broken, 0.1))])
    assert verdict.preferred is None
    assert "not finite" in str(verdict.undecidable_because)
    assert verdict.orders_agree is False
    assert verdict.win_rate == 0.5
    assert all(map(math.isnan, (verdict.margin, verdict.score_a, verdict.score_b)))


def test_orders_agree_only_if_each_alone_prefers_the_same_response() -> None:
    assert aggregate([B_WINS]).orders_agree
    assert not aggregate([TIE]).orders_agree  # position bias
    assert not aggregate([((0.9, 0.1), (0.5, 0.4))]).orders_agree
    assert not aggregate([((0.9, 0.1), (0.4, 0.4))]).orders_agree  # the second has no opinion


def test_an_order_prefers_by_its_own_two_letters() -> None:
    assert aggregate([((0.6, 0.5), (0.3, 0.7))]).orders_agree
    assert not aggregate([((0.4, 0.5), (0.1, 0.45))]).orders_agree


def test_a_vote_without_principles_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one principle"):
        aggregate([])


probability = st.floats(0, 1, allow_nan=False, width=32)
order = st.tuples(probability, probability)


@given(st.lists(st.tuples(order, order), min_size=1, max_size=5))
def test_swapping_the_comparison_swaps_the_verdict(probabilities: list[Any]) -> None:
    verdict = aggregate(probabilities)
    of_swapped = aggregate([(second, first) for first, second in probabilities])
    swapped = verdict.swapped()
    assert swapped.preferred == of_swapped.preferred
    assert swapped.probabilities == of_swapped.probabilities
    assert swapped.orders_agree == of_swapped.orders_agree
    assert swapped.win_rate == pytest.approx(of_swapped.win_rate)
    assert (swapped.score_a, swapped.score_b, swapped.margin) == (
        of_swapped.score_a,
        of_swapped.score_b,
        of_swapped.margin,
    )
    assert swapped.swapped().preferred == verdict.preferred
    assert (verdict.preferred is None) == (verdict.undecidable_because is not None)


def test_a_comparison_swapped_names_the_responses_the_other_way_round() -> None:
    assert Comparison("c", "x", "y").swapped() == Comparison("c", "y", "x")

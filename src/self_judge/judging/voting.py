"""Combines the letter probabilities for all principles and both orders into a verdict.

This module does not use torch. It does not depend on how the probabilities are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from self_judge.datatypes import Side, Verdict

# For one principle: ((p(A), p(B)) with `a` first, (p(A), p(B)) with `b` first)
Orders = tuple[tuple[float, float], tuple[float, float]]


class Scores(NamedTuple):
    """The swap-averaged scores of responses `a` and `b` under one principle."""

    a: float
    b: float


def swap_averaged(orders: Orders) -> Scores:
    """Computes s(a) = ½[p(A | a first) + p(B | b first)], and likewise s(b) (see the paper)."""
    # An example with a judge that favors the response shown first in both orders:
    #
    #             p(A)  p(B)
    #   a first    .9    .1       s(a) = ½(.9 + .4) = .65    a wins, although the orders disagree:
    #   b first    .6    .4       s(b) = ½(.1 + .6) = .35    with b first, the judge prefers b
    (a_first_A, a_first_B), (b_first_A, b_first_B) = orders  # noqa: N806  the letter's name
    return Scores(0.5 * (a_first_A + b_first_B), 0.5 * (a_first_B + b_first_A))


def aggregate(probabilities: Sequence[Orders]) -> Verdict:
    """Returns the verdict by majority vote of the principles. The higher mean score breaks a tie.

    Args:
        probabilities: `[principle][order][letter]` with at least one principle (see `Verdict`).

    Returns:
        The verdict, which is undecidable if both the wins and the means are exactly tied, or if a
        probability is NaN or infinite.
    """
    # (s(a), s(b)) for each principle, and the verdict:
    #
    #   (.51 .49) (.51 .49) (.05 .95)    a: two of three principles, although the mean is .36 to .64
    #   (.80 .20) (.45 .55)              a: one win each, and the mean is .625 to .375
    kept = tuple(probabilities)
    if not kept:
        raise ValueError("aggregate needs the probabilities of at least one principle")
    if not all(math.isfinite(p) for orders in kept for letters in orders for p in letters):
        return undecidable(kept, "a score is not finite")
    scores = [swap_averaged(orders) for orders in kept]
    wins_a = sum(s.a > s.b for s in scores)
    wins_b = sum(s.b > s.a for s in scores)
    mean_a = math.fsum(s.a for s in scores) / len(scores)
    mean_b = math.fsum(s.b for s in scores) / len(scores)
    ahead = (wins_a, mean_a) if wins_a == wins_b else (wins_a, 0.0)
    behind = (wins_b, mean_b) if wins_a == wins_b else (wins_b, 0.0)
    preferred: Side | None = "a" if ahead > behind else "b" if behind > ahead else None
    verdict = Verdict(
        preferred=preferred,
        score_a=mean_a,
        score_b=mean_b,
        win_rate=(wins_a + 0.5 * (len(scores) - wins_a - wins_b)) / len(scores),
        margin=mean_a - mean_b,
        orders_agree=False,
        probabilities=kept,
        undecidable_because=None if preferred else "an exact tie",
    )
    first, second = verdict.order_margins()
    return replace(verdict, orders_agree=first * second > 0)


def order_agreement(verdicts: Iterable[Verdict]) -> float:
    """Returns the fraction of judged pairs on which both orders agree; NaN without such pairs."""
    agree = [verdict.orders_agree for verdict in verdicts if verdict.is_judged]
    return sum(agree) / len(agree) if agree else math.nan


def undecidable(probabilities: tuple[Orders, ...], because: str) -> Verdict:
    """Returns a verdict without a preferred response, with a short reason."""
    nan = math.nan
    return Verdict(None, nan, nan, 0.5, nan, False, probabilities, because)


def under_principle(verdict: Verdict, place: int) -> Verdict:
    """Returns the verdict under the principle with index `place` in the judge's templates."""
    return aggregate([verdict.probabilities[place]]) if verdict.probabilities else verdict


# -- verdicts as plain data ----------------------------------------------------------------------


def verdict_json(verdict: Verdict, principles: Sequence[str]) -> dict[str, Any]:
    """Converts a verdict to a JSON-serializable dictionary. NaN and infinity become `None`."""
    return {
        "preferred": verdict.preferred,
        "score_a": _finite(verdict.score_a),
        "score_b": _finite(verdict.score_b),
        "margin": _finite(verdict.margin),
        "win_rate": verdict.win_rate,
        "orders_agree": verdict.orders_agree,
        "undecidable_because": verdict.undecidable_because,
        "probabilities": {
            name: [[_finite(p) for p in letters] for letters in orders]
            # A pair that was not scored, such as one that exceeds `max_length`, has none.
            for name, orders in zip(
                principles if verdict.probabilities else (), verdict.probabilities, strict=True
            )
        },
    }


def verdict_from_json(given: Mapping[str, Any]) -> Verdict:
    """Restores a verdict from the output of `verdict_json`."""
    if not given["probabilities"]:
        return undecidable((), given["undecidable_because"])
    return aggregate([_orders(value) for value in given["probabilities"].values()])


def _orders(value: Sequence[Sequence[float | None]]) -> Orders:
    (a, b), (c, d) = ([math.nan if p is None else p for p in letters] for letters in value)
    return (a, b), (c, d)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

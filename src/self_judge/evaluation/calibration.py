"""Whether a judge is right as often as it is sure: verdicts on labeled pairs → a reliability table.

Pure statistics. It neither judges nor draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from self_judge.datatypes import Comparison, Side, Verdict
from self_judge.evaluation.judge_metrics import estimate_json
from self_judge.evaluation.statistics import proportion

BINS = 10  # of confidence, between 0.5 and 1, which is all that a preferred response can have


def calibration(pairs: Iterable[tuple[float, bool]]) -> dict[str, Any] | None:
    """The reliability table, as JSON data.

    Args:
        pairs: confidence in what was preferred, and whether that was the better response.

    Returns:
        `bins` (`low`, `high`, `n`, mean `confidence`, `accuracy` with Wilson's interval; both null
        in an empty bin), `n`, `ece`: expected calibration error, Σ n_b/n |accuracy_b −
        confidence_b| (Guo et al., 2017), `brier`: mean squared distance of confidence from right
        (1) or wrong (0). `None` where there are no pairs.
    """
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for confidence, right in pairs:
        # A bin holds its lower end; rounding keeps 0.55 and the like out of the bin below.
        place = math.floor(round((confidence - 0.5) * 2 * BINS, 9))
        groups[min(max(place, 0), BINS - 1)].append((confidence, right))
    everything = [pair for group in groups for pair in group]
    n = len(everything)
    if not n:
        return None
    bins = []
    for place, group in enumerate(groups):
        bins.append(
            {
                "low": round(0.5 + place / (2 * BINS), 4),
                "high": round(0.5 + (place + 1) / (2 * BINS), 4),
                "n": len(group),
                "confidence": math.fsum(c for c, _ in group) / len(group) if group else None,
                "accuracy": share([right for _, right in group]),
            }
        )
    distances = (abs(math.fsum(c - right for c, right in group)) for group in groups)
    return {
        "n": n,
        "ece": math.fsum(distances) / n,
        "brier": math.fsum((c - right) ** 2 for c, right in everything) / n,
        "bins": bins,
    }


def share(cases: Sequence[bool]) -> dict[str, Any] | None:
    """A share with Wilson's 95 % interval, as JSON data; `None` where there are no cases."""
    if not cases:
        return None
    return estimate_json(proportion(sum(cases), len(cases)))


def judged_line(comparison: Comparison, verdict: Verdict, gold: Side) -> dict[str, Any]:
    """A verdict on a pair of which `gold` is known to be the better, as plain data."""
    finite = verdict.preferred is not None
    return {
        "context": comparison.context,
        "a": comparison.response_a,
        "b": comparison.response_b,
        "gold": gold,
        "preferred": verdict.preferred,
        "score_a": verdict.score_a if finite else None,
        "score_b": verdict.score_b if finite else None,
        "orders_agree": verdict.orders_agree,
        "probabilities": verdict.probabilities if finite else None,
    }


def confidences(lines: Iterable[Mapping[str, Any]]) -> Iterable[tuple[float, bool]]:
    """From `judged_line`s: how sure the judge was of what it preferred, and whether it was right.

    The confidence is the preferred response's share of the two scores; undecided verdicts have
    none.
    """
    for line in lines:
        if line["preferred"] is not None:
            scores = (line["score_a"], line["score_b"])
            yield max(scores) / sum(scores), line["preferred"] == line["gold"]

"""Computes the metrics that some benchmarks define for themselves, from verdicts on their pairs.

- JudgeBench (arXiv 2410.12784): each order casts a vote for or against the label. A pair is right
  if the votes for the label outnumber those against it, so that disagreeing orders are wrong.
- RM-Bench (arXiv 2410.16184): `easy`, `normal` and `hard` are the fractions of pairs won by the
  chosen response. `average` is their mean, and the result for all domains is the mean over domains.
- RewardBench 2 (arXiv 2506.01937): a prompt is right if its chosen response beats every rejected
  response; if k - 1 comparisons are undecided and none is lost, the prompt counts 1/k. The subset
  Ties has its own score (see `_ties`). The result is the mean over subsets. The benchmark compares
  the scores that a reward model gives to single responses. A pairwise judge compares both responses
  of each pair directly, and the margin of a verdict replaces the difference between two scores.
- Human votes (MT-Bench, arXiv 2306.05685): `with ties` is the agreement on all votes, in which
  disagreeing orders count as a tie; `without ties` is the agreement on the other pairs.

Undecided pairs count as not won, unless stated otherwise.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from self_judge.evaluation.judge_metrics import JudgedPair, estimate_json, winners
from self_judge.evaluation.statistics import bootstrap_counts, bootstrap_strata, proportion

_MEAN_OVER_SUBSETS = ("RM-Bench", "RewardBench 2")
_Metrics = dict[str, Counter[float]]  # for each metric, the values of the records and their counts


class _Prompt(NamedTuple):
    """The outcome for one prompt in the subset Ties.

    Attributes:
        right: whether every right response beats every wrong one.
        gap: the smallest margin of a right response over a wrong one.
        spread: the largest margin between two right responses.
    """

    right: bool
    gap: float
    spread: float


class BenchmarkTally:
    """Collects the outcomes of records. Call `add` for each record, and then `report`."""

    def __init__(self) -> None:
        self.values: defaultdict[str, defaultdict[str, _Metrics]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self.prompts: defaultdict[str, dict[str, _Prompt]] = defaultdict(dict)

    def add(
        self, benchmark: str, subset: str, parts: Sequence[str], pairs: Sequence[JudgedPair]
    ) -> None:
        """Adds one record.

        Args:
            benchmark: the name of the benchmark. A benchmark without a metric is ignored.
            subset: the subset of the record.
            parts: the part of each pair (see `LabeledComparison.part`).
            pairs: all pairs of the record.
        """
        if benchmark == "RewardBench 2" and parts[0]:
            self.prompts[subset][parts[0]] = _prompt(pairs)
        elif benchmark in _SCORES:
            metrics = self.values[benchmark][subset]
            for name, value in _SCORES[benchmark](parts, pairs).items():
                metrics.setdefault(name, Counter())[value] += 1

    def report(self) -> dict[str, Any]:
        """Returns the metrics of each benchmark as JSON-serializable data.

        For each benchmark, `subsets` and `overall` map the names of metrics to estimates.
        `unpaired` is the number of prompts in Ties without a counterpart, which do not count.
        """
        values = {name: dict(subsets) for name, subsets in self.values.items()}
        unpaired = 0
        for subset, prompts in self.prompts.items():
            metrics, alone = _ties(prompts)
            values.setdefault("RewardBench 2", {})[subset] = metrics
            unpaired += alone
        reports: dict[str, Any] = {
            benchmark: {
                "overall": _overall(benchmark, list(subsets.values())),
                "subsets": {
                    subset: {name: _estimate([counts]) for name, counts in metrics.items()}
                    for subset, metrics in subsets.items()
                },
            }
            for benchmark, subsets in values.items()
        }
        if unpaired:
            reports["RewardBench 2"]["unpaired"] = unpaired
        return reports


def _overall(benchmark: str, subsets: Sequence[_Metrics]) -> dict[str, Any]:
    strata: defaultdict[str, list[Counter[float]]] = defaultdict(list)
    for metrics in subsets:
        for name, counts in metrics.items():
            strata[name].append(counts)
    if benchmark not in _MEAN_OVER_SUBSETS:
        return {name: _estimate([sum(each, Counter())]) for name, each in strata.items()}
    # A metric of only some subsets, such as the parts of the score for Ties, has no overall value.
    return {name: _estimate(each) for name, each in strata.items() if len(each) == len(subsets)}


def _estimate(strata: Sequence[Mapping[float, int]]) -> dict[str, Any] | None:
    """Returns the mean over strata of the mean of each, with an interval."""
    if not all(strata):
        return None
    if len(strata) > 1:
        return estimate_json(bootstrap_strata(strata))
    (counts,) = strata
    if counts.keys() <= {0.0, 1.0}:
        return estimate_json(proportion(counts.get(1.0, 0), sum(counts.values())))
    return estimate_json(bootstrap_counts(counts))


def _won(pair: JudgedPair) -> float:
    return float(pair.verdict.preferred == pair.label)


def _judge_bench(parts: Sequence[str], pairs: Sequence[JudgedPair]) -> dict[str, float]:
    (pair,) = pairs
    votes = winners(pair.verdict)
    against = "b" if pair.label == "a" else "a"
    return {"accuracy": float(votes.count(pair.label) > votes.count(against))}


def _rm_bench(parts: Sequence[str], pairs: Sequence[JudgedPair]) -> dict[str, float]:
    wins: dict[str, list[float]] = {"easy": [], "normal": [], "hard": [], "average": []}
    for part, pair in zip(parts, pairs, strict=True):
        wins[part].append(_won(pair))
        wins["average"].append(_won(pair))
    return {name: sum(each) / len(each) for name, each in wins.items()}


def _best_of(parts: Sequence[str], pairs: Sequence[JudgedPair]) -> dict[str, float]:
    undecided = sum(pair.verdict.preferred is None for pair in pairs)
    lost = len(pairs) - undecided - sum(map(_won, pairs))
    return {"score": 0.0 if lost else 1 / (1 + undecided)}


def _human_votes(parts: Sequence[str], pairs: Sequence[JudgedPair]) -> dict[str, float]:
    (pair,) = pairs
    first, second = winners(pair.verdict)
    said = first if first == second else "tie"
    agree = float(said == pair.label)
    return {"with ties": agree, **({} if "tie" in (said, pair.label) else {"without ties": agree})}


_SCORES = {
    "JudgeBench": _judge_bench,
    "RM-Bench": _rm_bench,
    "RewardBench 2": _best_of,
    "human votes": _human_votes,
}


def _prompt(pairs: Sequence[JudgedPair]) -> _Prompt:
    def margin(pair: JudgedPair) -> float:
        value = pair.verdict.margin if math.isfinite(pair.verdict.margin) else 0.0
        return -value if pair.label == "b" else value

    ranked = [pair for pair in pairs if pair.label != "tie"]
    return _Prompt(
        right=all(map(_won, ranked)),
        gap=min(map(margin, ranked)),
        spread=max((abs(margin(pair)) for pair in pairs if pair.label == "tie"), default=0.0),
    )


def _ties(prompts: Mapping[str, _Prompt]) -> tuple[_Metrics, int]:
    """Returns the metrics of the subset Ties, and the number of prompts without a counterpart.

    Each prompt `tied:N` with several right responses belongs to a prompt `ref:N` with one. The
    score is 0.3 for each of the two that is right, 0.2 if the gap in `tied:N` exceeds its spread,
    0.2 if the smaller gap of both prompts does, and 0.01 · tanh(smaller gap / spread - 1).
    """
    metrics: _Metrics = {
        name: Counter() for name in ("score", "tied", "ref", "gap > spread", "both gaps > spread")
    }
    numbers = {name.partition(":")[2] for name in prompts}
    paired = [n for n in numbers if {f"ref:{n}", f"tied:{n}"} <= prompts.keys()]
    for number in paired:
        tied, ref = prompts[f"tied:{number}"], prompts[f"ref:{number}"]
        smaller = min(tied.gap, ref.gap)
        terms = {
            "tied": float(tied.right),
            "ref": float(ref.right),
            "gap > spread": float(tied.gap > tied.spread),
            "both gaps > spread": float(smaller > tied.spread),
        }
        score = sum(w * term for w, term in zip((0.3, 0.3, 0.2, 0.2), terms.values(), strict=True))
        for name, value in {
            "score": score + 0.01 * _tie_break(smaller, tied.spread),
            **terms,
        }.items():
            metrics[name][value] += 1
    return metrics, len(prompts) - 2 * len(paired)


def _tie_break(gap: float, spread: float) -> float:
    if spread:
        return math.tanh(gap / spread - 1)
    return math.copysign(1.0, gap) if gap else 0.0

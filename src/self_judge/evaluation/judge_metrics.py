"""Measures the quality of a judge from tallies of judged pairs, with confidence intervals.

The size of a tally does not depend on the number of pairs. This module does not judge pairs or read
files. docs/judging.md explains each metric.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple

from scipy.stats import binomtest

from self_judge.datatypes import Verdict
from self_judge.evaluation.statistics import Estimate, bootstrap_counts, proportion, with_width
from self_judge.judging.voting import under_principle

Label = Literal["a", "b", "tie"]
BINS = 10  # the number of confidence bins between 0.5 and 1
_LABELS: tuple[Label, ...] = ("a", "b", "tie")


class JudgedPair(NamedTuple):
    """A labeled pair with the judge's verdict.

    Attributes:
        label: the better response, or `"tie"`.
        verdict: the judge's verdict for all principles.
        place: the index of the label's principle in the judge's templates. If `place` is `None`,
            the label is compared with the verdict for all principles.
        characters: the lengths of responses `a` and `b` in characters.
    """

    label: Label
    verdict: Verdict
    place: int | None
    characters: tuple[int, int]

    @property
    def counted(self) -> Verdict:
        """The verdict that is compared with the label."""
        return self.verdict if self.place is None else under_principle(self.verdict, self.place)


def credit(said: Label | None, label: Label) -> float:
    """Returns 1 if `said` is the better response, 0 if it is the worse one, and ½ if undecided."""
    return 0.5 if said in (None, "tie") else float(said == label)


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """Converts an estimate to a JSON-serializable dictionary."""
    ends = [estimate.low, estimate.high]
    return {"value": estimate.value, "ci95": ends, "n": estimate.n}


@dataclass
class _Mean:
    """A running mean, stored as the sum and the number of values."""

    total: float = 0.0
    n: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.n += 1

    @property
    def value(self) -> float | None:
        return self.total / self.n if self.n else None

    def share(self) -> dict[str, Any] | None:
        """Returns the fraction of successes with its interval. Ties count as half successes."""
        return estimate_json(proportion(self.total, self.n)) if self.n else None


@dataclass
class JudgeTally:
    """Counts the outcomes of judged pairs. Call `add` for each pair, and then `report`.

    Args:
        principles: the principles in the judge's templates, in order.
    """

    # An example of how a pair is counted, with label `a` and the letter probabilities below.
    # `first` is the winner if response `a` is shown first, and `second` is the winner if response
    # `b` is shown first. The sign of an order's margin determines the winner in that order:
    #
    #               p(A)  p(B)
    #   a first      .9    .1      first  = a (.9 - .1 > 0)     order "given":   right
    #   b first      .6    .4      second = b (.4 - .6 < 0)     order "swapped": wrong
    #
    #   verdict a (mean .65 to .35)            accuracy: right, confidence .65
    #   first differs from second              decided by position: the first position won twice

    principles: Sequence[str]
    pairs: int = 0
    means: defaultdict[str, _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    reasons: Counter[str] = field(default_factory=Counter)
    letters: Counter[float] = field(default_factory=Counter)
    # The mean confidence and the accuracy in each bin.
    bins: list[tuple[_Mean, _Mean]] = field(
        default_factory=lambda: [(_Mean(), _Mean()) for _ in range(BINS)]
    )

    def __post_init__(self) -> None:
        names = list(self.principles)
        self.by_principle = {name: _Mean() for name in names}
        self.both: dict[tuple[str, str], Counter[tuple[Label, Label]]] = {
            pair: Counter() for pair in combinations(names, 2)
        }
        self.votes: Counter[tuple[int, int, int]] = Counter()

    def add(self, pair: JudgedPair) -> None:
        """Counts one pair."""
        verdict, label, means = pair.counted, pair.label, self.means
        said = verdict.preferred
        self.pairs += 1
        if verdict.undecidable_because is not None:
            self.reasons[verdict.undecidable_because] += 1
        first, second = winners(verdict)
        consistent = first if first == second else "tie"
        means["with_ties"].add(float(consistent == label))
        if label == "tie":
            means["ties_conflict"].add(float(consistent == "tie"))
            means["ties_undecided"].add(float(said is None))
        else:
            self._add_decided(said, label, first, second, pair.characters)
        if verdict.is_judged:
            self._add_judged(verdict, label, first, second)
            means["margin of ties" if label == "tie" else "margin of others"].add(
                abs(verdict.margin)
            )
        self._add_length(said, pair.characters)
        if len(self.principles) > 1 or pair.place is None:
            self._add_principles(pair)

    def _add_decided(
        self,
        said: Label | None,
        label: Label,
        first: Label,
        second: Label,
        characters: tuple[int, int],
    ) -> None:
        """Counts a pair whose label is not a tie."""
        means = self.means
        means["accuracy"].add(credit(said, label))
        means["given"].add(credit(first, label))
        means["swapped"].add(credit(second, label))
        # Order 0 shows response `a` first, and order 1 shows response `b` first.
        means["better_first"].add(credit(first if label == "a" else second, label))
        means["better_second"].add(credit(second if label == "a" else first, label))
        longer = _longer(characters)
        means["longest_is_better"].add(credit(longer, label))
        if longer != "tie":
            means["better_longer" if longer == label else "better_shorter"].add(credit(said, label))

    def _add_judged(self, verdict: Verdict, label: Label, first: Label, second: Label) -> None:
        """Counts a pair whose verdict has probabilities."""
        means = self.means
        means["agreement"].add(float(first == second != "tie"))
        # Both orders prefer the same letter, and therefore different responses.
        conflict = {first, second} == {"a", "b"}
        means["by_position"].add(float(conflict))
        if conflict:
            means["first_of_conflicts"].add(float(first == "a"))
        # The fraction of orders in which the response shown first wins. A tie counts as half.
        self.letters[(credit(first, "a") + credit(second, "b")) / 2] += 1
        masses = [p for orders in verdict.probabilities for letters in orders for p in letters]
        means["letter_mass"].add(sum(masses) / (len(masses) / 2))
        if label != "tie":
            self._add_calibration(verdict, label)

    def _add_calibration(self, verdict: Verdict, label: Label) -> None:
        """Adds the confidence: the preferred response's fraction of the sum of the mean scores."""
        total = verdict.score_a + verdict.score_b
        p_a = verdict.score_a / total if total > 0 else 0.5
        self.means["brier"].add((1 - (p_a if label == "a" else 1 - p_a)) ** 2)
        confidence = {"a": p_a, "b": 1 - p_a, None: 0.5}[verdict.preferred]
        # A bin includes its lower end. Adding 1e-9 keeps values such as 0.55 out of the bin below.
        # If the majority vote contradicts the mean scores, the confidence is below ½ and is counted
        # in the lowest bin.
        place = int((confidence - 0.5) * 2 * BINS + 1e-9)
        sure, right = self.bins[min(max(place, 0), BINS - 1)]
        sure.add(confidence)
        right.add(credit(verdict.preferred, label))

    def _add_length(self, said: Label | None, characters: tuple[int, int]) -> None:
        longer = _longer(characters)
        if said is not None and longer != "tie":
            self.means["longer_preferred"].add(float(said == longer))

    def _add_principles(self, pair: JudgedPair) -> None:
        if not pair.verdict.probabilities:
            return
        alone = [
            under_principle(pair.verdict, place).preferred or "tie"
            for place in range(len(self.principles))
        ]
        for place, (name, said) in enumerate(zip(self.principles, alone, strict=True)):
            if pair.label != "tie" and pair.place in (None, place):
                self.by_principle[name].add(credit(said, pair.label))
        for (i, j), counts in zip(
            combinations(range(len(alone)), 2), self.both.values(), strict=True
        ):
            counts[alone[i], alone[j]] += 1
        self.votes[(alone.count("a"), alone.count("b"), alone.count("tie"))] += 1

    def report(self) -> dict[str, Any]:
        """Returns all metrics as JSON-serializable data. Metrics without any pairs are `None`."""

        def share(name: str) -> dict[str, Any] | None:
            return self.means[name].share()

        return {
            "pairs": self.pairs,
            "ties": self.means["ties_conflict"].n,
            "accuracy": share("accuracy"),
            "orders": {n: share(n) for n in ("given", "swapped", "better_first", "better_second")},
            "order_agreement": share("agreement"),
            "decided_by_position": share("by_position"),
            "first_of_decided_by_position": share("first_of_conflicts"),
            "first_position": (
                estimate_json(bootstrap_counts(self.letters)) if self.letters else None
            ),
            "longer": {
                "preferred": share("longer_preferred"),
                "accuracy_better_is_longer": share("better_longer"),
                "accuracy_better_is_shorter": share("better_shorter"),
            },
            "undecidable": {
                "share": sum(self.reasons.values()) / self.pairs if self.pairs else None,
                "reasons": dict(self.reasons),
            },
            "letter_mass": self.means["letter_mass"].value,
            "calibration": self._calibration(),
            "principles": {name: mean.share() for name, mean in self.by_principle.items()},
            "principle_agreement": self._principle_agreement(),
            # Metrics that include pairs labeled as ties.
            "with_ties": {
                "three_way_agreement": share("with_ties"),
                "ties_called_ties": share("ties_conflict"),
                "ties_undecided": share("ties_undecided"),
                "mean_margin_ties": self.means["margin of ties"].value,
                "mean_margin_others": self.means["margin of others"].value,
            } if self.means["ties_conflict"].n else None,
            "baselines": {
                "swap-averaged judge": share("accuracy"),
                "judge, one order (as given)": share("given"),
                "judge, one order (swapped)": share("swapped"),
                "the longer response": share("longest_is_better"),
            },
        }  # fmt: skip

    def _calibration(self) -> dict[str, Any] | None:
        """Returns the ECE, the Brier score and the reliability table.

        ECE is Σ n_b/n |accuracy_b − confidence_b| over confidence bins (Guo et al., 2017). The
        Brier score is the mean squared difference between P(better response) and 1.
        """
        brier = self.means["brier"]
        if not brier.n:
            return None
        bins = [
            {
                "low": round(0.5 + place / (2 * BINS), 4),
                "high": round(0.5 + (place + 1) / (2 * BINS), 4),
                "n": sure.n,
                "confidence": sure.value,
                "accuracy": right.share(),
            }
            for place, (sure, right) in enumerate(self.bins)
        ]
        ece = sum(abs(sure.total - right.total) for sure, right in self.bins) / brier.n
        return {"n": brier.n, "ece": ece, "brier": brier.value, "bins": bins}

    def _principle_agreement(self) -> dict[str, Any] | None:
        if len(self.principles) < 2 or not self.votes:
            return None
        table = [
            {
                "principles": list(names),
                "agreement": sum(c for (x, y), c in counts.items() if x == y)
                / sum(counts.values()),
                "kappa": cohens_kappa(counts),
            }
            for names, counts in self.both.items()
        ]
        return {"pairwise": table, "fleiss_kappa": fleiss_kappa(self.votes)}


def winners(verdict: Verdict) -> tuple[Label, Label]:
    """Returns the winner in each order. Orders without finite scores are ties."""
    first, second = verdict.order_margins() if math.isfinite(verdict.margin) else (0.0, 0.0)
    return _sign(first), _sign(second)


def _sign(difference: float) -> Label:
    return "a" if difference > 0 else "b" if difference < 0 else "tie"


def _longer(characters: tuple[int, int]) -> Label:
    return _sign(characters[0] - characters[1])


def cohens_kappa(counts: Counter[tuple[Label, Label]]) -> float | None:
    """Computes Cohen's kappa (Cohen, 1960), or returns `None` if the chance agreement is 1.

    Args:
        counts: the number of pairs for each (first rater's label, second rater's label).
    """
    n = sum(counts.values())
    observed = sum(c for (x, y), c in counts.items() if x == y) / n
    chance = sum(
        sum(c for (x, _), c in counts.items() if x == label)
        * sum(c for (_, y), c in counts.items() if y == label)
        for label in _LABELS
    ) / (n * n)
    return (observed - chance) / (1 - chance) if chance < 1 else None


def fleiss_kappa(votes: Counter[tuple[int, int, int]]) -> float | None:
    """Computes Fleiss' kappa (Fleiss, 1971), or returns `None` if the chance agreement is 1.

    Args:
        votes: the number of pairs for each (votes for a, votes for b, ties). There must be at
            least two raters.
    """
    n = sum(votes.values())
    raters = sum(next(iter(votes)))
    alike = sum(c * sum(v * (v - 1) for v in vote) for vote, c in votes.items())
    observed = alike / (n * raters * (raters - 1))
    shares = [sum(vote[k] * c for vote, c in votes.items()) / (n * raters) for k in range(3)]
    chance = sum(share * share for share in shares)
    return (observed - chance) / (1 - chance) if chance < 1 - 1e-12 else None


@dataclass
class PairedTally:
    """Compares two judges on the same pairs. Call `add` for each pair, and then `report`."""

    cells: Counter[tuple[float, float]] = field(default_factory=Counter)

    def add(self, ours: float, theirs: float) -> None:
        self.cells[ours, theirs] += 1

    def report(self) -> dict[str, Any] | None:
        """Returns the difference in accuracy with its interval, and McNemar's exact test.

        The test counts the pairs that exactly one judge decides correctly. An undecided pair does
        not count as correct.
        """
        if not self.cells:
            return None
        differences: Counter[float] = Counter()
        for (ours, theirs), count in self.cells.items():
            differences[ours - theirs] += count
        ours_only = sum(c for (x, y), c in self.cells.items() if x == 1 and y < 1)
        theirs_only = sum(c for (x, y), c in self.cells.items() if y == 1 and x < 1)
        discordant = ours_only + theirs_only
        return {
            "difference": estimate_json(with_width(bootstrap_counts(differences), lowest=-1.0)),
            "only_this_right": ours_only,
            "only_other_right": theirs_only,
            "mcnemar_p": binomtest(ours_only, discordant).pvalue if discordant else 1.0,
        }

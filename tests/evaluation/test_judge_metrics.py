"""Every number about a judge against cases counted by hand, and a library's own function."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.stats import bootstrap

from self_judge.datatypes import Verdict
from self_judge.evaluation.judge_metrics import (
    JudgedPair,
    JudgeTally,
    Label,
    PairedTally,
    cohens_kappa,
    credit,
    fleiss_kappa,
)
from self_judge.evaluation.statistics import bootstrap_counts
from self_judge.judging.voting import aggregate


def orders(first: float, second: float):  # type: ignore[no-untyped-def]
    """p(A) − p(B) is `first` with a first; p(B) − p(A) is `second` with b first: both are for a."""
    return ((0.4 + first / 2, 0.4 - first / 2), (0.4 - second / 2, 0.4 + second / 2))


def tally(
    *pairs: tuple[Label, Verdict, tuple[int, int]], principles: tuple[str, ...] = ("overall",)
) -> JudgeTally:
    counted = JudgeTally(principles)
    for label, verdict, characters in pairs:
        counted.add(JudgedPair(label, verdict, None, characters))
    return counted


def one(first: float, second: float) -> Verdict:
    return aggregate([orders(first, second)])


# label, verdict, lengths: what each is an example of
CASES: list[tuple[Label, Verdict, tuple[int, int]]] = [
    ("a", one(0.2, 0.2), (9, 5)),  # right, orders agree, longer is better
    ("a", one(0.3, -0.1), (5, 9)),  # right by the mean; A in both orders; shorter is better
    ("b", one(0.2, 0.2), (9, 5)),  # wrong; orders agree; shorter is better
    ("b", one(-0.1, -0.3), (5, 5)),  # right; equal lengths
    ("a", one(-0.3, 0.1), (9, 5)),  # wrong; B in both orders; longer is better
    ("a", one(0.1, -0.1), (9, 5)),  # an exact tie: A in both orders
]


def test_accuracy_orders_and_baselines_as_counted_by_hand() -> None:
    report = tally(*CASES).report()
    assert report["pairs"] == 6
    assert report["accuracy"]["value"] == pytest.approx(3.5 / 6)
    assert report["accuracy"]["n"] == 6
    # a first: a a a b b a against a a b b a a
    assert report["orders"]["given"]["value"] == pytest.approx(4 / 6)
    # b first: a b a b a b
    assert report["orders"]["swapped"]["value"] == pytest.approx(3 / 6)
    # the better one shown first: order 0 for label a, order 1 for label b
    assert report["orders"]["better_first"]["value"] == pytest.approx(4 / 6)
    assert report["orders"]["better_second"]["value"] == pytest.approx(3 / 6)
    assert report["baselines"]["the longer response"]["value"] == pytest.approx(3.5 / 6)
    assert report["undecidable"] == {
        "share": pytest.approx(1 / 6),
        "reasons": {"an exact tie": 1},
    }


def test_position_and_length_as_counted_by_hand() -> None:
    report = tally(*CASES).report()
    assert report["order_agreement"]["value"] == pytest.approx(3 / 6)
    assert report["decided_by_position"]["value"] == pytest.approx(3 / 6)
    assert report["first_of_decided_by_position"]["value"] == pytest.approx(2 / 3)
    # first place won in ½ of the showings where orders agree, in 1, 0 and 1 where they do not
    assert report["first_position"]["value"] == pytest.approx((3 * 0.5 + 1 + 0 + 1) / 6)
    longer = report["longer"]
    # decided with different lengths: a longer, b longer (wrong side), a longer, a longer
    assert longer["preferred"]["value"] == pytest.approx(2 / 4)
    assert longer["accuracy_better_is_longer"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert longer["accuracy_better_is_shorter"]["value"] == pytest.approx((1 + 0) / 2)
    assert report["letter_mass"] == pytest.approx(0.8)


def test_calibration_as_counted_by_hand() -> None:
    # p(a) = s(a) / (s(a) + s(b)): 0.9 right, 0.9 wrong, 0.62 right, 0.62 right
    def sure(p: float) -> Verdict:
        return aggregate([((p / 2, (1 - p) / 2), ((1 - p) / 2, p / 2))])

    report = tally(
        ("a", sure(0.9), (1, 1)),
        ("b", sure(0.9), (1, 1)),
        ("a", sure(0.62), (1, 1)),
        ("b", sure(0.38), (1, 1)),
    ).report()["calibration"]
    assert report["brier"] == pytest.approx((0.01 + 0.81 + 0.1444 + 0.1444) / 4)
    assert report["ece"] == pytest.approx((2 * abs(0.9 - 0.5) + 2 * abs(0.62 - 1)) / 4)
    filled = {(b["low"], b["high"]): b for b in report["bins"] if b["n"]}
    assert {ends: b["n"] for ends, b in filled.items()} == {(0.6, 0.65): 2, (0.9, 0.95): 2}
    assert filled[0.6, 0.65]["accuracy"]["value"] == 1
    assert filled[0.9, 0.95]["confidence"] == pytest.approx(0.9)


def test_a_calibrated_judge_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    generator = random.Random(0)

    def error(told: float, true: float) -> float:
        counted = JudgeTally(("overall",))
        for _ in range(4000):
            label: Label = "a" if generator.random() < true else "b"
            verdict = aggregate([((told / 2, (1 - told) / 2), ((1 - told) / 2, told / 2))])
            counted.add(JudgedPair(label, verdict, None, (1, 1)))
        return counted.report()["calibration"]["ece"]

    assert error(0.7, 0.7) < 0.03
    assert error(0.95, 0.7) == pytest.approx(0.25, abs=0.03)


def test_ties_in_the_data_are_met_by_orders_that_disagree() -> None:
    report = tally(
        ("tie", one(0.3, -0.1), (1, 1)),  # orders disagree: called a tie
        ("tie", one(0.2, 0.2), (1, 1)),
        ("a", one(0.2, 0.2), (1, 1)),
        ("a", one(0.3, -0.1), (1, 1)),
    ).report()
    ties = report["with_ties"]
    assert report["ties"] == 2
    assert report["accuracy"]["n"] == 2
    assert ties["three_way_agreement"]["value"] == pytest.approx(2 / 4)
    assert ties["ties_called_ties"]["value"] == pytest.approx(1 / 2)
    assert ties["mean_margin_ties"] == pytest.approx((0.1 + 0.2) / 2)
    assert tally(*CASES).report()["with_ties"] is None


def test_a_pair_that_was_not_judged_counts_half_and_is_said() -> None:
    nan = math.nan
    unfit = Verdict(None, nan, nan, 0.5, nan, False, (), "the pair does not fit into max_length")
    broken = aggregate([((nan, 0.1), (0.2, 0.3))])
    report = tally(("a", unfit, (2, 1)), ("a", broken, (2, 1)), CASES[0]).report()
    assert report["accuracy"]["value"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert report["order_agreement"]["n"] == 1
    assert report["calibration"]["n"] == 1
    assert report["undecidable"]["reasons"] == {
        "the pair does not fit into max_length": 1,
        "a score is not finite": 1,
    }


def test_each_principle_is_rated_alone_and_against_the_others() -> None:
    a, b = orders(0.2, 0.2), orders(-0.2, -0.2)
    report = tally(
        ("a", aggregate([a, a, b]), (1, 1)),
        ("a", aggregate([a, b, b]), (1, 1)),
        ("b", aggregate([b, b, b]), (1, 1)),
        ("b", aggregate([b, a, b]), (1, 1)),
        principles=("x", "y", "z"),
    ).report()
    assert {name: e["value"] for name, e in report["principles"].items()} == {
        "x": 1.0,
        "y": 0.5,
        "z": 0.5,
    }
    pairwise = {tuple(e["principles"]): e for e in report["principle_agreement"]["pairwise"]}
    assert pairwise["x", "y"]["agreement"] == pytest.approx(2 / 4)
    assert pairwise["x", "y"]["kappa"] == pytest.approx(0)
    assert pairwise["y", "z"]["agreement"] == pytest.approx(2 / 4)


def test_a_label_by_one_principle_is_compared_with_that_principle() -> None:
    verdict = aggregate([orders(0.2, 0.2), orders(-0.2, -0.2), orders(-0.2, -0.2)])
    counted = JudgeTally(("x", "y", "z"))
    counted.add(JudgedPair("a", verdict, 0, (1, 1)))
    report = counted.report()
    assert report["accuracy"]["value"] == 1
    assert report["principles"]["x"]["n"] == 1
    assert report["principles"]["y"] is None


def test_kappas_are_those_of_statsmodels() -> None:
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    generator = random.Random(1)
    labels: list[Label] = ["a", "b", "tie"]
    rated = [
        [label if generator.random() < 0.6 else generator.choice(labels) for _ in range(4)]
        for label in generator.choices(labels, [5, 4, 1], k=300)
    ]
    table = np.array([[row.count(label) for label in labels] for row in rated])
    votes = Counter((int(x), int(y), int(z)) for x, y, z in table)
    assert fleiss_kappa(votes) == pytest.approx(inter_rater.fleiss_kappa(table))
    both = Counter((row[0], row[1]) for row in rated)
    square = [[both[x, y] for y in labels] for x in labels]
    assert cohens_kappa(both) == pytest.approx(inter_rater.cohens_kappa(np.array(square)).kappa)
    assert cohens_kappa(Counter({("a", "a"): 5})) is None


def test_paired_differences_and_mcnemar_are_those_of_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    counted = PairedTally()
    for (ours, theirs), count in {(1, 1): 40, (1, 0): 15, (0, 1): 5, (0, 0): 20}.items():
        for _ in range(count):
            counted.add(float(ours), float(theirs))
    report = counted.report()
    assert report is not None
    assert report["difference"]["value"] == pytest.approx(10 / 80)
    assert (report["only_this_right"], report["only_other_right"]) == (15, 5)
    exact = tables.mcnemar([[40, 15], [5, 20]], exact=True)
    assert report["mcnemar_p"] == pytest.approx(exact.pvalue)
    low, high = report["difference"]["ci95"]
    # Wald's interval of a paired difference, by hand
    half = 1.96 * math.sqrt(20 / 80 - (10 / 80) ** 2) / math.sqrt(80)
    assert (low, high) == pytest.approx((0.125 - half, 0.125 + half), abs=0.015)


def test_a_bootstrap_of_counts_is_the_bootstrap_of_their_values() -> None:
    values = [0.0] * 30 + [0.5] * 10 + [1.0] * 60
    ours = bootstrap_counts(Counter(values), seed=3)
    theirs = bootstrap(
        (np.array(values),), np.mean, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.value == pytest.approx(0.65)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert ours == bootstrap_counts(Counter(values), seed=3)


def test_a_tally_does_not_grow_with_the_pairs() -> None:
    import pickle

    few, many = tally(*CASES), tally(*CASES * 500)
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 300


def test_credit_is_half_where_nothing_is_decided() -> None:
    assert [credit(said, "a") for said in ("a", "b", None, "tie")] == [1, 0, 0.5, 0.5]

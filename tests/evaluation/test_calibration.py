"""The reliability table, against cases worked out by hand and against plain NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from self_judge import Comparison
from self_judge.commands.demo.steps import judged_line
from self_judge.datatypes import Verdict
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.judging.voting import aggregate
from self_judge.reporting.collect import collect
from self_judge.storage.run_dir import JUDGED


def preferring_a(*shares: float) -> Verdict:
    """One principle per share of the scores that a gets."""
    return aggregate([((p / 2, (1 - p) / 2), ((1 - p) / 2, p / 2)) for p in shares])


def calibration(pairs: list[tuple[float, bool]]) -> Any:
    """The table of verdicts that prefer one response with this confidence, and are right or not."""
    tally = JudgeTally(())
    for confidence, right in pairs:
        tally.add(JudgedPair("a" if right else "b", preferring_a(confidence), None, (1, 1)))
    return tally.report()["calibration"]


def test_a_table_worked_out_by_hand() -> None:
    result = calibration([(0.52, True), (0.54, False), (0.95, True), (1.0, True), (0.9, False)])
    full = [b for b in result["bins"] if b["n"]]
    low, high, highest = full
    assert (low["low"], low["high"], low["n"]) == (0.5, 0.55, 2)
    assert low["accuracy"]["value"] == 0.5
    assert low["confidence"] == pytest.approx(0.53)
    assert (high["n"], high["accuracy"]["value"]) == (1, 0.0)
    assert (highest["low"], highest["high"], highest["n"]) == (0.95, 1.0, 2)
    interval = binomtest(2, 2).proportion_ci(0.95, method="wilson")
    assert highest["accuracy"]["ci95"] == [interval.low, interval.high]
    assert [b["accuracy"] for b in result["bins"] if not b["n"]] == [None] * 7
    assert result["n"] == 5
    assert result["ece"] == pytest.approx(2 / 5 * 0.03 + 1 / 5 * 0.9 + 2 / 5 * 0.025)
    squares = [0.48**2, 0.54**2, 0.05**2, 0.0, 0.9**2]
    assert result["brier"] == pytest.approx(sum(squares) / 5)


@given(st.lists(st.tuples(st.floats(0.501, 1.0), st.booleans()), min_size=1, max_size=60))
def test_it_is_what_plain_numpy_says(pairs: list[tuple[float, bool]]) -> None:
    result = calibration(pairs)
    sure = np.array([c for c, _ in pairs])
    right = np.array([r for _, r in pairs], dtype=float)
    place = np.minimum(np.floor((sure - 0.5) * 20 + 1e-9), 9)
    error = sum(
        (place == b).mean() * abs(right[place == b].mean() - sure[place == b].mean())
        for b in range(10)
        if (place == b).any()
    )
    assert result["ece"] == pytest.approx(error)
    assert result["brier"] == pytest.approx(((sure - right) ** 2).mean())
    assert sum(b["n"] for b in result["bins"]) == len(pairs)


def test_no_verdicts_have_no_table() -> None:
    assert calibration([]) is None


def test_confidence_is_the_preferred_responses_share_of_the_scores(tmp_path: Path) -> None:
    comparison = Comparison("c", "x", "y")
    sure = aggregate([((0.6, 0.2), (0.2, 0.6))])  # a: 0.6, b: 0.2
    broken = aggregate([((math.nan, 0.2), (0.2, 0.6))])
    lines = [
        judged_line(comparison, sure, "a"),
        judged_line(comparison, sure.swapped(), "a"),
        judged_line(comparison, broken, "a"),
    ]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    (tmp_path / JUDGED).write_text(text)
    (judge,) = collect([tmp_path]).judges
    (only,) = [b for b in judge["calibration"]["bins"] if b["n"]]
    assert (only["n"], only["accuracy"]["value"]) == (2, 0.5)
    assert only["confidence"] == pytest.approx(0.75)
    assert judge["undecidable"] == pytest.approx(1 / 3)


def test_where_principles_outvote_the_mean_confidence_is_still_the_preferred_responses() -> None:
    outvoted = preferring_a(0.51, 0.51, 0.05)
    assert outvoted.preferred == "a"
    tally = JudgeTally(("x", "y", "z"))
    tally.add(JudgedPair("a", outvoted, None, (1, 1)))
    report = tally.report()
    assert report["accuracy"]["value"] == 1.0
    p = (0.51 + 0.51 + 0.05) / 3
    assert report["calibration"]["bins"][0]["confidence"] == pytest.approx(p)
    assert report["calibration"]["bins"][0]["accuracy"]["value"] == 1.0
    assert report["calibration"]["ece"] == pytest.approx(1 - p)  # .643
    assert report["calibration"]["brier"] == pytest.approx((1 - p) ** 2)  # .414

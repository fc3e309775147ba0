"""The studies: every arm runs in a small world, continues, and is read with honest intervals."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT

sys.path.append(str(ROOT / "studies"))  # the studies are scripts, not a package

import evidence
import rewards
import study
from self_judge import Comparison, PairwiseReward
from study import Study, interval, lines, run
from value_judges import value_judge
from world import World, code_hash


def counted(made: list[tuple[int, str]]) -> Study:
    def arm(name: str) -> Any:
        def of(world: int) -> dict[str, Any]:
            made.append((world, name))
            return {"gold": [world / 10, 0.5]}

        return of

    return Study("counted", "Does it count?", {"one": arm("one"), "two": arm("two")})


def test_arms_that_have_a_line_are_not_run_again(tmp_path: Path) -> None:
    made: list[tuple[int, str]] = []
    path = tmp_path / "counted.jsonl"
    run(counted(made), int, [0, 1], version="v", results=path)
    run(counted(made), int, [0, 1, 2], version="v", results=path)
    assert made == [(0, "one"), (0, "two"), (1, "one"), (1, "two"), (2, "one"), (2, "two")]
    assert [(x["seed"], x["arm"]) for x in lines(path)] == made
    manifest = [json.loads(x) for x in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [m["lines"] for m in manifest] == [4, 2]
    assert manifest[0]["versions"]["torch"]


def test_the_first_line_of_another_world_replaces_those_of_the_former(tmp_path: Path) -> None:
    made: list[tuple[int, str]] = []
    path = tmp_path / "counted.jsonl"
    run(counted(made), int, [0, 1], version="old", results=path)
    run(counted(made), int, [0], version="new", results=path)
    assert made[4:] == [(0, "one"), (0, "two")]
    assert [(x["world"], x["seed"], x["arm"]) for x in lines(path)] == [
        ("new", 0, "one"), ("new", 0, "two")
    ]  # fmt: skip


def test_a_comment_makes_no_new_world(tmp_path: Path) -> None:
    def hash_of(name: str, code: str) -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        spec: Any = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return code_hash(module, said="settings")

    assert hash_of("one", "# old\nx = 1\n") == hash_of("two", "x = 1\n    # new\n")
    assert hash_of("three", "x = 2\n") != hash_of("four", "x = 1\n")


def test_a_line_that_a_kill_cut_off_is_computed_again(tmp_path: Path) -> None:
    made: list[tuple[int, str]] = []
    path = tmp_path / "counted.jsonl"
    run(counted(made), int, [0], version="v", results=path)
    path.write_text(path.read_text()[:-9])
    run(counted(made), int, [0], version="v", results=path)
    assert made == [(0, "one"), (0, "two"), (0, "two")]
    assert [x["arm"] for x in lines(path)] == ["one", "two"]


def test_the_interval_covers_the_spread_of_seeds_and_not_only_of_prompts() -> None:
    """Five seeds with means 0.3 to 0.7: prompts alone would give an interval of ±0.02."""
    values = [np.full(1000, m) for m in (0.3, 0.4, 0.5, 0.6, 0.7)]
    mean, low, high = interval([own.tolist() for own in values])
    assert mean == pytest.approx(0.5)
    assert high - low > 0.2
    same = [np.random.default_rng(s).random(1000).tolist() for s in range(5)]
    mean, low, high = interval(same)
    assert 0.4 < low < mean < high < 0.6
    assert high - low < 0.06


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """The truth is 0, and seeds and prompts vary. With five seeds, a bootstrap is narrow."""
    generator, inside = np.random.default_rng(0), 0
    resamples = 60
    for _ in range(resamples):
        effects = generator.normal(0, 0.1, 5)
        values = [generator.normal(effect, 0.3, 50).tolist() for effect in effects]
        _, low, high = interval(values)
        inside += low <= 0 <= high
    assert inside / resamples > 0.8


def ranked(numbers: list[int]) -> dict[str, Any]:
    """What the schemes reach with one group of responses, whose numbers are their gold scores."""
    judge, texts = value_judge(), [str(n) for n in numbers]
    pairs = [Comparison("Q?", a, b) for a in texts for b in texts]
    verdicts = dict(zip(((c.context, c.response_a, c.response_b) for c in pairs),
                        judge.compare(pairs), strict=True))  # fmt: skip
    return rewards.ranking(["Q?"], [texts], [list(map(float, numbers))], judge, verdicts)


def test_schemes_are_measured_with_the_rewards_and_matches_of_the_product() -> None:
    numbers = [3, 9, 4, 20, 6, 1, 7, 15]
    found = ranked(numbers)["schemes"]
    matches = {scheme: own["matches"] for scheme, own in found.items()}
    assert matches == {"all_pairs": [28], "knockout": [7], "swiss": [12], "bradley_terry": [12]}
    for scheme, own in found.items():
        given = PairwiseReward(value_judge(), scheme)(["Q?"] * 8, [str(n) for n in numbers])
        assert own["right"]["own"] == [round(rewards.pairs_right(given, numbers), 4)]
        assert own["best"]["own"] == [1.0]
        assert own["shared"][0] < own["tokens"][0]
    assert found["all_pairs"]["right"]["own"] == [1.0]
    assert ranked([5, 5, 5])["chance"] == []  # nothing to rank


def test_equal_tokens_buy_draws_of_a_cheap_scheme_and_a_part_of_an_expensive_one() -> None:
    found = [ranked(random.Random(i).sample(range(100), 8))["schemes"] for i in range(8)]

    def right(scheme: str, budget: str) -> float:
        return float(np.mean([x[scheme]["right"][budget] for x in found]))

    assert right("knockout", "swiss") > right("knockout", "own") == right("knockout", "knockout")
    assert right("all_pairs", "knockout") < right("all_pairs", "swiss") < 1


def test_a_match_beyond_the_budget_is_not_played_and_a_known_one_is_free() -> None:
    judge = value_judge()
    free = rewards.Matches(judge)
    first, second = Comparison("Q?", "1", "2"), Comparison("Q?", "3", "4")
    assert free.play(first)
    matches = rewards.Matches(judge, budget=free.shared)
    assert matches.play(first)
    assert not matches.play(second)
    assert matches.play(first.swapped())
    assert (matches.shared, matches.tokens) == (free.shared, free.tokens)


def test_rewards_that_tie_count_half() -> None:
    assert rewards.pairs_right([0.5, 0.5, 1], [1, 2, 3]) == pytest.approx(2.5 / 3)
    assert rewards.best_found([1, 1, 0], [3, 2, 1]) == 0.5


def test_the_page_shows_each_scheme_with_its_cost() -> None:
    line = {"ranking": {"8": ranked([3, 9, 4, 20, 6, 1, 7, 15])}}
    (table,) = evidence.ranking([line, line])
    shown = [row.split(" | ") for row in table.splitlines() if row.startswith("| 8")]
    assert [row[1] for row in shown] == ["chance", *rewards.SCHEMES]
    assert {row[2] for row in shown[1:]} == {"28.0", "7.0", "12.0"}
    assert len({len(row) for row in shown}) == 1
    assert evidence.ranking([]) == []


@pytest.mark.parametrize(("current", "marked"), [("5f", 0), ("another", 1)])
def test_the_page_marks_figures_of_a_former_world(
    current: str, marked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "PAGE", tmp_path / "evidence.md")
    monkeypatch.setattr(World, "version", staticmethod(lambda: current))
    monkeypatch.setattr(evidence.plots, "draw", lambda *arguments: None)
    own = {"world": "5f", "seed": 1, "arm": "JSFT", "gold": [0.5, 0.7], "seconds": 1.0}
    (tmp_path / "judges.jsonl").write_text(json.dumps(own) + "\n")
    evidence.write([Study("judges", "Who?", {})])
    page = evidence.PAGE.read_text()
    assert page.count("a former version of") == marked
    assert "0.600" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_arms_of_all_studies_run_in_a_small_world(tmp_path: Path) -> None:
    def results() -> list[str]:
        return [path.read_text() for path in sorted(study.RESULTS.glob("*.jsonl"))]

    before = results()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "studies"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("demo", "learning", "judging", "self_rejection", "improvements", "judges", "real"):
        found = lines(tmp_path / f"{name}.jsonl")
        assert {line["seed"] for line in found} == {0, 1}
        if name == "self_rejection":
            measured = [x["ranking"]["4"] for x in found if x["arm"] == "reward schemes"]
            assert len(measured) == 2
            assert all(len(x["chance"]) > 4 for x in measured)
    assert results() == before  # a check of the arms is no result

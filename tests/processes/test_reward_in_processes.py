"""Pairwise rewards over two processes, and in TRL's GRPOTrainer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from reward_in_processes import PROMPTS, given
from test_processes import launched

from conftest import ROOT
from self_judge.judging.reward import Scheme

pytestmark = pytest.mark.cpu
SCHEMES: tuple[Scheme, ...] = ("all_pairs", "knockout", "swiss", "bradley_terry")


def result(out: Path, processes: int, **asked: Any) -> dict[str, Any]:
    script = ROOT / "tests" / "processes" / "reward_in_processes.py"
    file = "single" if processes == 1 else "ddp"
    done = launched(file, processes, str(script), json.dumps(asked), str(out))
    assert (out / "result.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "result.json").read_text())


def test_two_processes_give_the_rewards_of_one_and_judge_each_group_once(tmp_path: Path) -> None:
    one, two = given(SCHEMES), result(tmp_path, 2, schemes=SCHEMES)
    for scheme in SCHEMES:
        assert two["rewards"][scheme] == pytest.approx(one["rewards"][scheme], abs=1e-6)
    assert sum(two["judged"]) == sum(one["judged"])
    assert len(two["rewards"]["all_pairs"]) == len(PROMPTS)


@pytest.mark.parametrize(
    ("processes", "per_device", "rloo"),
    [
        pytest.param(1, 4, False, marks=pytest.mark.slow),
        pytest.param(1, 4, True, marks=pytest.mark.slow),
        (2, 3, False),
    ],
)
def test_trl_trains_and_evaluates_with_groups_that_a_batch_splits(
    tmp_path: Path, processes: int, per_device: int, rloo: bool
) -> None:
    done = result(tmp_path, processes, per_device=per_device, rloo=rloo)
    groups = 0
    for batch in done["seen"]:
        for _, members in itertools.groupby(batch, key=lambda row: row[0]):
            values = [value for _, value in members]
            if len(values) % 2 == 0:  # the last evaluation batch repeats rows to fill the processes
                assert sum(values) == pytest.approx(len(values) / 2)
                groups += 1
    assert groups >= 6
    logged = {key for line in done["log"] for key in line}
    assert {"rewards/watched/mean", "judge/undecidable", "eval_judge/undecidable"} <= logged

"""What a run leaves in its folder: lines that survive a crash, and as many files as are wanted."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import (
    METRICS,
    append_line,
    is_kept,
    rewind,
    rollout_file,
    rollout_files,
    thin_rollouts,
)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    append_line(path, {"step": 1, "loss": 0.5})
    append_line(path, {"step": 2, "loss": math.nan, "text": "\u2028 \ud800"})
    first, second = read_lines(path)
    assert first == {"step": 1, "loss": 0.5}
    assert second == {"step": 2, "loss": None, "text": "\u2028 \ud800"}


def test_a_line_torn_by_a_crash_is_left_out_and_one_in_the_middle_is_an_error(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_lines(path)) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        list(read_lines(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        list(read_lines(path))


def test_going_on_at_a_step_takes_back_what_was_written_after_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        append_line(tmp_path / METRICS, {"step": step})
        rollout_file(tmp_path, step).parent.mkdir(exist_ok=True)
        rollout_file(tmp_path, step).write_text(json.dumps({"step": step}) + "\n")
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "torn')
    rewind(tmp_path, 2)
    append_line(tmp_path / METRICS, {"step": 3})
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2, 3]
    assert [step for step, _ in rollout_files(tmp_path)] == [1, 2]
    rewind(tmp_path, 0)
    assert list(read_lines(tmp_path / METRICS)) == []
    assert rollout_files(tmp_path) == []


@given(st.integers(1, 3000), st.integers(1, 40))
def test_the_steps_kept_are_few_evenly_spread_and_never_come_back(last: int, most: int) -> None:
    kept = [step for step in range(1, last + 1) if is_kept(step, last, most)]
    assert kept[0] == 1
    assert kept[-1] == last
    assert len(kept) <= most + 1
    assert len(kept) >= min(last, (most + 1) // 2)
    assert len({b - a for a, b in itertools.pairwise(kept[:-1])}) <= 1
    # What is wanted at the next step is still there.
    assert {s for s in range(1, last + 1) if is_kept(s, last + 1, most)} <= set(kept)


def test_thinning_leaves_the_files_that_are_kept(tmp_path: Path) -> None:
    for last in range(1, 101):
        path = rollout_file(tmp_path, last)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
        thin_rollouts(tmp_path, last, 10)
    assert [s for s, _ in rollout_files(tmp_path)] == [1, 17, 33, 49, 65, 81, 97, 100]
    thin_rollouts(tmp_path, 100, None)
    assert len(rollout_files(tmp_path)) == 8

"""Broken files of every kind: each command ends with success or with one line, and never hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fuzz
from self_judge.cli import main


def test_no_broken_file_gives_a_traceback_or_a_hang() -> None:
    counts, failures = fuzz.run(cases=45, seed=0)
    assert not failures, "\n".join(failures)
    assert counts.total() == 45


@pytest.mark.parametrize("key", ["token_id_a", "token_id_b", "principles", "chat_template_kwargs"])
@pytest.mark.parametrize("value", [float("inf"), [], "x", 1])
def test_a_judge_file_with_a_wrong_value_is_named_in_one_line(
    key: str, value: object, saved_judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved_judge / "judge.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    given = saved_judge / "in.jsonl"
    given.write_text(json.dumps(fuzz.PAIR))
    status = main(["judge", str(given), str(saved_judge / "out"), "--model", str(saved_judge)])
    last = (capsys.readouterr().err.splitlines() or [""])[-1]
    assert status == 0 or last.startswith("self-judge: error: "), last


@pytest.mark.parametrize(
    "text", ["[" * 5000, "? &a [*a", "{a: " * 3000, "? ? ? ?", "%YAML 9", "*x"]
)
def test_a_run_file_that_breaks_the_parser_is_named_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["check", str(file)]) == 2
    assert f"self-judge: error: {file}" in capsys.readouterr().err.splitlines()[-1]

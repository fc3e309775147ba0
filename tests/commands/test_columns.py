"""Every command reads data by its own column names, and names the columns that it does not use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from run_overrides import given, one_step
from self_judge.cli import main

JSFT = str(ROOT / "configs" / "hh_jsft.yaml")
TRAIN = str(ROOT / "configs" / "hh_self_judge.yaml")
ROW = {"the question": "what is it?", "good": "the capital", "bad": "no", "aside": "unread"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without(line: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def rows(n: int = 3) -> list[dict[str, Any]]:
    return [{**ROW, "the question": f"what is {i}?", "bad": f"no {i}"} for i in range(n)]


def test_judge_reads_mapped_columns_and_resumes_with_them(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write(tmp_path / "in.jsonl", *rows()), tmp_path / "out.jsonl"
    usual = [{"prompt": r["the question"], "response_a": r["good"], "response_b": r["bad"]}
             for r in rows()]  # fmt: skip
    plain = tmp_path / "plain.jsonl"
    model = ["--model", str(saved_judge)]
    assert main(["judge", write(tmp_path / "usual.jsonl", *usual), str(plain), *model]) == 0
    assert "unused" not in capsys.readouterr().err
    command = ["judge", source, str(target), *model, "--columns", "prompt=the question",
               "response_a=good", "response_b=bad"]  # fmt: skip
    assert main(command) == 0
    assert capsys.readouterr().err.count("in.jsonl: unused columns with text: aside") == 1
    assert [without(line, "aside") for line in lines(target)] == lines(plain)
    before = target.stat().st_mtime_ns
    assert main(command) == 0
    assert target.stat().st_mtime_ns == before


def test_tournament_reads_mapped_columns(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"ask": r["the question"], "all": [r["good"], r["bad"]], "of": "me"} for r in rows()]
    source, target = write(tmp_path / "in.jsonl", *given), tmp_path / "out.jsonl"
    command = ["tournament", source, str(target), "--model", str(saved_judge)]
    assert main([*command, "--columns", "prompt=ask", "responses=all"]) == 0
    assert "in.jsonl: unused columns with text: of" in capsys.readouterr().err
    for line, row in zip(lines(target), given, strict=True):
        assert (line["prompt"], line["responses"]) == (row["ask"], row["all"])
        assert line["response"] == row["all"][line["winner"]]


def test_columns_that_others_stand_in_for_are_named(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"response_a": "the capital", "response_b": "no", "responses": ["x", "y"]}
    source = write(tmp_path / "in.jsonl", {"prompt": "asked", "context": "seen", **pair})
    model = ["--model", str(saved_judge)]
    assert main(["judge", source, str(tmp_path / "out.jsonl"), *model]) == 0
    said = capsys.readouterr().err
    assert "in.jsonl: unused columns with text: prompt, response_a, response_b\n" in said


def test_a_tournament_names_the_columns_that_it_replaces_and_keeps_no_old_bracket(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"response": "old", "winner": 5, "bracket": [["old"]], "unanswered": [0]}
    row = {"prompt": "what?", "responses": ["the capital", "no"], "note": "kept", **old}
    source, target = write(tmp_path / "in.jsonl", row, row), tmp_path / "out.jsonl"
    command = ["tournament", source, str(target), "--model", str(saved_judge)]
    for _ in range(2):
        assert main(command) == 0
        said = capsys.readouterr().err
        names = "bracket, response, unanswered, winner"
        assert said.count(f"in.jsonl, line 1: the output has new values in {names}") == 1
        assert "in.jsonl: unused columns with text: note\n" in said
    for line in lines(target):
        assert line["response"] == line["responses"][line["winner"]]
        assert line.keys() == {"prompt", "responses", "note", "response", "winner"}


def test_compare_reads_mapped_prompts_and_responses(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", *[without(row, "good", "bad") for row in rows()])
    a = write(tmp_path / "a.jsonl", *[{"reply": row["good"], "note": "n"} for row in rows()])
    b = write(tmp_path / "b.jsonl", *[{"output": row["bad"]} for row in rows()])
    output = tmp_path / "out"
    command = ["compare", a, b, "--prompts", prompts, "--judge", str(saved_judge),
               "--output", str(output), "--columns", "prompt=the question"]  # fmt: skip
    assert main(command) == 2
    assert "a.jsonl, line 1, field 'response': is missing" in capsys.readouterr().err
    assert main([*command, "response=reply"]) == 0
    said = capsys.readouterr().out
    assert "p.jsonl: unused columns with text: aside" in said
    assert "a.jsonl: unused columns with text: note" in said
    write(tmp_path / "b.jsonl", *[{"output": row["bad"]} for row in rows(4)])
    assert main([*command, "response=reply", "--overwrite"]) == 2
    assert "b.jsonl, line 4, field 'response': more than 3 responses" in capsys.readouterr().err
    pairs = lines(output / "pairs.jsonl")
    assert [(p["response_a"], p["response_b"]) for p in pairs] == [
        (row["good"], row["bad"]) for row in rows()
    ]
    assert pairs[1]["prompt"] == [{"role": "user", "content": "what is 1?"}]


def test_eval_reads_mapped_columns_and_labels(saved_judge: Path, tmp_path: Path) -> None:
    labeled = [{**row, "better": who} for row, who in zip(rows(), (1, 2, 0), strict=True)]
    source = write(tmp_path / "x.jsonl", *labeled)
    model, output = ["--model", str(saved_judge), "--output"], tmp_path / "out"
    mapped = ["--columns", "prompt=the question", "response_a=good", "response_b=bad"]
    labels = ["label=better", "label.a=1", "label.b=2", "label.tie=0"]
    assert main(["eval", source, *model, str(output), *mapped, *labels]) == 0
    assert [line["label"] for line in lines(output / "verdicts.jsonl")] == ["a", "b", "tie"]
    pairs = ["--columns", "prompt=the question", "chosen=good", "rejected=bad"]
    assert main(["eval", source, *model, str(tmp_path / "pairs"), *pairs]) == 0
    told = json.loads((tmp_path / "pairs" / "results.json").read_text())
    assert told["overall"]["pairs"] == 3
    assert told["skipped"] == {"column 'aside'": 3}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt"], "columns: expected name=column, got 'prompt'"),
        (["prompt="], "columns: expected name=column, got 'prompt='"),
        (["prompt=a", "prompt=b"], "columns: 'prompt' is given twice"),
        (
            ["prompt=the question", "response_a=good", "response_b=good"],
            "in.jsonl: columns: 'good' is given for two names",
        ),
        (["respons_a=a"], "columns.respons_a: unknown; did you mean response_a?"),
        (["prompt=nothing"], "in.jsonl, line 1, field 'nothing': is missing (columns.prompt)"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused_in_one_line(
    columns: Sequence[str],
    message: str,
    saved_judge: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(tmp_path / "in.jsonl", *rows())
    command = ["judge", source, str(tmp_path / "out.jsonl"), "--model", str(saved_judge)]
    assert main([*command, "--columns", *columns]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out.jsonl").exists()


# --- runs -----------------------------------------------------------------------------------------


def small(folder: Path, section: str) -> list[str]:
    """Overrides for one step on little data, with the shipped `held_out`."""
    return one_step(folder, section, "training_args.eval_strategy=steps", "dataset.held_out=0.1")


MAPPED = [
    f"dataset.sources.0.columns.{name}={column}"
    for name, column in (("prompt", "the question"), ("chosen", "good"), ("rejected", "bad"))
]


def test_check_and_jsft_read_mapped_columns_and_train_on_data_too_little_to_hold_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(write(tmp_path / "x.jsonl", *rows(3)))
    own = given(base, source, *MAPPED, *small(tmp_path / "run", "jsft_args"))
    assert main(["check", JSFT, *own, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (counts,) = report["sources"].values()
    assert (counts["pairs"], counts["unused column: aside"]) == (3, 3)
    (finding,) = [f for f in report["findings"] if f["about"] == "dataset.held_out"]
    assert finding["level"] == "warning"
    assert main(["jsft", JSFT, *own]) == 0
    said = capsys.readouterr().err
    assert "unused column: aside" in said
    assert "warning: dataset.held_out 0.1 holds out no usable record" in said
    assert (tmp_path / "run" / "judge.json").is_file()


def test_self_training_evaluates_nothing_if_no_pair_is_held_out(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = [{**row, "bad": row["good"]} for row in rows(40)]  # demonstrations, but no pairs
    source = Path(write(tmp_path / "x.jsonl", *tied))
    own = given(saved_judge, source, *MAPPED, *small(tmp_path / "run", "self_judge_args"))
    own += ["self_judge_args.max_new_tokens=4", "self_judge_args.max_length=256"]
    assert main(["train", TRAIN, *own]) == 0
    assert "warning: dataset.held_out 0.1 holds out no usable record" in capsys.readouterr().err


def test_a_run_whose_prompts_are_all_held_out_names_held_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(write(tmp_path / "x.jsonl", *rows(3)))
    own = given(base, source, *MAPPED, f"training_args.output_dir={tmp_path / 'run'}")
    assert main(["jsft", JSFT, *own, "dataset.held_out=0.999999"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "all 3 usable records are held out (held_out 0.999999)" in line
    assert "set held_out to 0" in line


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("promt=prompt", "promt: unknown; did you mean prompt?"),
        ("the_question=prompt", "the_question=prompt is the wrong way round: write prompt=the_qu"),
        ("prompt=q,chosen=c,rejected=r", "separate the columns with spaces: 'prompt=q,chosen=c"),
    ],
)
def test_columns_that_are_written_in_another_way_are_told_the_right_one(
    columns: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *rows())
    model = ["--model", "no/model", "--columns", columns]
    assert main(["judge", source, str(tmp_path / "out.jsonl"), *model]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"self-judge: error: columns: {told}")

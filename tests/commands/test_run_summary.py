"""A run ends with what it came to: last metrics, judge accuracy, conclusions, the next command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from run_overrides import given, one_step
from self_judge.cli import main
from self_judge.commands import run_summary
from self_judge.data import synthetic
from self_judge.storage.jsonl import read_lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    return synthetic.write_dataset("preference", folder / "pairs.jsonl", 60, seed=5)


@pytest.fixture(autouse=True)
def short_runs_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short test runs may spend most of their time on a few pairs."""
    monkeypatch.setattr(run_summary, "MIN_PAIRS", 3)
    monkeypatch.setattr(run_summary, "SHARE", 100.0)


def run(command: str, model: Path, source: Path, output: Path, *more: str) -> dict[str, Any]:
    section = {"jsft": "jsft_args", "train": "self_judge_args"}[command]
    name = {"jsft": "hh_jsft", "train": "hh_self_judge"}[command]
    overrides = [*given(model, source), *one_step(output, section), "training_args.max_steps=3"]
    overrides += ["training_args.logging_steps=2", "training_args.eval_strategy=no", *more]
    if command == "train":
        overrides.append("self_judge_args.max_new_tokens=4")
    assert main([command, str(ROOT / "configs" / f"{name}.yaml"), *overrides]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def test_jsft_ends_with_the_judge_before_and_after_and_the_next_command(
    base: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "jsft"
    summary = run("jsft", base, source, output)
    said = capsys.readouterr().err
    assert summary["steps"] == summary["metrics"]["step"] == 3
    assert [line["step"] for line in read_lines(output / "metrics.jsonl")][-2] == 3  # logged
    before, after = summary["judge"]["before"], summary["judge"]["after"]
    assert before["pairs"] == after["pairs"] >= 3
    assert before["letter_mass"] != after["letter_mass"]
    assert summary["conclusions"][0]["level"] == "red"  # three steps teach nothing
    for conclusion in summary["conclusions"]:
        assert conclusion["text"] in said
    assert f"next: self-judge train CONFIG model.model_name_or_path={output}\n" in said
    assert summary["tokens_per_second"] > 0
    card = (output / "README.md").read_text()
    assert f"before training: {before['accuracy']['value']:.1%} (95% interval" in card
    assert f"after training: {after['accuracy']['value']:.1%} (95% interval" in card


def test_measuring_the_judge_does_not_change_the_model(
    base: Path, source: Path, tmp_path: Path
) -> None:
    measured, alone = tmp_path / "measured", tmp_path / "alone"
    dropout = "peft_config.lora_dropout=0.2"
    assert run("jsft", base, source, measured, dropout)["judge"] is not None
    unmeasured = run("jsft", base, source, alone, dropout, "jsft_args.judge_accuracy=false")
    assert unmeasured["judge"] is None
    assert (measured / "model.safetensors").read_bytes() == (
        alone / "model.safetensors"
    ).read_bytes()


def test_a_resumed_run_keeps_the_accuracy_from_before_its_first_step(
    base: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ("training_args.save_steps=1", "training_args.learning_rate=0.01")
    whole = run("jsft", base, source, tmp_path / "whole", *saving)
    parts = tmp_path / "parts"
    run("jsft", base, source, parts, *saving, "training_args.max_steps=2")
    capsys.readouterr()
    resumed = run("jsft", base, source, parts, *saving)
    assert "\n3 steps; this call took 0:00:0" in capsys.readouterr().err
    assert resumed["judge"]["before"] == whole["judge"]["before"]
    assert resumed["judge"]["before"] != resumed["judge"]["after"]


def test_a_finished_run_that_is_started_again_has_no_pace(
    saved_judge: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ("training_args.save_steps=1", "training_args.resume_from_checkpoint=true")
    assert run("train", saved_judge, source, tmp_path / "run", *saving)["tokens_per_second"] > 0
    again = run("train", saved_judge, source, tmp_path / "run", *saving)
    assert (again["steps"], again["tokens_per_second"]) == (3, None)
    assert "\n3 steps; this call took 0:00:0" in capsys.readouterr().err


def test_self_training_measures_its_judge_on_request(
    saved_judge: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "policy"
    assert run("train", saved_judge, source, output)["judge"] is None
    asked = run(
        "train", saved_judge, source, tmp_path / "asked", "self_judge_args.judge_accuracy=true"
    )
    assert asked["judge"]["after"]["pairs"] >= 3
    said = capsys.readouterr().err
    assert f"next: self-judge compare {output} {saved_judge} --judge {saved_judge}" in said
    assert "few prompts" in {c["rule"] for c in asked["conclusions"]}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("dataset.held_out=0", "nothing is held out: set dataset.held_out or dataset.eval"),
        ("dataset.max_eval_records=2", "it needs 3 held-out pairs, and there are 2: raise dataset"),
    ],
)
def test_a_run_says_why_the_judge_is_not_measured(
    override: str,
    reason: str,
    base: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("jsft", base, source, tmp_path / "jsft", override)["judge"] is None
    assert f"judge accuracy is not measured: {reason}" in capsys.readouterr().err

"""The demo, made small: every phase runs and the summary has the promised form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from self_judge.commands.demo import DemoSettings, run_demo
from self_judge.prompting.judge_json import load_judge_settings

TINY = DemoSettings(
    jsft_records=60,
    prompts_per_step=4,
    steps=2,
    max_new_tokens=6,
    held_out_pairs=6,
    held_out_prompts=5,
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(3, folder, TINY, Console(quiet=True))
    return folder


def test_the_summary_has_the_promised_form(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == {"seed", "seconds", "judge", "gold", "win_rate_vs_jsft"}
    assert summary["seed"] == 3
    assert set(summary["judge"]) == {"accuracy", "order_agreement", "n"}
    assert summary["judge"]["n"] == 6
    gold = summary["gold"]
    assert set(gold) == {"jsft", "self_judge", "self_judge_rejection"}
    assert set(gold["self_judge_rejection"]) == {"1", "4", "16"}
    means = [gold["jsft"], gold["self_judge"], *gold["self_judge_rejection"].values()]
    for entry in means:
        low, high = entry["ci95"]
        assert 0 <= low <= entry["mean"] <= high <= 1
    assert gold["self_judge_rejection"]["1"] == gold["self_judge"]
    assert 0 <= summary["win_rate_vs_jsft"]["value"] <= 1


def test_both_models_are_kept_with_what_they_judge_by(output: Path) -> None:
    for name in ("jsft", "self_judge"):
        assert (output / name / "model.safetensors").is_file()
        assert load_judge_settings(output / name) is not None
    assert len(list((output / "self_judge" / "rollouts").iterdir())) == 2
    assert not list(output.glob("*.part"))


def test_the_same_seed_gives_the_same_numbers(output: Path, tmp_path: Path) -> None:
    again = run_demo(3, tmp_path, TINY, Console(quiet=True))
    first = json.loads((output / "summary.json").read_text())
    for summary in (first, again):
        summary.pop("seconds")
    assert first == json.loads(json.dumps(again))

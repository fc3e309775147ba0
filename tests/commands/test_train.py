"""Every shipped run file starts on the synthetic world, and what it saved is used."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from conftest import ROOT
from run_overrides import given as given_model
from run_overrides import one_step
from self_judge import Judge
from self_judge.cli import main, train_main
from self_judge.commands.train import run_jsft, run_self_judge
from self_judge.config.schema import load_run
from self_judge.data import synthetic
from self_judge.datatypes import Comparison
from self_judge.evaluation.statistics import evaluate_judge
from self_judge.models import load_model
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.training.setup import load_data

KIND_OF = {"hh": "hh", "uf": "ultrafeedback", "uf_pr": "ultrafeedback"}


def small(section: str, output: Path, model: Path, source: Path) -> list[str]:
    """Overrides that make a shipped run file small, and offline."""
    return [
        *given_model(model, source),
        *one_step(output, section),
        "training_args.per_device_eval_batch_size=4",
        "training_args.eval_strategy=steps",
        "training_args.eval_steps=1",
        "training_args.save_strategy=steps",
        "training_args.save_steps=1",
        f"{section}.global_batch_size=4",
        "dataset.max_eval_records=4",
    ]


@pytest.mark.parametrize("name", ["hh", "uf", "uf_pr"])
def test_the_first_step_of_every_shipped_run_file_runs(
    name: str, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    stem, suffix = name.removesuffix("_pr"), "_pr" if name.endswith("_pr") else ""
    source = data[KIND_OF[name]]
    jsft = load_run(
        ROOT / "configs" / f"{stem}_jsft{suffix}.yaml",
        small("jsft_args", tmp_path / "jsft", base, source),
        "jsft",
    )
    model = run_jsft(jsft)
    settings = load_judge_settings(model)
    assert settings is not None
    assert settings.templates.has_rationales == (name == "uf_pr")
    assert load_judge_settings(model / "checkpoint-1") is not None
    assert any(json.loads((model / "data.json").read_text()).values())
    assert not (model / "adapter_config.json").exists()  # full, or merged
    # It judges as it was taught: with what lies beside it.
    (verdict,) = Judge.from_pretrained(model).compare([Comparison("Hello?", "Hi!", "No.")])
    assert len(verdict.probabilities) == len(settings.templates)

    train = load_run(
        ROOT / "configs" / f"{stem}_self_judge{suffix}.yaml",
        [
            *small("self_judge_args", tmp_path / "policy", model, source),
            "self_judge_args.max_new_tokens=8",
        ],
        "self_judge",
    )
    policy = run_self_judge(train)
    assert (policy / "adapter_model.safetensors").is_file()
    assert (policy / "judge.json").is_file()
    assert (policy / "rollouts" / "step-000001.jsonl").is_file()
    loaded = load_model(policy)
    assert not isinstance(loaded, PeftModel)


def test_a_run_prints_no_warning_that_its_user_cannot_act_on(
    saved_judge: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    given = small("self_judge_args", tmp_path / "run", saved_judge, data["hh"])
    given += ["self_judge_args.max_length=500", "self_judge_args.max_new_tokens=4"]
    config = str(ROOT / "configs" / "hh_self_judge.yaml")  # with gradient checkpointing and LoRA
    run = subprocess.run(
        [sys.executable, "-m", "self_judge", "train", config, *given],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr


@pytest.mark.parametrize("name", ["outputs/hh_jsft", "mine", "runs/of/jsft", "./jsft", "/no/jsft"])
def test_self_training_before_jsft_says_which_command_comes_first(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "hh_self_judge.yaml")
    given = small("self_judge_args", tmp_path / "run", Path("x"), Path("x"))
    assert main(["train", config, *given, f"model.model_name_or_path={name}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"{name}(: there is no such folder| is not a folder here)", said), said
    assert "run JSFT first (self-judge jsft CONFIG)" in said


@pytest.mark.parametrize(
    ("changed", "sides"),
    [
        ([], ("training data:", "held-out data:")),
        (["dataset.held_out=0"], ("training data:",)),
        (["dataset.eval=[{path: {data}}]"], ("training data:", "evaluation data:")),
    ],
)
def test_counts_say_which_side_of_the_data_they_are_of(
    changed: list[str], sides: tuple[str, ...], base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = ROOT / "configs" / "hh_jsft.yaml"
    given = small("jsft_args", tmp_path / "jsft", base, data["hh"])
    more = [change.replace("{data}", str(data["hh"])) for change in changed]
    said: list[str] = []
    run: Any = load_run(config, [*given, *more], "jsft")
    load_data(run, said.append)
    titles = tuple(text.splitlines()[0] for text in said)
    assert titles == sides


def test_the_launch_scripts_and_the_command_do_the_same(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = str(ROOT / "configs" / "hh_jsft.yaml")
    weights = []
    for place, start in (
        ("script", lambda given: train_main("jsft", [f"--config={config}", *given])),
        ("command", lambda given: main(["jsft", config, *given])),
    ):
        output = tmp_path / place
        assert start(small("jsft_args", output, base, data["hh"])) == 0
        weights.append(load_model(output).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_jsft_adapter_can_be_gone_on_with_or_be_frozen_below_a_new_one(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = ROOT / "configs" / "hh_jsft.yaml"
    given = small("jsft_args", tmp_path / "jsft", base, data["hh"])
    adapter = run_jsft(load_run(config, [*given, "jsft_args.merge_adapter=false"], "jsft"))
    assert (adapter / "adapter_config.json").is_file()
    train = ROOT / "configs" / "hh_self_judge.yaml"
    for place, peft in (("on", ["peft_config=null"]), ("new", [])):
        overrides = [
            *small("self_judge_args", tmp_path / place, adapter, data["hh"]),
            "self_judge_args.max_new_tokens=4",
            *peft,
        ]
        policy = run_self_judge(load_run(train, overrides, "self_judge"))
        assert (policy / "adapter_config.json").is_file()


def test_any_trl_preference_data_will_do(base: Path, data: dict[str, Path], tmp_path: Path) -> None:
    zipped = tmp_path / "pairs.jsonl.gz"
    zipped.write_bytes(gzip.compress(data["preference"].read_bytes()))
    given = small("jsft_args", tmp_path / "out", base, zipped)
    run_jsft(load_run(ROOT / "configs" / "hh_jsft.yaml", given, "jsft"))


def test_a_run_goes_on_from_its_last_checkpoint(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    config = ROOT / "configs" / "hh_jsft.yaml"
    given = [
        *small("jsft_args", tmp_path / "jsft", base, data["hh"]),
        "training_args.resume_from_checkpoint=true",
    ]
    run_jsft(load_run(config, given, "jsft"))  # nothing to resume from yet
    run_jsft(load_run(config, [*given, "training_args.max_steps=2"], "jsft"))
    assert (tmp_path / "jsft" / "checkpoint-2").is_dir()


def test_a_judge_is_measured_on_the_labels_of_the_data(base: Path) -> None:
    judge = Judge(
        load_model(base), synthetic.tiny_tokenizer(), synthetic.judge_templates(), batch_size=32
    )
    records = synthetic.records(20, 5, "test")
    quality = evaluate_judge(judge, records)
    assert quality.accuracy.n == sum(len(r.pairs) for r in records)
    assert quality.accuracy.low < quality.accuracy.value < quality.accuracy.high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jsft", "missing.yaml"], "missing.yaml"),
        (["train", str(ROOT / "configs" / "hh_jsft.yaml")], "it has jsft_args"),
        (["jsft", str(ROOT / "configs" / "hh_jsft.yaml"), "jsft_args.max_lenght=5"], "max_length"),
        (
            [
                "train",
                str(ROOT / "configs" / "hh_self_judge.yaml"),
            ],
            "outputs/hh_jsft",
        ),
        (["tournament", "missing.jsonl", "out.jsonl", "--model", "nowhere"], "missing.jsonl"),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(
    arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("self-judge: error: ")
    assert message in error


@pytest.mark.parametrize("stage", ["jsft", pytest.param("self_judge", marks=pytest.mark.slow)])
def test_accelerate_launch_starts_both_scripts_with_the_shipped_files(
    stage: str, base: Path, saved_judge: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    model = base if stage == "jsft" else saved_judge
    more = [] if stage == "jsft" else ["self_judge_args.max_new_tokens=4"]
    command = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        f"--config_file=configs/{stage}_accelerate.yaml",
        f"train_{stage}.py",
        f"--config=configs/hh_{stage}.yaml",
        *small(f"{stage}_args", output, model, data["hh"]),
        *more,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_judge_settings(output) is not None

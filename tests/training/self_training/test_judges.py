"""Self-training with other judges: who judges, what stays the initial model's, and who is named."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bad_input import TRAIN, Place
from conftest import ROOT, TEMPLATES, Make, history, same, tiny_llama, weights
from fake_openai import FakeOpenAI, serving
from self_judge import ChatEncoder, Judge
from self_judge.cli import main
from self_judge.errors import CheckpointError
from self_judge.judging.panel import InitialModel, Panel
from self_judge.prompting.judge_json import load_judge_settings, save_judge_settings


@pytest.fixture
def other(tokenizer: Any) -> Judge:
    """A judge with other weights than the initial model."""
    return Judge(tiny_llama(len(tokenizer), seed=5), tokenizer, TEMPLATES)


@pytest.fixture
def folder(place: Place, tokenizer: Any, other: Judge) -> Path:
    """The other judge as the folder of a JSFT model."""
    path = place.folder / "other"
    other.model.save_pretrained(path)  # type: ignore[operator]
    tokenizer.save_pretrained(path)
    save_judge_settings(path, tokenizer, TEMPLATES, other.letter_ids)
    return path


@pytest.fixture
def endpoint(encoder: ChatEncoder, other: Judge) -> Iterator[FakeOpenAI]:
    model = tiny_llama(len(encoder.tokenizer), seed=7)
    bias = torch.zeros(len(encoder.tokenizer))
    bias[list(other.letter_ids)] = 6
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    with serving(FakeOpenAI(model, encoder)) as server:
        yield server


def rollouts(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# -- the trainer -----------------------------------------------------------------------------------


def test_another_judge_judges_and_the_reference_stays_the_initial_model(
    make: Make, model: Any, other: Judge, tmp_path: Path
) -> None:
    own = copy.deepcopy(model)
    usual = make(output_dir=str(tmp_path / "usual"), max_steps=1)
    judged = make(model=own, output_dir=str(tmp_path / "judged"), max_steps=1, judge=other)
    given = weights(judged.ref_model)
    for trainer in (usual, judged):
        trainer.train()
    assert judged.judge is other
    assert same(weights(judged.ref_model), given)
    assert same(weights(judged.ref_model), weights(usual.ref_model))
    # The same responses, and verdicts of the other judge about them
    mine, theirs = (rollouts(tmp_path / name) for name in ("usual", "judged"))
    pairs = [{r["chosen"], r["rejected"]} for r in mine]
    assert pairs == [{r["chosen"], r["rejected"]} for r in theirs]
    assert [r["probabilities"] for r in mine] != [r["probabilities"] for r in theirs]
    assert history(judged, "loss")[0] == pytest.approx(history(usual, "loss")[0], abs=1e-3)


def test_a_model_that_was_not_taught_to_judge_learns_from_another_judge(
    make: Make, other: Judge, tmp_path: Path
) -> None:
    trainer = make(judge=other, judge_templates=None, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    assert load_judge_settings(tmp_path / "policy") is None  # it does not judge
    written = json.loads((tmp_path / "policy" / "judge.json").read_text())
    assert written["judged_by"]["model"] == "LlamaForCausalLM"
    assert "`LlamaForCausalLM` judged" in (tmp_path / "policy" / "README.md").read_text()


def test_without_templates_only_another_judge_can_judge(make: Make, other: Judge) -> None:
    members: Any = {"initial": InitialModel(), "other": other}
    for judge in (None, InitialModel(8), Panel(members)):
        with pytest.raises(ValueError, match="pass judge_templates, or start from a model trained"):
            make(judge=judge, judge_templates=None)


def test_a_scorer_judges_under_the_templates_of_the_run(
    make: Make, model: Any, other: Judge
) -> None:
    trainer = make(model=copy.deepcopy(model), judge=other.scorer, max_steps=1)
    assert trainer.judge.scorer is other.scorer
    assert trainer.judge.principles == tuple(TEMPLATES)
    trainer.train()
    with pytest.raises(ValueError, match="pass judge_templates, or start from a model trained"):
        make(judge=other.scorer, judge_templates=None)
    with pytest.raises(TypeError, match="judge must be a Judge, a Panel or a LetterScorer"):
        make(judge="outputs/jsft")


def test_a_panel_logs_the_votes_of_each_member(make: Make, other: Judge, tmp_path: Path) -> None:
    panel = Panel({"initial": InitialModel(), "other": other, "again": other})
    trainer = make(judge=panel, max_steps=1)
    trainer.train()
    names = [f"{judge}/{p}" for judge in ("initial", "other", "again") for p in TEMPLATES]
    (line,) = [log for log in trainer.state.log_history if "judge/margin" in log]
    for name in names:
        assert 0 <= line[f"judge/win_rate/{name}"] <= 1
        assert 0 <= line[f"judge/order_agreement/{name}"] <= 1
    assert line["judge/win_rate/other/honest"] == line["judge/win_rate/again/honest"]
    (first, *_) = rollouts(tmp_path / "run")
    assert first["principles"] == names
    assert len(first["probabilities"] or names) == 6


def test_a_judge_that_thinks_logs_what_it_costs(make: Make) -> None:
    trainer = make(judge=InitialModel(thought_tokens=5), max_steps=1)
    trainer.train()
    # Two principles in both orders; equal responses are not judged
    (tokens,) = history(trainer, "judge/thought_tokens")
    assert 0 < tokens <= 2 * 2 * 5
    assert trainer.judge.thought_tokens == pytest.approx(8 / 2 * tokens * 1)


def test_a_run_does_not_resume_with_another_judge(make: Make, model: Any, other: Judge) -> None:
    def run(judge: Any, steps: int, **resume: Any) -> None:
        initial = copy.deepcopy(model)
        trainer = make(model=initial, judge=judge, max_steps=steps, save_strategy="steps",
                       save_steps=1)  # fmt: skip
        trainer.train(**resume)

    run(other, 1)
    run(other, 2, resume_from_checkpoint=True)
    for judge in (None, Panel({"initial": InitialModel(), "other": other})):
        with pytest.raises(CheckpointError, match=r"another judge judged before it \(model was"):
            run(judge, 3, resume_from_checkpoint=True)


# -- run files -------------------------------------------------------------------------------------


def test_a_run_file_names_the_judge_and_files_say_who_it_was(
    place: Place, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.run(f"self_judge_args.judge={{model: {folder}}}", config=TRAIN)
    assert main(["check", *words[1:], "--examples", "4"]) == 0, capsys.readouterr().out
    assert main(words) == 0, capsys.readouterr().err
    run = place.folder / "run"
    written = json.loads((run / "judge.json").read_text())
    assert written["judged_by"]["model"] == str(folder)
    assert written["judged_by"]["weights"]
    assert load_judge_settings(run) is not None  # the policy still judges as it was taught
    assert json.loads((run / "run.json").read_text())["judge"] == written["judged_by"]
    assert f"`{folder}` judged" in (run / "README.md").read_text()
    # The same weights in another folder are the same judge, and other weights are not.
    moved = shutil.copytree(folder, place.folder / "moved")
    again = [w for w in words if "max_steps" not in w]
    again += ["training_args.max_steps=2", "training_args.resume_from_checkpoint=true"]
    saves = ["training_args.save_steps=1"]
    assert main([*words, *saves]) == 0
    assert main([*again, *saves, f"self_judge_args.judge={{model: {moved}}}"]) == 0
    capsys.readouterr()
    third = [w for w in again if "max_steps" not in w] + ["training_args.max_steps=3"]
    assert main([*third, f"self_judge_args.judge={{model: {place.saved}}}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "another judge judged before it (weights was" in said


def test_an_endpoint_judges_a_run_and_its_key_is_nowhere(
    place: Place,
    endpoint: FakeOpenAI,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = f"self_judge_args.judge={{endpoint: '{endpoint.url}', api_key_env: ENTRANCE}}"
    words = place.run(judge, config=TRAIN)
    assert main(["check", *words[1:], "--examples", "4"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "the environment variable ENTRANCE has no key" in said
    assert main(words) == 2
    assert "ENTRANCE has no key" in capsys.readouterr().err
    secret = "a-word-that-only-the-endpoint-knows"
    monkeypatch.setenv("ENTRANCE", secret)
    assert main(words) == 0
    assert endpoint.headers[-1]["Authorization"] == f"Bearer {secret}"
    run = place.folder / "run"
    assert json.loads((run / "judge.json").read_text())["judged_by"]["endpoint"] == endpoint.url
    printed = capsys.readouterr()
    for text in (printed.out, printed.err, caplog.text, *texts(run)):
        assert secret not in text


def texts(folder: Path) -> list[str]:
    files = [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".md", ".txt")]
    return [path.read_text() for path in files]


MISTAKES = {
    "{model: no/such/folder/here}": "no/such/folder/here",
    "{endpoint: 'ftp://x'}": "is not the URL of a server",
    "{endpoint: 'http://127.0.0.1:9/v1', model: x, timeout: 1}": "http://127.0.0.1:9/v1",
    "{modle: x}": "self_judge_args.judge.modle: unknown; did you mean model?",
    "{panel: [{model: x}]}": "panel has one member",
    "{model: x, panel: [{}, {}]}": "name each judge in panel",
    "{server: 'http://x'}": "server needs model",
    "{model: x, api_key_env: X}": "only an endpoint gets a key",
    "{endpoint: 'http://x', api_key_env: sk-123-456}": "the name of an environment variable",
    "{thought_tokens: 0}": "thought_tokens must be at least 1",
}


@pytest.mark.parametrize(("judge", "said"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_in_the_judge_is_one_line(
    judge: str, said: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.run(f"self_judge_args.judge={judge}", config=TRAIN)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("self-judge: error")]
    assert said in line


KILLED = """
import signal, sys
sys.path[:0] = [{processes!r}]
from killable import arm
arm(signal.SIGKILL, "self_judge.training.self_training.trainer:keep_rollouts", {call}, "before")
from self_judge.cli import main
sys.exit(main({words!r}))
"""


def test_a_panel_of_three_resumes_after_a_kill_to_the_bit(
    place: Place, folder: Path, endpoint: FakeOpenAI
) -> None:
    panel = f"{{panel: [{{}}, {{model: {folder}}}, {{endpoint: '{endpoint.url}'}}]}}"
    words = place.run(f"self_judge_args.judge={panel}", config=TRAIN)
    words = [w for w in words if "max_steps" not in w and "output_dir" not in w]
    words += ["training_args.max_steps=4", "training_args.save_steps=1"]
    words += ["training_args.resume_from_checkpoint=true", "training_args.logging_steps=1"]

    def run(name: str, kill_at: int | None = None) -> int:
        own = [*words, f"training_args.output_dir={place.folder / name}"]
        call = 99 if kill_at is None else kill_at
        code = KILLED.format(processes=str(ROOT / "tests" / "processes"), call=call, words=own)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode in (0, -9), done.stderr[-2000:]
        return done.returncode

    assert run("whole") == 0
    assert run("cut", kill_at=3) == -9
    assert run("cut") == 0
    whole, cut = (place.folder / name for name in ("whole", "cut"))
    assert (whole / "adapter_model.safetensors").read_bytes() == (
        cut / "adapter_model.safetensors"
    ).read_bytes()
    assert rollouts(whole) == rollouts(cut)
    assert {r["step"] for r in rollouts(cut)} == {1, 2, 3, 4}
    assert len(rollouts(cut)[0]["principles"]) == 6

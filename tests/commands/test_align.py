"""`self-judge align` runs the whole method, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_init import table

from self_judge.cli import main
from self_judge.commands.align import run
from self_judge.commands.align.stages import stages
from self_judge.config.arguments import command_parser
from self_judge.storage.jsonl import read_lines

SMALL = (
    *("training_args.max_steps=3", "training_args.save_steps=1", "training_args.bf16=false"),
    *("training_args.learning_rate=0.01", "self_judge_args.max_new_tokens=4"),
)
STAGES = (*("JSFT", "judge evaluation", "self-training", "comparison", "self-rejection", "report"),)


@pytest.fixture(scope="module")
def words(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, with relative paths of the output."""
    data = table(tmp_path_factory.mktemp("data") / "my.csv", ("question", "good", "bad"))
    return ["align", "--model", str(base), "--data", str(data), "--output", "my", *SMALL]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were started, in this process, where they start at once."""
    names: list[str] = []

    def start(runner: run.Runner, words: list[str]) -> int:
        names.append(words[0])
        return main(words)

    monkeypatch.setattr(run.Runner, "start", start)
    return names


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished call."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("whole")
        patch.chdir(folder)
        patch.setattr(run.Runner, "start", lambda runner, words: main(words))
        assert main(words) == 0
        yield folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished call, in the working folder."""
    shutil.copytree(whole / "my", tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my"


def left(folder: Path) -> dict[str, bytes]:
    """The models, the verdicts and the tournaments of a call."""
    names = ("jsft/*.safetensors", "policy/*.safetensors", "*.jsonl", "*/*.jsonl", "*/*/*.jsonl")
    files = [f for name in names for f in folder.glob(name) if f.name != "metrics.jsonl"]
    assert len(files) > 10
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_a_second_call_skips_what_is_complete_and_prints_what_came_out(
    words: list[str], copied: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(copied)
    assert main(words) == 0
    assert started == []
    assert left(copied) == before
    said = capsys.readouterr()
    for number, title in enumerate(STAGES, start=1):
        assert f"{number}/6 {title}: complete in my" in said.err
    results = json.loads((copied / "compared/results.json").read_text())
    for name in ("win_rate", "length_controlled_win_rate"):
        value, (low, high) = results[name]["value"], results[name]["ci95"]
        assert f"{value:.3f}   {low:.3f} – {high:.3f}" in said.out
    assert re.search(r"judge accuracy before JSFT \(\d+ pairs\)", said.out)
    assert "Accuracy of the judge `my/jsft` on `" in (copied / "policy/README.md").read_text()
    best = list(read_lines(copied / "best.jsonl"))
    held_out = len(best)
    assert held_out > 1
    assert said.out.count("  self-trained, best of 8: ") == min(3, held_out)  # the first ones
    assert re.search(r"amber self-training: \d+ training prompts: the policy may", said.out)
    assert f"amber self-trained (a) against JSFT (b): with {held_out} prompts" in said.out
    for conclusion in json.loads((copied / "evaluated/results.json").read_text())["conclusions"]:
        assert f"{conclusion['level']:5} judge: {conclusion['text']}" in said.out
    commands = said.out.split("each stage alone:\n")[1].splitlines()
    parsed = [command_parser().parse(line.split()[1:]) for line in commands]
    assert [p.command for p in parsed] == [
        "jsft",
        "eval",
        "train",
        "compare",
        "tournament",
        "report",
    ]
    assert parsed[2].overrides == list(SMALL)


def test_stopped_by_sigterm_in_training_the_same_command_ends_as_if_nothing_had_been(
    words: list[str],
    copied: Path,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = left(copied)
    for name in ("policy", "compared"):
        shutil.rmtree(copied / name)
    for name in ("best.jsonl", "best.jsonl.settings.json", "report.html"):
        (copied / name).unlink()
    step, steps = torch.optim.AdamW.step, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    assert main(words) == 0
    assert "3/6 self-training stopped: run the same command again" in capsys.readouterr().err
    assert started == ["train"]
    assert main(words) == 0
    assert started == ["train", "train", "compare", "tournament", "report"]
    assert left(copied) == whole


def other_labels(data: Path) -> None:
    rows = data.read_text().splitlines()
    data.write_text("\n".join([rows[0].replace("good,bad", "bad,good"), *rows[1:]]))


def other_weights(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("change", "name"), [(other_labels, "my.csv"), (other_weights, "base")])
def test_data_or_a_model_with_other_contents_are_refused(
    change: Callable[[Path], None],
    name: str,
    words: list[str],
    whole: Path,
    copied: Path,
    started: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = (copied.parent / n for n in ("base", "my.csv"))
    shutil.copytree(words[2], model)
    shutil.copy(words[4], data)
    for file in ("jsft.yaml", "self_judge.yaml"):
        text = (copied / file).read_text().replace(words[2], str(model))
        (copied / file).write_text(text.replace(words[4], str(data)))
    (copied / "align.json").unlink()
    given = ["align", "--model", str(model), "--data", str(data), *words[5:]]
    for file in ("jsft", "policy"):
        settings = copied / file / "run.json"
        text = settings.read_text().replace(words[2], str(model))
        settings.write_text(text.replace(words[4], str(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Runner, "start", lambda runner, words: 1)
        assert main(given) == 1
    change(copied.parent / name)
    assert main(given) == 2
    assert f"{copied.parent / name} changed since the first call in my" in capsys.readouterr().err
    assert started == []


def test_a_finished_stage_that_is_run_again_by_hand_stays_complete(
    words: list[str], copied: Path, started: list[str]
) -> None:
    (copied / "jsft" / "training_args.bin").write_bytes(b"of another call")
    assert main(words) == 0
    assert started == []


def test_a_stage_that_fails_ends_the_call_with_its_status(
    words: list[str], copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.rmtree(copied / "compared")
    monkeypatch.setattr(run.Runner, "start", lambda runner, words: 7)
    assert main(words) == 7
    assert "4/6 comparison failed with exit status 7: run the same" in capsys.readouterr().err


def test_training_by_hand_is_complete_and_other_commands_find_their_own_lines(
    words: list[str], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "align.json").unlink()
    started: list[str] = []
    monkeypatch.setattr(run.Runner, "start", lambda runner, words: started.append(words[0]) or 0)
    assert main(words) == 0
    assert started == ["eval", "compare", "tournament", "report"]
    assert main(words) == 0
    assert len(started) == 4


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (
            lambda my: (my / "jsft.yaml").write_text(
                (my / "jsft.yaml").read_text().replace("num_train_epochs: 3", "num_train_epochs: 2")
            ),
            (),
            "JSFT is complete in my/jsft, but training_args.num_train_epochs was 3 at the start of "
            "this run and is now 2: undo the change, or remove my/jsft to train again",
        ),
        (
            lambda my: None,
            ("self_judge_args.beta=0.2",),
            "self-training is complete in my/policy, but self_judge_args.beta was 0.1",
        ),
        (
            lambda my: shutil.rmtree(my / "jsft"),
            (),
            "JSFT is not complete in my/jsft, but there are results that depend on it: remove "
            "my/evaluated, my/policy, my/compared, my/best.jsonl",
        ),
        (
            lambda my: (my / "held_out.jsonl").write_text('{"prompt": "a"}\n'),
            (),
            "comparison is complete in my/compared, but my/held_out.jsonl changed since: remove",
        ),
        (lambda my: (my / "jsft.yaml").unlink(), (), "my has run files, but not jsft.yaml"),
        (lambda my: (my / "held_out.jsonl").write_text(""), (), "my/held_out.jsonl is empty"),
        (lambda my: None, ("--principles", "honesty"), "but --principles is ['honesty']: choose"),
        (lambda my: None, ("--model", "."), "but --model is "),
        (lambda my: None, ("--columns", "prompt=q"), "but --columns is {'prompt': 'q'}: choose"),
        (lambda my: None, ("dataset.sources=[]",), "dataset.sources=[]: pass --data instead"),
        (
            lambda my: (
                shutil.move(my / "policy", my.parent / "policy")
                and (my / "self_judge.yaml").write_text(
                    (my / "self_judge.yaml").read_text().replace("my/policy", "policy")
                )
            ),
            (),
            "my/self_judge.yaml: training_args.output_dir is policy, which is not in my",
        ),
    ],
)
def test_a_folder_with_other_settings_is_refused_in_one_line(
    change: Any,
    more: tuple[str, ...],
    said: str,
    words: list[str],
    copied: Path,
    started: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(copied)
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert started == []


def test_the_judge_before_jsft_is_the_revision_that_jsft_starts_from(copied: Path) -> None:
    file = copied / "jsft.yaml"
    file.write_text(file.read_text().replace("model: {", "model: {revision: v2, "))
    evaluation, comparison = (stages(copied)[number].words for number in (1, 3))
    assert command_parser().parse(evaluation).revision == "v2"
    assert command_parser().parse(comparison).revision is None  # of folders


def test_several_processes_are_refused_in_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "align starts its stages itself, training with one process per GPU" in line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signals_reach_the_processes_of_stages(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "self_judge", *words]

    def call(until: Path | None, number: int = 0) -> tuple[int, str]:
        """Sends the signal to the process group as soon as the file exists."""
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while until is not None and not (tmp_path / "my" / until).exists():
            assert process.poll() is None
            time.sleep(0.02)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, number)
        elif number:
            process.send_signal(number)
        return process.wait(), process.communicate()[1]

    code, said = call(Path("jsft/checkpoint-1"), signal.SIGTERM)
    assert code == 0
    assert "1/6 JSFT stopped: run the same command again" in said
    code, said = call(Path("policy/checkpoint-1"), signal.SIGINT)
    assert code == 130
    assert "3/6 self-training interrupted: run the same command again" in said
    assert "Traceback" not in said
    code, said = call(Path("compared/responses_a.jsonl"), signal.SIGTERM)
    assert code == 143
    assert call(None)[0] == 0
    assert left(tmp_path / "my") == left(whole / "my")

"""Killed, pre-empted, out of disk: a training that is started again ends as if nothing had been.

All of it in real processes, with SIGKILL and SIGTERM; see `killable.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from self_judge import ChatEncoder
from self_judge.data import synthetic
from self_judge.models import load_tokenizer
from self_judge.prompting.judge_json import save_judge_settings
from self_judge.storage.atomic import (
    MANIFEST,
    UNFINISHED,
    clear_unfinished,
    integrity_error,
    latest_complete,
)
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import LOCK, METRICS, ROLLOUTS, only_training

KINDS = ("train", "jsft")
STEPS = 8


class Command:
    """The command `self-judge`, in a process of its own at every call."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "processes" / "killable.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(
        self,
        argv: list[str],
        *,
        signal_after: tuple[int, float] | None = None,
        **job: Any,
    ) -> int:
        """Runs it to its end; negative: the signal that ended it.

        Args:
            signal_after: a signal, and after how many seconds it is sent.
        """
        self.log.write_text("")
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"argv": argv, "log": str(self.log), **job}) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        timer = None
        if signal_after is not None:
            timer = threading.Timer(signal_after[1], _send, (process, signal_after[0]))
            timer.start()
        code = int(self.server.stdout.readline())
        if timer is not None:
            timer.cancel()
        return code

    @property
    def said(self) -> str:
        """What the last call printed."""
        return self.log.read_text()


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may just have ended
        os.kill(process, number)


@dataclass(frozen=True)
class Place:
    """Where runs are started, and what a run leaves that nothing happens to."""

    command: Command
    model: Path
    data: Path
    undisturbed: dict[str, dict[str, Any]]

    def argv(self, kind: str, output: Path) -> list[str]:
        return arguments(kind, output, self.model, self.data)


@pytest.fixture(scope="module")
def model(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("model") / "judge"))
    encoder = ChatEncoder(load_tokenizer(folder))
    templates = synthetic.judge_templates(principles=False, overall=True)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    return folder


@pytest.fixture(scope="module")
def place(
    model: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    command = Command(tmp_path_factory.mktemp("command"))
    made = Place(command, model, data["hh"], {})
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("undisturbed") / kind
        assert command(made.argv(kind, folder)) == 0, command.said
        made.undisturbed[kind] = left(folder)
    yield made
    command.server.kill()


def arguments(kind: str, output: Path, model: Path, data: Path) -> list[str]:
    """A small run: checkpoints and logs fall on different steps."""
    section, file = {
        "train": ("self_judge_args", "hh_self_judge"),
        "jsft": ("jsft_args", "hh_jsft"),
    }[kind]
    given = [
        f"training_args.output_dir={output}",
        f"training_args.max_steps={STEPS}",
        "training_args.per_device_train_batch_size=2",
        "training_args.save_steps=2",
        "training_args.logging_steps=3",
        "training_args.eval_strategy=no",
        "training_args.disable_tqdm=true",
        "training_args.gradient_checkpointing=false",
        "training_args.learning_rate=0.01",
        "training_args.bf16=false",
        f"{section}.global_batch_size=4",
        f"model.model_name_or_path={model}",
        "model.dtype=float32",
        f"dataset.sources=[{{path: {data}}}]",
        "dataset.eval=[]",
    ]
    if kind == "train":
        given += ["self_judge_args.max_new_tokens=8"]
    return [kind, str(ROOT / "configs" / f"{file}.yaml"), *given]


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, without what tells the time."""
    lines = []
    for line in read_lines(folder / METRICS):
        # The last line sums up one call of the command.
        if "train_runtime" not in line:
            lines.append({k: v for k, v in line.items() if "time" not in k and "second" not in k})
    rollouts = sorted((folder / ROLLOUTS).glob("*")) if (folder / ROLLOUTS).is_dir() else []
    weights = sorted(folder.glob("*.safetensors"))
    assert lines
    assert weights
    return {
        "lines": lines,
        **{path.name: path.read_bytes() for path in (*rollouts, *weights)},
        "checkpoints": sorted(p.name for p in folder.glob("checkpoint-*")),
    }


# A call in the program, how often it has happened, and whether the process dies before it, after it
# or with half of a file written.
MOMENTS: dict[str, list[Any]] = {
    "while sampling": ["self_judge.inference.sampling:TransformersSampler.sample", 3, "before"],
    "while judging": ["self_judge.judging.judge:Judge.compare", 4, "after"],
    "after the weights changed": ["torch.optim:AdamW.step", 5, "after"],
    "with half of the weights written": ["peft.peft_model:safe_save_file", 2, "half"],
    "with the optimizer's state half written": ["torch:save", 3, "half"],
    "before a checkpoint is sealed": ["self_judge.training.fault_tolerance:seal", 2, "before"],
    "before a checkpoint has its name": [
        "self_judge.training.fault_tolerance:commit",
        2,
        "before",
    ],
    "before old checkpoints are removed": [
        "self_judge.training.fault_tolerance:remove",
        1,
        "before",
    ],
    "before old checkpoints are removed, behind the last one": [
        "self_judge.training.fault_tolerance:remove",
        2,
        "before",
    ],
    "while an old checkpoint is removed": ["self_judge.storage.atomic:shutil.rmtree", 9, "before"],
    "while a number is logged": ["self_judge.training.callbacks:append_line", 2, "after"],
    "before the trained model is in place": [
        "self_judge.training.fault_tolerance:move_files",
        1,
        "before",
    ],
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_anywhere_the_same_command_ends_as_if_nothing_had_been(
    moment: str, place: Place, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = place.argv("train", output)
    assert place.command(argv, die_at=MOMENTS[moment]) == -signal.SIGKILL, place.command.said
    assert all(integrity_error(folder) is None for folder in output.glob("checkpoint-*"))
    assert place.command(argv) == 0, place.command.said
    assert left(output) == place.undisturbed["train"]
    assert not (output / UNFINISHED).exists()


@pytest.mark.slow  # the fast tests kill runs at every point of a step and of a checkpoint
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_twenty_moments_a_run_ends_as_if_nothing_had_been(
    kind: str, place: Place, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = place.argv(kind, output)
    started = time.perf_counter()
    assert place.command(place.argv(kind, tmp_path / "timed")) == 0
    whole = time.perf_counter() - started
    seed = random.randrange(2**32)
    draw, kills, steps = random.Random(seed), 0, set()
    while kills < 20:
        ended = place.command(argv, signal_after=(signal.SIGKILL, draw.uniform(0.1, 1.0) * whole))
        if ended == -signal.SIGKILL:
            kills += 1
            found, _ = latest_complete(output)
            steps.add(found.name if found else "none")
            continue
        assert ended == 0, f"seed {seed}: {place.command.said}"
        # It came to its end: the next kills are for a run that begins anew.
        assert left(output) == place.undisturbed[kind], f"seed {seed}"
        output = tmp_path / f"run{kills}"
        argv = place.argv(kind, output)
    assert place.command(argv) == 0, f"seed {seed}: {place.command.said}"
    assert left(output) == place.undisturbed[kind], f"seed {seed}"
    print(f"{kind}: seed {seed}, killed with these checkpoints there: {sorted(steps)}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_ends_a_run_after_its_step_with_a_checkpoint_and_the_command_to_go_on(
    kind: str, place: Place, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = place.argv(kind, output)
    # It is asked in the middle of its third step.
    third = ["torch.optim:AdamW.step", 3, "after"]
    assert place.command(argv, terminate_at=third) == 0, place.command.said
    assert "stopped by SIGTERM after step 3 of 8" in place.command.said
    assert "Traceback" not in place.command.said
    resume = place.command.said.splitlines()[-1]
    assert resume.startswith(f"resume with: self-judge {kind} ")
    assert resume.endswith(" training_args.resume_from_checkpoint=true")
    assert integrity_error(output / "checkpoint-3") is None
    assert not list(output.glob("*.safetensors"))  # none that could be taken for trained
    assert place.command(argv) == 0, place.command.said
    expected, found = place.undisturbed[kind], left(output)
    assert {**found, "checkpoints": None} == {**expected, "checkpoints": None}


@pytest.mark.timeout(120)
def test_a_damaged_checkpoint_is_passed_over_and_said_to_be(place: Place, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = place.argv("train", output)
    assert (
        place.command(argv, die_at=["self_judge.training.fault_tolerance:move_files", 1, "before"])
        == -signal.SIGKILL
    )
    weights = output / "checkpoint-8" / "adapter_model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    assert place.command(argv) == 0
    said = " ".join(place.command.said.split())
    assert "checkpoint-8 is skipped: adapter_model.safetensors has " in said
    assert f" has {size // 2:,} of {size:,} bytes" in said
    assert left(output) == place.undisturbed["train"]


@pytest.mark.timeout(120)
def test_a_checkpoint_that_is_named_has_to_be_whole(place: Place, tmp_path: Path) -> None:
    output = tmp_path / "run"
    argv = place.argv("train", output)
    assert place.command([*argv, "training_args.max_steps=2"]) == 0, place.command.said
    folder = output / "checkpoint-2"
    (folder / MANIFEST).unlink()
    named = f"training_args.resume_from_checkpoint={folder}"
    assert place.command([*argv, named]) == 2
    assert place.command.said.splitlines()[-1] == (
        f"self-judge: error: cannot resume from {folder}: it has no {MANIFEST}, which is "
        "written last"
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a disk that is full needs a mount, which is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_full_disk_a_run_says_so_in_one_line_and_its_last_checkpoint_stays_whole(
    kind: str, place: Place, disk: Path
) -> None:
    output = disk / "run"
    argv = place.argv(kind, output)
    assert (
        place.command(argv, die_at=["self_judge.training.fault_tolerance:seal", 2, "before"])
        == -signal.SIGKILL
    )
    clear_unfinished(output)
    with (disk / "filler").open("wb") as filler:
        filler.write(bytes(shutil.disk_usage(disk).free - 24_000))
    assert place.command(argv) == 2, place.command.said
    last = place.command.said.splitlines()[-1]
    assert last.startswith(f"self-judge: error: cannot write to {output} (")
    assert f"; {output / 'checkpoint-2'} is complete. Free some disk space" in last
    assert "Traceback" not in place.command.said
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert integrity_error(output / "checkpoint-2") is None
    (disk / "filler").unlink()
    assert place.command(argv) == 0, place.command.said
    assert left(output) == place.undisturbed[kind]


@pytest.mark.timeout(120)
def test_a_folder_that_is_read_only_is_said_to_be_and_nothing_is_lost(
    place: Place, disk: Path
) -> None:
    output = disk / "run"
    argv = place.argv("train", output)
    assert (
        place.command(argv, die_at=["self_judge.training.fault_tolerance:seal", 2, "before"])
        == -signal.SIGKILL
    )
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert place.command(argv) == 2, place.command.said
    last = place.command.said.splitlines()[-1]
    assert last.startswith("self-judge: error: ")
    assert "Read-only file system" in last
    assert str(output) in last
    assert "Traceback" not in place.command.said
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert place.command(argv) == 0, place.command.said
    assert left(output) == place.undisturbed["train"]


def started(argv: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own, which goes on while the test does other things."""
    program = f"import sys; from self_judge.cli import main; sys.exit(main({argv!r}))"
    with (folder / "first.log").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", program], stdout=log, stderr=log, env=environment
        )


def until(true: Any, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.timeout(180)
def test_a_second_training_in_a_folder_is_refused_until_the_first_is_dead(
    place: Place, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = place.argv("jsft", output)
    first = started([*argv, "training_args.max_steps=100000"], tmp_path)
    try:
        until((output / METRICS).exists)
        assert place.command(argv) == 2, place.command.said
        line = place.command.said.splitlines()[-1]
        assert f"another training writes to {output} (process {first.pid} on " in line
        assert socket.gethostname() in line
        assert place.command(place.argv("train", output)) == 2
    finally:
        first.kill()
        first.wait()
    shutil.rmtree(output / ROLLOUTS, ignore_errors=True)
    assert place.command([*argv, "training_args.resume_from_checkpoint=null"]) == 0, (
        place.command.said
    )
    assert not list(output.glob("_lock*"))


def test_one_process_may_train_again_in_its_folder(tmp_path: Path) -> None:
    with only_training(tmp_path):
        with only_training(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="it looks up processes in /proc")
@pytest.mark.timeout(120)
def test_workers_that_prepare_data_end_with_their_parent(tmp_path: Path) -> None:
    program = (
        "import time; from datasets import Dataset\n"
        "from self_judge.data.hub import workers_end_with_parent\n"
        "workers_end_with_parent()\n"
        "def wait(row):\n    open(row['to'], 'w').close(); time.sleep(60); return row\n"
        f"rows = [{{'to': {str(tmp_path)!r} + f'/{{i}}'}} for i in range(3)]\n"
        "Dataset.from_list(rows).map(wait, num_proc=3)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 3)
        assert len(session(first.pid)) >= 4
    finally:
        first.kill()
        first.wait()
    until(lambda: not session(first.pid), 20)


def session(leader: int) -> list[int]:
    """The processes of a session that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


# -- judging in bulk -----------------------------------------------------------------------------

BULK = 40  # lines, in chunks of 4


def bulk(what: str, folder: Path, model: Path) -> tuple[list[str], Path]:
    """A command that judges many lines, and the file that it writes."""
    source = folder / "in.jsonl"
    asked = [
        {"prompt": f"Which animal is number {i}?", "chosen": f"The otter {i}.", "rejected": "No."}
        for i in range(BULK)
    ]
    if what != "eval":
        asked = [{"context": a["prompt"], "responses": [a["chosen"], "No.", "Yes."]} for a in asked]
    if what == "judge":
        asked = [{**a, "responses": a["responses"][:2]} for a in asked]
    source.write_text("".join(json.dumps(a) + "\n" for a in asked))
    settings = ["--model", str(model), "--chunk", "4"]
    if what == "eval":
        return [what, str(source), "--output", str(folder / "out"), *settings], (
            folder / "out" / "verdicts.jsonl"
        )
    return [what, str(source), str(folder / "out.jsonl"), *settings], folder / "out.jsonl"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", ["judge", "eval", "tournament"])
def test_judging_in_bulk_that_is_killed_again_and_again_has_one_line_per_input_in_order(
    what: str, place: Place, tmp_path: Path
) -> None:
    argv, expected = bulk(what, _made(tmp_path / "whole"), place.model)
    assert place.command(argv) == 0, place.command.said
    assert len(expected.read_text().splitlines()) == BULK
    argv, output = bulk(what, _made(tmp_path / "killed"), place.model)
    for moment in (
        ["self_judge.storage.jsonl:Journal.append", 3, "after"],
        ["self_judge.storage.jsonl:Journal._note", 2, "before"],
        ["self_judge.judging.judge:Judge.compare", 2, "after"],
    ):
        assert place.command(argv, die_at=moment) == -signal.SIGKILL, place.command.said
        # What the disk had of a line when the machine went down.
        with output.open("a") as file:
            file.write('{"index": 3, "ver')
    assert place.command(argv) == 0, place.command.said
    assert output.read_text().replace("killed", "whole") == expected.read_text()
    assert place.command(argv) == 0, place.command.said  # nothing is left to do
    assert output.read_text().replace("killed", "whole") == expected.read_text()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.timeout(300)
def test_two_runs_at_once_on_the_same_data_do_not_spoil_each_other(
    place: Place, tmp_path: Path
) -> None:
    commands = [Command(_made(tmp_path / name)) for name in "ab"]
    codes: dict[int, int] = {}

    def run(number: int) -> None:
        argv = place.argv("jsft", tmp_path / f"run{number}")
        codes[number] = commands[number]([*argv, "dataset.num_proc=2"])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, made in enumerate(commands):
        assert codes[number] == 0, made.said
        assert left(tmp_path / f"run{number}") == place.undisturbed["jsft"]
        made.server.kill()

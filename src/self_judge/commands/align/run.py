"""`self-judge align` runs the whole method on a model and data, and resumes where it stopped.

Each stage is a command in a process of its own, which frees its memory at the end. This module
decides which stages are complete. `outcome.py` prints what came out.
"""

from __future__ import annotations

import hashlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from self_judge.adapters import fingerprint
from self_judge.commands.align.outcome import print_outcome
from self_judge.commands.align.stages import (
    FILES,
    JSFT,
    PAIRS,
    PROMPTS,
    REPORT,
    Stage,
    absolute,
    stages,
)
from self_judge.commands.init import InitJob, run_init
from self_judge.commands.train import changed_settings, settings_json
from self_judge.config.hardware import fit_to_machine
from self_judge.config.schema import load_run
from self_judge.console import Terminal, say
from self_judge.errors import ConfigError, DataError
from self_judge.reporting.page import plotly_is_there
from self_judge.storage.atomic import loads, write_json
from self_judge.storage.run_dir import SUMMARY
from self_judge.training.setup import this_machine

NOTES = "align.json"  # the given model and data, and the command and inputs of complete stages
_GIVEN = "given"
_ENDED = {0: "stopped", 130: "interrupted", 143: "interrupted"}  # 128 + SIGINT or SIGTERM
_PATIENCE = 5.0  # seconds that a stage may take to end by itself after Ctrl-C


def run_align(job: InitJob, overrides: Sequence[str] = (), console: Console | None = None) -> int:
    """Runs the stages that are not complete, prints what came out, and returns the exit status.

    The status is that of the first stage that fails. It is 0 if SIGTERM stops training, which
    then continues from a checkpoint with the next call.

    Args:
        job: the model, the data and the folder. `run_init` writes the run files if there are none.
        overrides: see `stages`.
        console: the console for the stages; what came out is printed to standard output.

    Raises:
        ValueError: the folder belongs to another model or other data, these have changed, or a
            complete stage had other settings or inputs.
    """
    console = console or Terminal(stderr=True)
    tell = partial(say, console)
    folder = job.folder
    if any((folder / name).exists() for name in FILES):
        _check_same(job)
    else:
        run_init(job, console)
    for name in (PROMPTS, PAIRS):
        if not (folder / name).stat().st_size:
            raise DataError(
                f"{folder / name} is empty, because the data has too few records: use more, and "
                "another --output"
            )
    _check_unchanged(job)
    todo = stages(folder, overrides)
    runner = Runner()
    with runner.terminable():
        for number, stage in enumerate(todo, start=1):
            title = f"{number}/{len(todo)} {stage.title}"
            if stage.title == REPORT and not plotly_is_there():
                tell(f"{title} needs Plotly: pip install 'self-judge[report]'")
                continue
            if is_complete(stage, folder):
                tell(f"{title}: complete in {stage.output}")
                continue
            _refuse_stale(stage, todo[number:])
            tell(f"{title}: self-judge {shlex.join(stage.words)}")
            status = runner.start(stage.words)
            complete = status == 0 and _note(stage, folder)
            if not complete:
                how = _ENDED.get(status, f"failed with exit status {status}")
                tell(f"{title} {how}: run the same command again to continue from here")
                return status
            if runner.asked:
                tell(f"stopped after {title}: run the same command again to continue from here")
                return 0
    print_outcome(folder, todo, Terminal())
    return 0


def _check_same(job: InitJob) -> None:
    """Refuses to continue in a folder with the run files of another model or other data."""
    folder = job.folder
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} has run files, but not {missing[0]}: choose another --output, or remove "
            "the run files to write them again"
        )
    run = load_run(folder / JSFT, [], "jsft")
    source = run.dataset.sources[0]
    asked: dict[str, tuple[Any, Any]] = {
        "--model": (run.model.model_name_or_path, absolute(job.model)),
        "--data": (source.path, absolute(job.data)),
    }
    if job.columns:
        asked["--columns"] = (source.columns, dict(job.columns))
    if job.principles:
        asked["--principles"] = (sorted(run.templates.judge or {}), sorted(job.principles))
    for option, (before, given) in asked.items():
        if before != given:
            raise ConfigError(
                f"{folder / JSFT} has {before}, but {option} is {given}: choose another --output, "
                "or remove the run files and the results"
            )


def _check_unchanged(job: InitJob) -> None:
    """Refuses to continue if the contents of the model or of the data are other ones.

    The run files and the held-out data are made from these contents.
    """
    notes = _notes(job.folder)
    now = {"--model": fingerprint(job.model), "--data": _digest(Path(job.data))}
    before = notes.setdefault(_GIVEN, now)
    for option, given in (("--model", job.model), ("--data", job.data)):
        if before.get(option) != now[option]:
            raise ConfigError(
                f"{given} changed since the first call in {job.folder}: choose another --output, "
                "or remove the run files and the results"
            )
    write_json(job.folder / NOTES, notes)


# -- complete stages -----------------------------------------------------------------------------


def is_complete(stage: Stage, folder: Path) -> bool:
    """Returns whether a stage need not run again.

    Raises:
        ConfigError: it is complete, but had other settings or inputs.
    """
    if not stage.output.exists():
        return False
    noted = _notes(folder).get(stage.title)
    if stage.run is not None and not _is_trained(stage):
        return False
    if noted is None:
        # Training by hand is complete; a command for many items finds its own lines.
        return stage.run is not None and _note(stage, folder)
    now = _described(stage)
    if stage.run is None and noted["words"] != now["words"]:
        changed = "its options"
    else:
        changed = ", ".join(
            n for n, value in now["inputs"].items() if noted["inputs"].get(n) != value
        )
    if not changed:
        return True
    if stage.title == REPORT:
        return False
    raise ConfigError(
        f"{stage.title} is complete in {stage.output}, but {changed} changed since: remove "
        f"{stage.output} to run it again"
    )


def _is_trained(stage: Stage) -> bool:
    summary: Mapping[str, Any] = {}
    with suppress(OSError, ValueError):
        summary = dict(loads((stage.output / SUMMARY).read_bytes()))
    if "next" not in summary or stage.run is None:  # written at the end of training
        return False
    # The run may have been trained on this machine or on another one.
    run: Any = stage.run
    fitted, _ = fit_to_machine(run, this_machine())
    both = [list(changed_settings(stage.output, settings_json(r))) for r in (fitted, run)]
    keys = {line.partition(" was ")[0] for line in both[1]}
    changes = [line for line in both[0] if line.partition(" was ")[0] in keys]
    if not changes:
        return True
    more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
    raise ConfigError(
        f"{stage.title} is complete in {stage.output}, but {changes[0]}{more}: undo the change, "
        f"or remove {stage.output} to train again"
    )


def _refuse_stale(stage: Stage, later: Sequence[Stage]) -> None:
    """Refuses to run a stage if there are results of an earlier version of its output."""
    produced = {stage.output}
    stale = []
    for other in later:
        if produced & set(other.inputs) and other.title != REPORT:
            produced.add(other.output)
            stale += [other.output] if other.output.exists() else []
    if stale:
        raise ConfigError(
            f"{stage.title} is not complete in {stage.output}, but there are results that depend "
            f"on it: remove {', '.join(map(str, stale))}"
        )


def _note(stage: Stage, folder: Path) -> bool:
    """Notes that a stage is complete. Training that has stopped is not."""
    if stage.run is not None and not _is_trained(stage):
        return False
    write_json(folder / NOTES, {**_notes(folder), stage.title: _described(stage)})
    return True


def _notes(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        notes = dict(loads((folder / NOTES).read_bytes()))
    except (OSError, TypeError, ValueError):
        return {}
    return {title: note for title, note in notes.items() if isinstance(note, dict)}


def _described(stage: Stage) -> dict[str, Any]:
    inputs = {
        str(path): fingerprint(str(path)) if path.is_dir() else _digest(path)
        for path in stage.inputs
    }
    return {"words": stage.words, "inputs": inputs}


def _digest(path: Path) -> str | None:
    """Returns a hash of a file, or of all files in a folder; `None` if there is no such path."""
    if not path.exists():
        return None
    digest = hashlib.blake2b(digest_size=12)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as reader:
                while block := reader.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


# -- processes -----------------------------------------------------------------------------------


class Runner:
    """Starts commands in processes of their own, and passes signals on.

    Attributes:
        asked: whether SIGTERM was received.
    """

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, words: Sequence[str]) -> int:
        """Runs a `self-judge` command and returns its exit status, as a shell reports it."""
        self._process = process = subprocess.Popen([sys.executable, "-m", "self_judge", *words])
        if self.asked:
            process.terminate()
        try:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # a terminal interrupts this process and its children
                try:
                    status = process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT)
                    status = process.wait()
        finally:
            self._process = None
        return 128 - status if status < 0 else status

    @contextmanager
    def terminable(self) -> Iterator[None]:
        """Passes SIGTERM on to the running command within a `with` block of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def terminate(number: int, frame: FrameType | None) -> None:
            self.asked = True
            if self._process is not None:
                self._process.send_signal(number)

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

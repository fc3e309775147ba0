"""One part after another, each in a process of its own that is ended at its limit.

The processes are forked from one that has imported everything and touched no GPU, so that a part
begins at once. It knows names and limits, not what is measured.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from measuring import Check

_NO_DEVICE = 75  # the exit status of a forked process in which CUDA cannot start


class Part(NamedTuple):
    """A function of a module, called with its `Check`; its limit in seconds."""

    name: str
    module: str
    limit: float


# In order of value.
PARTS = (
    Part("versions", "facts", 30),
    Part("exact", "exact", 120),
    Part("promises", "promises", 90),
    Part("kernels", "kernels", 40),
    Part("judging", "speed", 100),
    Part("updates", "speed", 120),
    Part("sampling", "speed", 90),
    Part("waits", "waits", 45),
    Part("tournaments", "speed", 60),
    Part("jsft", "speed", 75),
    Part("flex", "flex", 90),
    Part("evidence", "evidence", 420),
)
TINY_WORLD = Part("tiny_world", "project", 60)  # what a dry run works on


def run(parts: Sequence[Part], check: Check, until: float) -> bool:
    """Runs the parts, the whole of them until `until`; whether each came to its end.

    Args:
        check: what all parts have in common.
        until: by `time.monotonic()`.
    """
    paths = [str(Path(__file__).parent), *map(str, _beside())]
    # The processes find what this one finds.
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    context: Any = multiprocessing.get_context("forkserver")
    modules = dict.fromkeys(["measuring", *(part.module for part in PARTS)])
    context.set_forkserver_preload([*modules])
    whole, forked = True, True
    for part in parts:
        left = until - time.monotonic()
        own = replace(check, part=part.name)
        if left < 5:
            own.say(skipped="no time left")
            whole = False
            continue
        status = _run(context, part, own, min(part.limit, left), forked)
        if status == _NO_DEVICE:
            own.say(note="CUDA cannot start in a forked process: each part imports by itself")
            context, forked = multiprocessing.get_context("spawn"), False
            status = _run(context, part, own, min(part.limit, until - time.monotonic()), forked)
        whole = whole and status == 0
    return whole


def _beside() -> list[Path]:
    folder = Path(__file__).parents[1]
    return [folder, folder.parent / "src"]


def _run(context: Any, part: Part, check: Check, limit: float, forked: bool) -> int:
    started = time.monotonic()
    own = replace(check, deadline=started + limit)
    process = context.Process(target=_carry_out, args=(part, own, forked))
    process.start()
    overran = True
    try:
        process.join(limit)
        overran = process.exitcode is None
    finally:
        if overran:
            # With whatever it started: compilers, loaders.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    if overran:
        check.say(overran=f"ended at its limit of {limit:.0f} s")
        return 1
    seconds = round(time.monotonic() - started, 1)
    if process.exitcode == 0:
        check.say(done=seconds)
    elif process.exitcode != _NO_DEVICE:
        check.say(died=f"with status {process.exitcode} after {seconds} s")
    return int(process.exitcode)


def _carry_out(part: Part, check: Check, forked: bool) -> None:
    """In the part's own process."""
    os.setsid()
    if forked and check.device == "cuda" and not _cuda_starts():
        sys.exit(_NO_DEVICE)
    warnings.filterwarnings("ignore")
    gc.freeze()  # what was imported is there to stay: `clean` need not look at it
    with tempfile.TemporaryDirectory(dir=check.aside) as folder, _log(check) as log:
        tempfile.tempdir = folder
        # What libraries print stands beside the findings, not between them.
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            with check.errors_told():
                getattr(importlib.import_module(part.module), part.name)(check)


def _log(check: Check) -> TextIO:
    return (check.out / "log.txt").open("a", encoding="utf-8")


def _cuda_starts() -> bool:
    import torch

    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return False
    return True

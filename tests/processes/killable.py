"""Starts the command again and again in processes of their own, at the cost of a fork.

It imports everything once, then reads jobs as JSON lines: `argv` of the command, `log` for what it
prints, and `die_at` or `terminate_at` [function, call, moment]: where in the program the process is
sent SIGKILL or SIGTERM. It answers with the process id, and with how the process ended.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork inherits no threads


def arm(number: int, target: str, call: int, moment: str) -> None:
    """Lets the `call`-th call of `module:name.name` send this process a signal."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner, calls = getattr(owner, name), 0

    @functools.wraps(inner)
    def armed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            os.kill(os.getpid(), number)
        result = inner(*args, **kwargs)
        if calls == call and moment == "after":
            os.kill(os.getpid(), number)
        if calls == call and moment == "half":  # of the file that it has just written
            path = next(a for a in (*args, *kwargs.values()) if isinstance(a, (str, os.PathLike)))
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, armed)


def child(job: dict[str, Any]) -> None:
    """Runs the command and ends with its exit status."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.dump_traceback_later(120, exit=True)
    if job.get("die_at"):
        arm(signal.SIGKILL, *job["die_at"])
    if job.get("terminate_at"):
        arm(signal.SIGTERM, *job["terminate_at"])
    sys.argv = ["self-judge", *job["argv"]]
    from self_judge.cli import main

    code = main(job["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """One job after the other."""
    import torch

    import self_judge.commands.train

    torch.set_num_threads(1)
    assert self_judge.commands.train
    for line in sys.stdin:
        process = os.fork()
        if not process:
            try:
                child(json.loads(line))
            finally:
                os._exit(99)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()

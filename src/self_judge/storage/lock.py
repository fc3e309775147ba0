"""Prevents two processes from writing to the same folder or file, on every platform.

This module does not depend on what they write.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from self_judge.storage.atomic import loads


@contextmanager
def only_writer(
    lock: Path, taken: str, error: type[ValueError], *, reentrant: bool = False
) -> Iterator[None]:
    """Holds a lock within the `with` block. The operating system frees it if the process dies.

    Args:
        lock: the lock file, which exists only while the lock is held.
        taken: the error message. `{owner}` is the process that holds the lock.
        error: the exception raised if another process holds the lock.
        reentrant: whether this process may take the lock several times.
    """
    held = FileLock(str(lock), timeout=0, is_singleton=reentrant, thread_local=not reentrant)
    owner = lock.with_name(lock.name + ".owner.json")
    try:
        held.acquire()
    except Timeout:
        raise error(taken.format(owner=_described(owner))) from None
    outermost = not reentrant or held.lock_counter == 1
    try:
        if outermost:
            about = {"process": os.getpid(), "host": socket.gethostname()}
            owner.unlink(missing_ok=True)
            owner.write_text(json.dumps(about), encoding="utf-8")
        yield
    finally:
        if outermost:
            for file in (owner, lock):
                with suppress(OSError):  # Windows cannot delete an open file
                    file.unlink()
        held.release()


def _described(owner: Path) -> str:
    try:
        about = loads(owner.read_bytes())
        return f"process {about['process']} on {about['host']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"

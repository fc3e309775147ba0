"""JSON lines that grow chunk by chunk, and resume after any interruption.

It knows files and lines. It does not know what stands in a line or how it is computed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from self_judge.errors import JournalError
from self_judge.storage.atomic import atomic_write


class Journal:
    """An open journal; see `open_journal`.

    Attributes:
        path: the file.
        lines: whole lines in it.
        seconds: what writing the timed lines took, over all sessions.
        timed: how many lines that is.
    """

    def __init__(self, path: Path, file: IO[bytes], settings: Mapping[str, Any]) -> None:
        self.path = path
        self.lines = 0
        self.seconds = 0.0
        self.timed = 0
        self._file = file
        self._settings = dict(settings)

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines that are there, one by one."""
        return read_lines(self.path)

    def append(self, rows: Sequence[Mapping[str, Any]], seconds: float = 0.0) -> None:
        """Adds lines; once this returns they have reached the disk."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # A lone surrogate, which data may hold and which has no UTF-8, becomes JSON's own escape.
        self._file.write(text.encode("utf-8", "backslashreplace"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.lines += len(rows)
        self.timed += len(rows)
        self.seconds += seconds
        self._note()

    def cut(self, lines: int) -> None:
        """Drops all but the first `lines` lines."""
        if lines >= self.lines:
            return
        with self.path.open("rb") as file:
            for _ in range(lines):
                file.readline()
            self._file.truncate(file.tell())
        self.seconds *= lines / self.lines
        self.timed = min(self.timed, lines)
        self.lines = lines

    def _note(self) -> None:
        noted = {"settings": self._settings, "timed": self.timed, "seconds": self.seconds}
        with atomic_write(settings_path(self.path)) as file:
            file.write(json.dumps(noted, indent=2) + "\n")


def settings_path(path: Path) -> Path:
    """The file beside a journal that says with which settings it is written."""
    return path.with_name(path.name + ".settings.json")


@contextmanager
def open_journal(
    path: Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Opens a journal to go on with, or a new one.

    A last line that an interruption left unfinished is cut. One process at a time may write.

    Args:
        settings: what every line depends on, as plain JSON data; a journal that was begun with
            others is refused.
        overwrite: begin anew, whatever is there.

    Raises:
        JournalError: the file was begun with other settings, was not written by this, is broken, or
            is being written by another process.
    """
    settings = json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = settings_path(path)
    if not overwrite and path.exists() and path.stat().st_size and not beside.exists():
        raise JournalError(
            f"{path} exists and has no {beside.name} beside it, so it cannot be gone on with: give "
            "another output, or --overwrite"
        )
    # A file without a line is nothing to go on with, whatever it was begun for.
    begun = path.exists() and path.stat().st_size > 0
    noted = None if overwrite or not begun else _noted(beside)
    if noted is not None:
        _check_settings(path, noted["settings"], settings)
    with path.open("ab") as file:
        _lock(file, path)
        journal = Journal(path, file, settings)
        if noted is None:
            file.truncate(0)
        else:
            journal.lines = _repair(path, file)
            journal.timed = min(int(noted["timed"]), journal.lines)
            journal.seconds = float(noted["seconds"])
        journal._note()
        yield journal


def _noted(beside: Path) -> dict[str, Any] | None:
    if not beside.exists():
        return None
    try:
        noted = json.loads(beside.read_text(encoding="utf-8"))
        return {name: noted[name] for name in ("settings", "timed", "seconds")}
    except (ValueError, KeyError, TypeError):
        raise JournalError(f"{beside}: not a settings file; give another output") from None


def _check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if other:
        told = "; ".join(f"{n} was {before.get(n)!r}, is {now.get(n)!r}" for n in other)
        raise JournalError(
            f"{path} was begun with other settings ({told}): give another output, or --overwrite"
        )


def _repair(path: Path, file: IO[bytes]) -> int:
    """Cuts an unfinished last line; returns the number of whole lines."""
    lines = end = last = 0
    line = b""
    with path.open("rb") as reader:
        for text in reader:
            if text.endswith(b"\n"):
                lines, last, end, line = lines + 1, end, reader.tell(), text
    if line and not _is_json(line):  # the disk never got what was promised
        lines, end = lines - 1, last
    if end < path.stat().st_size:
        file.truncate(end)
    return lines


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, one by one; an unfinished last line is passed over.

    Raises:
        JournalError: a line is broken.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError:
                raise JournalError(
                    f"{path}, line {number}: not JSON; the file was changed or damaged: give "
                    "another output, or --overwrite"
                ) from None


def _lock(file: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":
        return  # no such lock there: two writers at once are the user's own care
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path} is being written by another process") from None

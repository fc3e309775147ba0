"""JSON lines: one reader for all of them, and journals that resume after any interruption.

It knows files and lines. It does not know what stands in a line or how it is computed.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from self_judge.errors import JournalError
from self_judge.storage.atomic import atomic_write, write_json


def loads(text: str) -> Any:
    """JSON, in which what is no number (NaN, Infinity: Python writes them) is read as null."""
    return json.loads(text, parse_constant=lambda _: None)


def parse_lines(
    lines: Iterable[str | bytes],
    where: str | Path,
    error: type[ValueError] = ValueError,
    *,
    torn_is_end: bool = False,
    blank_is_error: bool = False,
    nan_is_null: bool = False,
    remedy: str = "",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines with their line numbers, from 1.

    Args:
        lines: texts, or bytes in UTF-8; each with its newline.
        where: the file, for messages.
        error: what is raised for a line that is no JSON object; it names file and line.
        torn_is_end: a broken last line without a newline ends the lines, as a crash leaves it.
        blank_is_error: a blank line is broken; by default it is passed over.
        nan_is_null: NaN and Infinity are read as null, not as floats.
        remedy: what the message says after "not JSON".
    """
    for number, line in enumerate(lines, start=1):
        if not (blank_is_error or line.strip()):
            continue
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            value = loads(text) if nan_is_null else json.loads(text)
        except ValueError as broken:
            if torn_is_end and line[-1:] not in ("\n", b"\n"):
                return
            reason = getattr(broken, "msg", broken)
            raise error(f"{where}, line {number}: not JSON ({reason}){remedy}") from None
        if not isinstance(value, dict):
            found = type(value).__name__
            raise error(f"{where}, line {number}: expected a JSON object, got {found}")
        yield number, value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that a run writes line by line; a torn last line is left out.

    Blank lines are passed over, and NaN is null.

    Raises:
        ValueError: a line is no JSON object; file and line are named.
    """
    with path.open("rb") as file:
        for _, line in parse_lines(file, path, torn_is_end=True, nan_is_null=True):
            yield line


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, one by one; a torn last line is left out, a blank line is damage.

    Raises:
        JournalError: a line is broken.
    """
    remedy = "; the file was changed or damaged: give another output, or --overwrite"
    with path.open("rb") as file:
        for _, line in parse_lines(
            file, path, JournalError, torn_is_end=True, blank_is_error=True, remedy=remedy
        ):
            yield line


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


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
        return itertools.islice(read_journal(self.path), self.lines)

    def append(self, rows: Sequence[Mapping[str, Any]], seconds: float = 0.0) -> None:
        """Adds lines; once this returns they have reached the disk."""
        if not self.lines:  # whatever is there belongs to an earlier run
            self._file.truncate(0)
            self._note()
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
        write_json(settings_path(self.path), noted)


def settings_path(path: Path) -> Path:
    """The file beside a journal that says with which settings it is written."""
    return path.with_name(path.name + ".settings.json")


@contextmanager
def open_journal(
    path: Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Opens a journal to resume, or a new one.

    A torn last line is cut. One process at a time may write. What the file holds stays until the
    first line of a new journal is there to replace it.

    Args:
        settings: what every line depends on, as plain JSON data; a journal that was begun with
            others is refused.
        overwrite: begin from scratch, whatever is there.

    Raises:
        JournalError: the file was begun with other settings, was not written by this, is broken, or
            is being written by another process.
    """
    settings = json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = settings_path(path)
    # A file without a line is nothing to go on with, whatever it was begun for.
    begun = not overwrite and path.exists() and path.stat().st_size > 0
    if begun and not beside.exists():
        raise JournalError(
            f"{path} exists and has no {beside.name} beside it, so it cannot be resumed: give "
            "another output, or --overwrite"
        )
    noted = _noted(beside) if begun else None
    if noted is not None:
        _check_settings(path, noted["settings"], settings)
    own = not os.path.lexists(path)
    with path.open("ab") as file:
        _lock(file, path)
        journal = Journal(path, file, settings)
        if noted is not None:
            journal.lines = _repair(path, file)
            journal.timed = min(int(noted["timed"]), journal.lines)
            journal.seconds = float(noted["seconds"])
        try:
            yield journal
        except BaseException:
            # What was there before, as a device or a link, is not this journal's to take away.
            if own and not path.stat().st_size:
                with suppress(PermissionError):  # Windows removes no open file
                    path.unlink()
            raise


def _noted(beside: Path) -> dict[str, Any]:
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
    """Cuts a torn last line; returns the number of whole lines."""
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


def _lock(file: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":
        return  # no such lock there: two writers at once are the user's own care
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path} is being written by another process") from None

"""Parses JSON Lines files and writes journals that can be resumed after any interruption.

This module handles files and lines. It does not interpret the lines.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from self_judge.console import masked
from self_judge.errors import JournalError, in_a_line
from self_judge.storage.atomic import atomic_write, loads, naming, writable_to, write_json
from self_judge.storage.lock import only_writer


def as_json(value: Any) -> Any:
    """Returns a value as it is read back from a file of this module, which is plain JSON data.

    NaN and infinity become null, times become ISO text, bytes become Base64 text, and decimals and
    UUIDs become text.

    Raises:
        TypeError: JSON cannot represent a value of this type.
    """
    return loads(json.dumps(value, default=_as_text), nan_is_null=True)


def _as_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"a value of type {type(value).__name__} has no form in JSON")


@contextmanager
def entries_of(
    path: str | Path, error: type[ValueError] = ValueError, remedy: str = ""
) -> Iterator[None]:
    """Names a file in the error if entries of its content are missing or have the wrong type.

    Args:
        path: the file that the `with` block uses.
        error: the exception to raise.
        remedy: the end of its message.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as wrong:
        folder = Path(path).parent  # an error that already names the file, or one next to it
        if str(path if folder == Path() else folder) in str(wrong):
            raise
        why = in_a_line(wrong)
        raise error(f"{path}: entries are missing or not as written ({why}){remedy}") from wrong


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
    """Yields the number of each line, counted from 1, and its JSON object.

    Args:
        lines: strings or UTF-8 bytes, each with its newline.
        where: the file, for error messages.
        error: the exception raised if a line is not a JSON object. Its message includes the file
            and line number.
        torn_is_end: whether to treat a broken last line without a newline as the end of the input.
            A crash can leave such a line.
        blank_is_error: whether to treat a blank line as an error. By default, blank lines are
            skipped.
        nan_is_null: whether to read NaN and Infinity as null instead of floats.
        remedy: text to append to the "not JSON" message.
    """
    for number, line in enumerate(lines, start=1):
        if not (blank_is_error or line.strip()):
            continue
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            value = loads(text, nan_is_null=nan_is_null)
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
    """Yields the objects in a file that a run appends to, and skips a torn last line.

    Blank lines are skipped, and NaN is read as null.

    Raises:
        ValueError: a line is not a JSON object. The message includes the file and line number.
    """
    remedy = "; delete this line"
    with path.open("rb") as file:
        for _, line in parse_lines(file, path, torn_is_end=True, nan_is_null=True, remedy=remedy):
            yield line


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a journal, and skips a torn last line.

    NaN is read as null.

    Raises:
        JournalError: a line is broken or blank.
    """
    remedy = "; the file was changed or damaged: choose another output or pass --overwrite"
    with path.open("rb") as file:
        for _, line in parse_lines(
            file,
            path,
            JournalError,
            torn_is_end=True,
            blank_is_error=True,
            nan_is_null=True,
            remedy=remedy,
        ):
            yield line


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSON Lines file atomically."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Journal:
    """An open journal; see `open_journal`.

    Attributes:
        path: the file.
        lines: the number of complete lines.
        seconds: the time spent on lines, over all sessions.
        timed: the number of lines that `seconds` covers.
    """

    def __init__(self, path: Path, file: IO[bytes], settings: Mapping[str, Any]) -> None:
        self.path = path
        self.lines = 0
        self.seconds = 0.0
        self.timed = 0
        self._file = file
        self._settings = dict(settings)

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields all lines written so far."""
        return itertools.islice(read_journal(self.path), self.lines)

    def append(self, rows: Sequence[Mapping[str, Any]], seconds: float = 0.0) -> None:
        """Appends lines and flushes them to disk (see `as_json` for values that are not JSON)."""
        if not self.lines:  # existing content is from an earlier run
            with naming(self.path):
                self._file.truncate(0)
            self._note()
        text = "".join(json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
        # Lone surrogates in the data become JSON escapes, because UTF-8 cannot encode them.
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        with naming(self.path):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        self.lines += len(rows)
        self.timed += len(rows)
        self.seconds += seconds
        self._note()

    def cut(self, lines: int) -> None:
        """Removes all lines after the first `lines` lines."""
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
    """Returns the path of the settings file, which is next to the journal."""
    return path.with_name(path.name + ".settings.json")


def refuse_special_files(path: Path) -> None:
    """Checks that a journal can be written to a path, before any work is done.

    Raises:
        JournalError: the path or its settings file is a folder, a device, such as /dev/null, or a
            link to nothing, or a file stands in place of its folder.
    """
    for own in (path, settings_path(path)):
        if os.path.lexists(own) and not own.is_file():
            raise JournalError(f"{own}: is not a regular file: choose another output")
    writable_to(path.parent, JournalError)


@contextmanager
def open_journal(
    path: Path, settings: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Opens a journal that resumes an existing file or starts a new one.

    A torn last line is removed. Only one process may write at a time. The old content of the file
    remains until the first line of a new journal is written.

    Args:
        settings: the settings that every line depends on, as plain JSON data. A journal that was
            written with different settings is rejected.
        overwrite: whether to start from scratch even if the file exists.

    Raises:
        JournalError: the file was written with different settings, is not a journal, is broken, or
            is in use by another process.
    """
    settings = masked(as_json(settings))
    refuse_special_files(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = settings_path(path)
    # An empty file always starts a new journal, even if its recorded settings differ.
    resumes = not overwrite and path.exists() and path.stat().st_size > 0
    if resumes and not beside.exists():
        raise JournalError(
            f"{path} exists, but {beside.name} is missing, so it cannot be resumed: choose "
            "another output or pass --overwrite"
        )
    noted = _noted(beside) if resumes else None
    if noted is not None:
        _check_settings(path, noted["settings"], settings)
    own = not os.path.lexists(path)
    lock = path.with_name(path.name + ".lock")
    taken = f"{path} is being written by another process ({{owner}})"
    # Without a buffer, because closing a buffer that cannot be written fails without the path.
    with only_writer(lock, taken, JournalError), path.open("ab", buffering=0) as file:
        journal = Journal(path, file, settings)
        if noted is not None:
            journal.lines = _repair(path, file)
            journal.timed = min(noted["timed"], journal.lines)
            journal.seconds = noted["seconds"]
        try:
            yield journal
        except BaseException:
            # Delete only a file that this call created, not an earlier file, device or link.
            if own and not path.stat().st_size:
                with suppress(PermissionError):  # Windows cannot delete an open file
                    path.unlink()
            raise


def _noted(beside: Path) -> dict[str, Any]:
    try:
        noted = loads(beside.read_bytes())
        timed, seconds = int(noted["timed"]), float(noted["seconds"])
        return {"settings": dict(noted["settings"]), "timed": timed, "seconds": seconds}
    except (ValueError, KeyError, TypeError, OverflowError):
        raise JournalError(f"{beside}: not a settings file; choose another output") from None


def _check_settings(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if other:
        changes = "; ".join(f"{n} was {before.get(n)!r}, now {now.get(n)!r}" for n in other)
        raise JournalError(
            f"{path} was written with different settings ({changes}): choose another output or "
            "pass --overwrite"
        )


def _repair(path: Path, file: IO[bytes]) -> int:
    """Removes a torn last line and returns the number of complete lines."""
    lines = end = last = 0
    line = b""
    with path.open("rb") as reader:
        for text in reader:
            if text.endswith(b"\n"):
                lines, last, end, line = lines + 1, end, reader.tell(), text
    if line and not _is_json(line):  # the disk has lost flushed data
        lines, end = lines - 1, last
    if end < path.stat().st_size:
        file.truncate(end)
    return lines


def _is_json(line: bytes) -> bool:
    try:
        loads(line)
    except ValueError:
        return False
    return True

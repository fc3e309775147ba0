"""Writes files and checkpoint folders atomically, so that they are either complete or absent.

A checkpoint is written to a staging folder, flushed to disk, sealed with a manifest and then
renamed. A folder that has its final name is therefore complete. If it is damaged later, it no
longer matches its manifest. This module does not interpret the contents of files.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
# Values of `resume_from_checkpoint` that select the latest complete checkpoint.
LAST = (True, "true", "True", "auto")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an `OSError` that does not name a file, such as "no space left"."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def writable_to(folder: Path, error: Callable[[str], Exception] = ValueError) -> Path:
    """Returns the folder, or the deepest of its parents that exists.

    Raises:
        error: a file, a device or a link to nothing stands in place of a folder.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise error(f"{there}: is not a folder: choose another output")
    return there


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Opens a temporary text file that replaces `path` when the block ends without an error.

    Args:
        path: the final file. Missing folders are created. The old content remains until the block
            ends, and is kept if the block raises an error.

    Raises:
        ValueError: the path is a folder or a device, such as /dev/null, which must not be replaced,
            or something else stands in place of its folder.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file: choose another output")
    writable_to(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".part")
    try:
        # All these files are JSON. The data may contain lone surrogates, which UTF-8 cannot encode.
        # `backslashreplace` writes them as JSON escapes.
        staging.unlink(missing_ok=True)  # it may be a link
        with (
            naming(path),
            staging.open("x", encoding="utf-8", errors="backslashreplace") as file,
        ):
            yield file
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def loads(text: str | bytes, *, nan_is_null: bool = False) -> Any:
    """Parses JSON. Every JSON file of a user or a run is parsed here.

    Args:
        nan_is_null: whether NaN, infinity and numbers beyond the range of a float become `None`.

    Raises:
        ValueError: the text is not JSON, is not UTF-8, is nested too deeply, or contains a number
            with thousands of digits or an object with a key twice.
    """
    numbers: dict[str, Any] = {}
    if nan_is_null:
        numbers = dict.fromkeys(("parse_constant", "parse_float"), _finite)
        numbers["parse_int"] = lambda digits: int(digits) if len(digits) < 300 else None
    try:
        return json.loads(text, object_pairs_hook=_with_unique_keys, **numbers)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):
            raise ValueError("a number has too many digits") from None
        raise


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # `json` would drop all but the last value
        twice = next(name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in an object")
    return found


def _finite(number: str) -> float | None:
    return value if math.isfinite(value := float(number)) else None


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flushes a file or the entries of a folder to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Flushes a folder to disk and writes a manifest of its files and their sizes."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    for name in files:
        sync(folder / name)
    write_json(folder / MANIFEST, {"files": files})
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync(path)


def integrity_error(folder: Path) -> str | None:
    """Returns the reason why a run cannot resume from a checkpoint, or `None` if it can."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        files = loads(manifest.read_bytes())["files"]
        sizes = {name: int(size) for name, size in files.items()}
    except (ArithmeticError, AttributeError, OSError, KeyError, TypeError, ValueError):
        return f"its {MANIFEST} cannot be read"
    if not sizes:
        return f"its {MANIFEST} lists no files"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def latest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the latest complete checkpoint and a message for each later incomplete checkpoint."""
    skipped: list[str] = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        reason = integrity_error(path)
        if reason is None:
            return path, skipped
        skipped.append(f"{path} is skipped: {reason}")
    return None, skipped


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            yield int(match[1]), path


def commit(finished: Path, target: Path) -> None:
    """Renames a staging folder to its final name, replacing any existing folder."""
    old = _move_away(target) if target.exists() else None
    finished.rename(target)
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_files(target: Path, without: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a staging folder whose files move to `target` if the block ends without an error.

    Args:
        target: the final folder. Its other files are kept.
        without: names of files to delete from `target` afterwards.
    """
    clear_unfinished(target)
    staging = target / UNFINISHED / "files"
    staging.mkdir(parents=True)
    try:
        yield staging
        move_files(staging, target)
        for name in without:
            (target / name).unlink(missing_ok=True)
    finally:
        clear_unfinished(target)


def move_files(finished: Path, target: Path) -> None:
    """Moves all files one by one to the same relative paths in another folder.

    Each move is atomic. If the process is killed between two moves, all files are complete, but
    some are old and some are new.
    """
    written = [path for path in sorted(finished.rglob("*")) if path.is_file()]
    for path in written:
        sync(path)
    for path in written:
        destination = target / path.relative_to(finished)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.replace(destination)
    sync(target)


def remove(folder: Path) -> None:
    """Deletes a checkpoint. A killed process leaves no partial folder under the final name."""
    shutil.rmtree(_move_away(folder), ignore_errors=True)


def _move_away(folder: Path) -> Path:
    """Moves a folder to the staging area, where it can be deleted, and returns its new path."""
    old = folder.parent / UNFINISHED / f"{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    old.parent.mkdir(parents=True, exist_ok=True)
    return folder.rename(old)


def clear_unfinished(folder: Path) -> None:
    """Deletes the unfinished files that a killed process left behind."""
    if (folder / UNFINISHED).is_symlink():
        (folder / UNFINISHED).unlink()
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

"""Files and checkpoint folders that are complete or absent; it knows paths, not what they hold.

A checkpoint is written into a folder aside, brought to disk, sealed with a manifest and renamed.
So a folder under its own name is whole, unless something damaged it later: then it no longer is
what its manifest says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"
# What a run's settings may say for the last whole checkpoint, instead of naming one.
LAST = (True, "true", "True", "auto")


@contextmanager
def atomic_write(path: Path) -> Iterator[TextIO]:
    """Opens a text file to write aside; it takes its name only once the block has ended well.

    Args:
        path: the file to be; missing folders are made. What stood there stays until then, and for
            good when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    try:
        # All these files are JSON: a lone surrogate, which data may hold and which has no UTF-8,
        # becomes JSON's own escape.
        with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON data for people to read, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Brings a folder to disk and writes down which files it holds, and how large they are."""
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
    """Why a checkpoint cannot be resumed from; `None` for a whole one."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"it has no {MANIFEST}, which is written last"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def latest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the most steps, and a line for each later one that is not whole."""
    passed_over: list[str] = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        reason = integrity_error(path)
        if reason is None:
            return path, passed_over
        passed_over.append(f"{path} is passed over: {reason}")
    return None, passed_over


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name)):
            yield int(match[1]), path


def commit(finished: Path, target: Path) -> None:
    """Gives a folder that was written aside its name; what stood under it is taken away first."""
    old = _nameless(target) if target.exists() else None
    finished.rename(target)
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_files(target: Path, without: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write files into; they replace those of the target once the block has ended well.

    Args:
        target: where the files are to be; other files that are there stay.
        without: names of files that are not to be in the target afterwards.
    """
    aside = target / UNFINISHED / "files"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        move_files(aside, target)
        for name in without:
            (target / name).unlink(missing_ok=True)
    finally:
        clear_unfinished(target)


def move_files(finished: Path, target: Path) -> None:
    """Moves all files to the same places under another folder, each of them whole.

    One by one: a kill in between leaves whole files, some of the old and some of the new writing.
    """
    written = [path for path in sorted(finished.rglob("*")) if path.is_file()]
    for path in written:
        sync(path)
    for path in written:
        place = target / path.relative_to(finished)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    sync(target)


def remove(folder: Path) -> None:
    """Takes a checkpoint away at once: a kill in between leaves no half of it under its name."""
    shutil.rmtree(_nameless(folder), ignore_errors=True)


def _nameless(folder: Path) -> Path:
    """Where a folder is once its name is taken from it."""
    aside = folder.parent / UNFINISHED / f"{folder.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    return folder.rename(aside)


def clear_unfinished(folder: Path) -> None:
    """Takes away what a process that died was writing."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)

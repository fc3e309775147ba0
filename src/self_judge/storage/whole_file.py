"""JSON files that are there whole or not at all; it knows paths, not what stands in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
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

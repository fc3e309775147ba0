"""Errors caused by user input, which the command line shows on one line.

Each kind of input has its own error class. Each message states the problem, its location and the
fix.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Invalid run configuration."""


class DataError(ValueError):
    """Invalid data. The message names the source, the record and the field."""


class UnusableRecordError(DataError):
    """A well-formed record that cannot be used. Loading skips and counts such records.

    Attributes:
        reason: a short phrase under which such records are counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


class TemplateError(ValueError):
    """Invalid judge template. The message names the principle and the missing part."""


class EncodingError(ValueError):
    """A tokenizer or chat template that cannot be used."""


class ModelError(ValueError):
    """Unusable model or adapter."""


class EngineError(ValueError):
    """An inference engine that cannot do the requested work."""


class CheckpointError(ValueError):
    """A checkpoint from which a run cannot resume."""


class JournalError(ValueError):
    """An output file that a resumed command cannot continue."""


def in_a_line(error: BaseException) -> str:
    """Returns the error's class and the first non-empty line of its message."""
    text = _lines(error)
    if not text:
        return type(error).__name__
    # If the first line ends in a colon, the details are in the following lines.
    shown = " ".join(text) if text[0].endswith(":") else text[0]
    return f"{type(error).__name__}: {shown:.300}"


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def is_missing(name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether the argument is clearly a local path that does not exist."""
    name = str(name_or_path)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return local and not Path(name).exists()

"""What a user is told went wrong: the errors that the command line shows as one line.

Each stands for one kind of input. The code that raises one says what is wrong, where, and what to
do.
"""

from __future__ import annotations

import os
from pathlib import Path


class ConfigError(ValueError):
    """A run configuration that cannot work; one line: where, what, and what to do."""


class DataError(ValueError):
    """Data that cannot be used: the message says which source, which record and which field."""


class TemplateError(ValueError):
    """A judge template that cannot work; the message names the principle and what is missing."""


class EncodingError(ValueError):
    """A tokenizer or chat template that cannot serve; the message says why and what to do."""


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


class EngineError(ValueError):
    """An engine that cannot do what is asked; the message says which, why and what to do."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from; the message names it and says why."""


class JournalError(ValueError):
    """A file that cannot be resumed; the message says why and what to do."""


def in_a_line(error: BaseException) -> str:
    """The first line that says something, behind the kind of error."""
    text = _lines(error)
    if not text:
        return type(error).__name__
    # A first line that ends in a colon has its point in the next ones.
    told = " ".join(text) if text[0].endswith(":") else text[0]
    return f"{type(error).__name__}: {told:.300}"


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]


def is_missing(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is plainly a path, and nothing is there."""
    name = str(name_or_path)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    return local and not Path(name).exists()

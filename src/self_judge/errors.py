"""Errors caused by user input, each of which the command line shows as one line.

Each kind of input has its own error class. Each message states the problem, its location and the
fix.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ConfigError(ValueError):
    """Raised when a run configuration is invalid. Each argument describes one problem in a line."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class DataError(ValueError):
    """Raised when data is invalid. The message names the source and, if known, record and field."""


class UnusableRecordError(DataError):
    """Raised for a well-formed record that cannot be used. Loading skips and counts such records.

    Attributes:
        reason: a short phrase under which such records are counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


class TemplateError(ValueError):
    """Raised when a judge template is invalid."""


class EncodingError(ValueError):
    """Raised when a tokenizer or chat template cannot be used."""


class ModelError(ValueError):
    """Raised when a model or adapter cannot be used."""


class EngineError(ValueError):
    """Raised when an inference engine cannot do the requested work."""


class CheckpointError(ValueError):
    """Raised when a run cannot resume from a checkpoint."""


class JournalError(ValueError):
    """Raised when a command cannot resume an existing output file."""


def require_type(what: str, given: Any, types: type | tuple[type, ...], wanted: str) -> None:
    """Raises `TypeError` with the argument's name if it does not have one of the types.

    Args:
        what: the name of the argument.
        wanted: the valid values, for the message.
    """
    if not isinstance(given, types):
        raise TypeError(f"{what} must be {wanted}, got {type(given).__name__}")


def suggesting(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns a decorator for functions that refuse other libraries' names for their arguments.

    Args:
        names: for each such name, what to pass instead.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name in names:
                    where = function.__qualname__.removesuffix(".__init__")
                    raise TypeError(f"{where} has no argument {name!r}: pass {names[name]}")
            return function(*args, **kwargs)

        return checked

    return decorate


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


# Endings of files, which names on the Hub do not have.
_DATA = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"),
    *(".gz", ".bz2", ".xz", ".zst"),
)
_FILES = (*_DATA, ".yaml", ".yml", ".safetensors")


def is_data_name(name: str) -> bool:
    """Returns whether the name has the ending of a file of data."""
    return name.lower().endswith(_DATA)


def is_judge_file(name: str) -> bool:
    """Returns whether the name has the ending of a file of settings, such as those of a judge."""
    return name.lower().endswith((".yaml", ".yml"))


def is_missing(name_or_path: str | os.PathLike[str]) -> bool:
    """Returns whether the argument is clearly a local path that does not exist."""
    name = str(name_or_path)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_FILES)
    return local and not Path(name).expanduser().exists()


def check_judge(judge: str) -> None:
    """Raises an error if a judge is a file of settings or a model that does not exist."""
    if not judge.startswith("{"):
        (check_file if is_judge_file(judge) else check_model)(judge)


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises `DataError` if the path is not a file."""
    if not Path(path).is_file():
        what = "is not a regular file" if Path(path).exists() else "no such file"
        raise DataError(f"{path}: {what}")


def check_model(name_or_path: str | os.PathLike[str], remedy: str = "") -> None:
    """Raises `ModelError` if the argument is a missing folder or a file.

    Args:
        remedy: the end of the message for a missing folder.
    """
    if Path(name_or_path).is_file():
        raise ModelError(f"{name_or_path}: is a file; give a model's folder or its ID on the Hub")
    if is_missing(name_or_path):
        raise ModelError(f"{name_or_path}: there is no such folder{remedy and ': '}{remedy}")


def check_data(path: str | os.PathLike[str]) -> None:
    """Raises `DataError` if the argument is empty, or a local path that does not exist."""
    if not str(path):
        raise DataError("the path of the data is empty: name a file, a folder or a dataset")
    if is_missing(path):
        raise DataError(f"{path}: no such file or folder (working folder: {Path.cwd()})")

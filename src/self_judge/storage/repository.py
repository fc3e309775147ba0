"""Finds the files of a model in a folder or on the Hub, and prevents outputs from replacing inputs.

This module does not interpret the contents of the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from self_judge.errors import is_missing


def same_path(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Returns whether two paths refer to the same file or folder, directly or through links."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of the paths does not exist yet
        return os.path.realpath(one) == os.path.realpath(other)


def refuse_overwriting(
    outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raises `ValueError` if an output is also an input, directly or through links."""
    inputs = list(inputs)
    for output in outputs:
        for given in inputs:
            if same_path(output, given):
                raise ValueError(f"{output}: the output would overwrite the input {given}")


def repository_file(
    name_or_path: str | os.PathLike[str], file: str, revision: str | None = None
) -> Path | None:
    """Finds a file of a model, and downloads it if the model is on the Hub.

    Args:
        name_or_path: a folder, or a model ID on the Hub.
        file: the name of the file in the folder or repository.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The path of the file, or `None` if it does not exist or cannot be downloaded. Loading the
        model then reports the reason.
    """
    folder = Path(name_or_path)
    if folder.exists() or is_missing(name_or_path):
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None

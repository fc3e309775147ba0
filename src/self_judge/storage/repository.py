"""Finds the files of a model in a folder or on the Hub, and prevents outputs from replacing inputs.

This module does not interpret the contents of the files.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from self_judge.errors import is_missing

# The files that a model consists of, among other files in its folder.
_MODEL_FILES = (
    "*.safetensors", "*.index.json", "*config.json", "token*", "special_tokens_map.json",
    "vocab*", "merges.txt", "added_tokens.json", "*.jinja", "*.py", "judge.json",
)  # fmt: skip


def same_path(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Returns whether two paths refer to the same file or folder, directly or through links."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of the paths does not exist yet
        return os.path.realpath(one) == os.path.realpath(other)


def refuse_overwriting(
    outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raises `ValueError` if an output is also an input, directly or through links.

    If an input is a model's folder, the files of the model are inputs as well.
    """
    parts = [(given, part) for given in inputs for part in (given, *_model_files(given))]
    for output in outputs:
        for given, part in parts:
            if same_path(output, part):
                raise ValueError(f"{output}: the output would overwrite the input {given}")


def _model_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    if os.path.isdir(path):
        for pattern in _MODEL_FILES:
            yield from Path(path).glob(pattern)


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
    hub_problem()
    try:
        return Path(hf_hub_download(str(name_or_path), file, revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):
        return None


def hub_problem() -> str | None:
    """Returns why files cannot be downloaded from the Hub, or `None`.

    If there is no connection, this process works offline from here on, with the files in the Hub's
    cache. Otherwise, the libraries would retry each request for half a minute.
    """
    problem = _connection_problem()
    if problem is None and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return problem


@functools.cache
def _connection_problem() -> str | None:
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of an HTTP library that differs between versions of the Hub's
        if type(error).__name__ not in ("ConnectError", "ConnectTimeout", "ProxyError"):
            return None
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return f"the Hub cannot be reached ({error})"
    return None


def not_on_hub(name_or_path: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Returns why a model that is not a folder cannot be loaded, or `None` if it may be loaded."""
    name = str(name_or_path)
    if Path(name).exists() or is_missing(name) or not (problem := hub_problem()):
        return None
    try:
        found = [
            try_to_load_from_cache(name, file, revision=revision)
            for file in ("config.json", "adapter_config.json")
        ]
    except HFValidationError:
        return None
    if any(isinstance(path, str) for path in found):
        return None
    return f"is not a folder here, and not in the Hub's cache: {problem}"

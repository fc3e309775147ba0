"""Checks the trainers' arguments, and names the right one in place of another library's.

This module does not load anything.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from self_judge.config.yaml import unknown_key
from self_judge.console import masked
from self_judge.errors import require_type

_JUDGE = "judge_templates: the model judges its own responses"
# What to pass instead of arguments of other trainers.
_INSTEAD = {
    "model_init": "model",
    "tokenizer": "processing_class",
    "reward_funcs": _JUDGE,
    "reward_model": _JUDGE,
    "judge": _JUDGE,
    "reward_processing_classes": _JUDGE,
    "formatting_func": "rows with 'prompt'",
}


def check_names(name: str, parent: type, config: type, given: Iterable[str]) -> None:
    """Raises `TypeError` for an argument that the parent's constructor does not have.

    Args:
        name: the name of the trainer.
        parent: the trainer whose constructor receives the arguments.
        config: the class of the trainer's settings.
        given: the names of the arguments.
    """
    known = list(inspect.signature(parent).parameters)
    settings = [f.name for f in dataclasses.fields(config)]
    for argument in given:
        if argument in known:
            continue
        if argument in _INSTEAD:
            raise TypeError(f"{name} has no argument {argument!r}: pass {_INSTEAD[argument]}")
        if argument in settings:
            raise TypeError(
                f"{name} has no argument {argument!r}: it is a setting, so pass "
                f"args={config.__name__}(..., {argument}=...)"
            )
        raise TypeError(f"{name}: {unknown_key(argument, [*known, *settings])}")


def check_args(args: Any, *valid: type) -> None:
    """Raises `TypeError` unless `args` is unset, of a valid class, or not of TRL."""
    names = " or ".join(dict.fromkeys(kind.__name__ for kind in (*valid, TrainingArguments)))
    if args is None or isinstance(args, valid):
        return
    require_type("args", args, TrainingArguments, names)
    if any(kind.__module__.startswith("trl.") for kind in type(args).__mro__):
        raise TypeError(f"args must be {names}, got {type(args).__name__}")


def model_or_name(argument: str, given: Any) -> Any:
    """Returns the model, or its name or folder as a string.

    Raises:
        TypeError: the argument is neither.
    """
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    order = (
        " (the positional arguments are in TRL's order: model, ref_model, args; pass the others "
        "by name)"
        if isinstance(given, TrainingArguments | PreTrainedTokenizerBase)
        else ""
    )
    wanted = f"a model, a folder or a model ID{order}"
    require_type(argument, given, torch.nn.Module, wanted)
    return given


def name_of(model: Any) -> str:
    """Returns the name of a model that is given as `model_or_name` returns it."""
    return model if isinstance(model, str) else str(model.config.name_or_path)


def check_tokenizer(given: Any) -> None:
    """Raises `TypeError` unless the argument is a tokenizer or `None`."""
    wanted = "a tokenizer (load_tokenizer(NAME) loads one)"
    require_type("processing_class", given, (PreTrainedTokenizerBase, type(None)), wanted)


def check_has_rows(name: str, dataset: Any) -> None:
    """Raises `ValueError` for an empty dataset in memory, on which TRL ends with StopIteration."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"the {name} dataset has no rows")


@contextmanager
def without_secrets(args: TrainingArguments) -> Iterator[None]:
    """Masks access tokens and passwords in the arguments while they are saved with the model."""
    before = {k: v for k, v in vars(args).items() if isinstance(v, (str, list, dict))}
    hidden = {name: value for name, value in masked(before).items() if value != before[name]}
    try:
        vars(args).update(hidden)
        yield
    finally:
        vars(args).update({name: before[name] for name in hidden})

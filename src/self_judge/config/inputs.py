"""Finds missing files, data and models of a command before the slow import of torch.

This module looks at names and at the Hub's cache. It does not read the contents of files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from self_judge.config.yaml import find_file
from self_judge.errors import (
    ConfigError,
    ModelError,
    check_data,
    check_file,
    check_judge,
    check_model,
    is_data_name,
    is_judge_file,
)

if TYPE_CHECKING:
    from self_judge.config.schema import JSFTRun, SelfJudgeRun

_MODELS, _JUDGES, _POLICIES = ("model", "policy"), ("judge", "compare"), ("policy_a", "policy_b")


def check_inputs(given: Mapping[str, Any]) -> None:
    """Finds mistakes in the inputs of the commands that load models.

    Args:
        given: the arguments of a command by name.

    Raises:
        ValueError: a file, data or a model is missing, or a value is empty.
    """
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        if name not in ("section", "dtype") and "" in values:
            raise ConfigError(f"{name} is empty: give a value")
    files = [given.get("input")]
    if given.get("templates"):
        files.append(str(find_file(given["templates"])))
    listed = given.get("data", ())
    data = [*([listed] if isinstance(listed, str) else listed), given.get("prompts")]
    models, judges = ([given.get(name) for name in own] for own in (_MODELS, _JUDGES))
    for policy in map(given.get, _POLICIES):
        # A policy is a model or a file of responses.
        (data if policy and is_data_name(policy) else models).append(policy)
    for check, paths in (
        (check_file, files),
        (check_data, data),
        (check_model, models),
        (check_judge, judges),
    ):
        for path in filter(None, paths):
            check(path)


def check_names(given: Mapping[str, Any]) -> None:
    """Finds models that are neither folders nor in the Hub's cache; see `check_inputs`."""
    for name in (*_MODELS, *_JUDGES, *_POLICIES):
        model = given.get(name)
        if not model or given.get("server"):
            continue
        judge = name in _JUDGES
        settings = judge and (model.startswith("{") or is_judge_file(model))
        if not settings and not (name in _POLICIES and is_data_name(model)):
            own = judge or name == "model"
            _check_name(model, given.get("revision") if own else None)


def check_run(run: JSFTRun | SelfJudgeRun) -> None:
    """Finds a missing model and missing data of a run, before the slow import of torch."""
    from self_judge.config.schema import JSFT_FIRST, JSFTRun

    jsft = isinstance(run, JSFTRun)
    remedy = "" if jsft else JSFT_FIRST
    check_model(run.model.model_name_or_path, remedy)
    for source in (*run.dataset.sources, *run.dataset.eval):
        check_data(source.path)
    _check_name(run.model.model_name_or_path, run.model.revision, remedy)


def _check_name(model: str, revision: str | None, remedy: str = "") -> None:
    """Finds a model that is neither a folder nor in the Hub's cache, without a connection."""
    if not os.path.exists(model):
        from self_judge.storage.repository import not_on_hub

        if problem := not_on_hub(model, revision):
            raise ModelError(f"{model} {problem}" + (remedy and f"; {remedy}"))

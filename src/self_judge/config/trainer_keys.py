"""Checks the sections of a run file that go to classes of TRL, Transformers and PEFT.

The classes' fields are read from the libraries' source files, because importing these libraries
imports torch and takes seconds. The libraries check the values of other types themselves.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_judge.config.yaml import WRONG, converted, unknown_key
from self_judge.errors import ConfigError

_TRAINING = (
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
SOURCES = {
    "SFTConfig": (("trl", "trainer/sft_config.py", "SFTConfig"), *_TRAINING),
    "DPOConfig": (("trl", "trainer/dpo_config.py", "DPOConfig"), *_TRAINING),
    "LoraConfig": (
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ),
}
_SIMPLE = {"int": int, "float": float, "bool": bool, "None": types.NoneType}


@dataclass(frozen=True, slots=True)
class LibraryField:
    """A field of a library's class.

    Attributes:
        type: `int`, `float`, `bool`, `None`, a union of them, or `Any` for other types.
        annotation, default: the type and the default value as in the source; the default is empty
            if the source computes it.
        help: the field's help text, or an empty string.
    """

    type: Any
    annotation: str
    default: str
    help: str


def library_fields(name: str) -> dict[str, LibraryField] | None:
    """Returns the fields of a class in `SOURCES`, without importing the library.

    The result is `None` if a source file or class is not found, such as in a new version of the
    library.
    """
    found: dict[str, LibraryField] = {}
    for package, file, class_name in reversed(SOURCES[name]):
        spec = importlib.util.find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        path = Path(folders[0]) / file if folders else None
        if path is None or not path.is_file():
            return None
        body = ast.parse(path.read_text(encoding="utf-8")).body
        classes = (n for n in body if isinstance(n, ast.ClassDef) and n.name == class_name)
        node = next(classes, None)
        if node is None:
            return None
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                annotation = ast.unparse(item.annotation).strip("'\"")
                if "ClassVar" not in annotation:
                    default, text = _default_and_help(item.value)
                    own = LibraryField(_type(annotation), annotation, default, text)
                    found[item.target.id] = own
    return found


def _default_and_help(value: ast.expr | None) -> tuple[str, str]:
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return (ast.unparse(value) if value else "", "")
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    default = ast.unparse(given["default"]) if "default" in given else ""
    metadata = given.get("metadata")
    try:
        known = ast.literal_eval(metadata) if metadata else {}
    except ValueError:  # a computed text
        known = {}
    return default, str(known.get("help") or "")


def _type(annotation: str) -> Any:
    """Returns the type that an annotation names, or `Any` if it is not simple."""
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(\w+)\]", annotation)
    names = [*optional.groups(), "None"] if optional else annotation.split("|")
    if not all(name.strip() in _SIMPLE for name in names):
        return Any
    return functools.reduce(operator.or_, (_SIMPLE[name.strip()] for name in names))


def check_training_args(
    keys: Iterable[str], valid_names: Iterable[str], section: str = "training_args"
) -> None:
    """Raises an error if a key is not a field of the configuration class.

    Args:
        keys: the keys in the section.
        valid_names: the field names of the class, such as `trl.SFTConfig` or `peft.LoraConfig`.
        section: the section's name for the error message.

    Raises:
        ConfigError: keys are not valid; the message suggests the closest name or the new name.
    """
    _, problems = checked_section(dict.fromkeys(keys), dict.fromkeys(valid_names, Any), section)
    if problems:
        raise ConfigError(*problems)


def check_training_values(
    values: Mapping[str, Any], config_class: type, section: str = "training_args"
) -> dict[str, Any]:
    """Validates keys, numbers and booleans, and converts integers to floats where needed.

    This function checks only fields of type int, float or bool and optional fields of these types.
    The class itself checks its other fields.

    Raises:
        ConfigError: keys are unknown, or values have the wrong type.
    """
    hints = typing.get_type_hints(config_class)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(config_class)}
    checked, problems = checked_section(values, fields, section)
    if problems:
        raise ConfigError(*problems)
    return checked


def checked_section(
    values: Mapping[str, Any], fields: Mapping[str, Any], section: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns the section's values with integers as floats where needed, and its problems.

    Args:
        fields: the names of the valid keys, with their types.
    """
    simple = set(_SIMPLE.values())
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{section}.{unknown_key(str(key), list(fields))}")
            continue
        hint = fields[key]
        # YAML parses a bare `no` as false.
        checked[key] = "no" if key.endswith("_strategy") and value is False else value
        if set(typing.get_args(hint) or (hint,)) <= simple:
            given = converted(hint, value, f"{section}.{key}", problems)
            checked[key] = value if given is WRONG else given
    return checked, problems


def accumulation_steps(global_batch_size: int, per_device: int, processes: int) -> int:
    """Returns the number of micro-batches per optimizer step for a global batch size.

    Raises:
        ConfigError: the global batch size is not a multiple of the micro-batch size times the
            number of processes.
    """
    if per_device < 1:
        raise ConfigError(
            f"training_args.per_device_train_batch_size must be at least 1, got {per_device}"
        )
    if processes < 1:
        raise ConfigError(f"the number of processes must be at least 1, got {processes}")
    at_once = per_device * processes
    steps, rest = divmod(global_batch_size, at_once)
    if rest or not steps:
        fitting = [d for d in range(1, 65) if global_batch_size % (d * processes) == 0]
        advice = (
            f"set training_args.per_device_train_batch_size to one of {fitting}"
            if fitting
            else f"no per-device batch fits {processes} processes; change the number of processes"
        )
        raise ConfigError(
            f"global_batch_size {global_batch_size} is not divisible by {at_once} "
            f"({per_device} per device × {processes} processes): {advice}, or change "
            "global_batch_size"
        )
    return steps

"""Lists the keys of run files, for `self-judge keys` and as a JSON schema for editors.

Types, defaults and help texts come from the dataclasses in `schema.py` and from TRL's and PEFT's
source files.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from self_judge.config.older_names import OLD_NAMES
from self_judge.config.schema import JSFTArgs, JSFTRun, SelfJudgeRun, Source
from self_judge.config.self_training import JudgeArgs, JudgeMember, SelfJudgeArgs
from self_judge.config.trainer_keys import library_fields
from self_judge.config.yaml import type_name, unknown_key
from self_judge.errors import ConfigError

WIDTH = 80
# The classes of the sections that libraries define, by the command that uses them.
_LIBRARIES = {
    "training_args": {"jsft": "SFTConfig", "train": "DPOConfig"},
    "peft_config": {"jsft, train": "LoraConfig"},
}
# Classes in lists, and sections that may be null: with the index of an item in the paths of keys.
_NESTED = {"sources": (Source, ".0"), "judge": (JudgeArgs, ""), "panel": (JudgeMember, ".0")}
_SECTION_HELP = {
    "training_args": "The fields of trl.SFTConfig (jsft) and trl.DPOConfig (train).",
    "peft_config": "The fields of peft.LoraConfig; null means full fine-tuning.",
}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a run file.

    Attributes:
        path: such as `dataset.sources.0.path`.
        type: the type in words.
        default: the default value as YAML, `required`, or an empty string if a library computes it.
        help: one sentence.
        schema: the JSON schema of the value.
    """

    path: str
    type: str
    default: str
    help: str
    schema: dict[str, Any]


def run_keys() -> list[Key]:
    """Returns all keys of the sections that this package defines."""
    found: dict[str, Key] = {}
    for run in (JSFTRun, SelfJudgeRun):
        for key in _keys_of(run, ""):
            found.setdefault(key.path, key)
    return list(found.values())


def library_keys(section: str) -> list[Key]:
    """Returns the keys of `training_args` or `peft_config` in the installed libraries."""
    by_command = {command: library_fields(c) or {} for command, c in _LIBRARIES[section].items()}
    own = {f.name for c in (JSFTArgs, SelfJudgeArgs) for f in dataclasses.fields(c)}
    keys = []
    for name in dict.fromkeys(name for found in by_command.values() for name in found):
        given = {command: found[name] for command, found in by_command.items() if name in found}
        if name.startswith("_") or (section == "training_args" and name in own):
            continue
        field = next(iter(given.values()))
        defaults = {command: _as_yaml(field.default) for command, field in given.items()}
        default = next(iter(defaults.values()))
        if len(set(defaults.values())) > 1:
            default = ", ".join(f"{text} in {command}" for command, text in defaults.items())
        only = "" if len(given) == len(by_command) else f"Only for {', '.join(given)}: "
        kind = field.annotation if field.type is Any else type_name(field.type)
        schema = {} if field.type is Any else _schema(field.type)
        text = f"{only}{_sentence(field.help)}"
        keys.append(Key(f"{section}.{name}", kind, default, text, schema))
    return keys


def described(section: str = "") -> str:
    """Describes the keys whose paths start or end with `section`, in lines of at most 80 columns.

    Raises:
        ConfigError: there is no such key.
    """
    keys = run_keys()
    top = section.partition(".")[0]
    if top in _LIBRARIES:
        keys = library_keys(top)
    chosen = [k for k in keys if f"{k.path}.".startswith(f"{section}.") or not section]
    if not chosen:
        chosen = [k for k in keys if k.path.startswith(section) or k.path.endswith(f".{section}")]
    if not chosen:
        sections = list(dict.fromkeys(k.path.partition(".")[0] for k in run_keys()))
        paths = [k.path for k in keys] if "." in section else [*sections, *_LIBRARIES]
        raise ConfigError(unknown_key(section, paths))
    lines = [line for key in chosen for line in _lines(key)]
    if not section:
        for name, text in _SECTION_HELP.items():
            lines += [name, *_wrapped(f"{text} `self-judge keys {name}` lists them.")]
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """Returns a JSON schema for run files of both kinds.

    Sections have no required keys, because a file may extend another file that contains them.
    """
    sections: dict[str, Any] = {
        "extends": {
            "description": "Files that are loaded first, with paths relative to this file.",
            **_schema(str | list[str]),
        }
    }
    for run in (JSFTRun, SelfJudgeRun):
        sections |= _schema(run)["properties"]
    for name, text in _SECTION_HELP.items():
        keys = library_keys(name)
        described = {k.path.partition(".")[2]: {"description": k.help, **k.schema} for k in keys}
        sections[name] = {
            "description": text,
            "type": ["object", "null"],
            "properties": described,
            "additionalProperties": not keys,
        }
    for new, old in OLD_NAMES.items():
        section, _, key = old.partition(".")
        older = {"deprecated": True, "description": f"The older name of {new}."}
        sections[section]["properties"].setdefault(key, older)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A run file of self-judge",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
    }


def _keys_of(cls: type, where: str) -> Iterator[Key]:
    hints, helps = typing.get_type_hints(cls), _helps(cls)
    for field in dataclasses.fields(cls):
        if not where and field.name in _LIBRARIES:
            continue
        path, hint = f"{where}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _keys_of(typing.cast(type, hint), f"{path}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        text = "required" if default is dataclasses.MISSING else json.dumps(default).strip('"')
        yield Key(path, type_name(hint), text, helps.get(field.name, ""), _schema(hint))
        if field.name in _NESTED:
            kind, item = _NESTED[field.name]
            yield from _keys_of(kind, f"{path}{item}.")


def _helps(cls: type) -> dict[str, str]:
    """Returns the help texts in the docstrings and fields of a class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for field in dataclasses.fields(base):
            found |= {field.name: text} if (text := field.metadata.get("help")) else {}
        arguments = inspect.cleandoc(base.__doc__ or "").partition("\nArgs:\n")[2]
        entry = re.compile(r"^    ([\w, ]+): (.+(?:\n {8}.+)*)", re.MULTILINE)
        for names, text in entry.findall(arguments.split("\n\n")[0]):
            found |= dict.fromkeys(names.split(", "), text)
    return {name: _sentence(text) for name, text in found.items()}


def _sentence(text: str) -> str:
    """Returns the first sentence, in the words of YAML."""
    first = re.split(r"(?<=[^.][.])\s+(?=[A-Z])", " ".join(text.split()))[0]
    first = first.replace("`None`", "`null`").replace("``", "`")
    return first[:1].upper() + first[1:]


def _as_yaml(source: str) -> str:
    try:
        return json.dumps(ast.literal_eval(source)).strip('"') if source else ""
    except (ValueError, TypeError, SyntaxError):  # such as a name
        return source


def _schema(hint: Any) -> dict[str, Any]:
    """Returns the JSON schema of a type of a run file."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        hints, helps = typing.get_type_hints(cls), _helps(cls)
        own = {
            f.name: {
                **({"description": helps[f.name]} if f.name in helps else {}),
                **_schema(hints[f.name]),
            }
            for f in dataclasses.fields(cls)
        }
        return {"type": ["object", "null"], "properties": own, "additionalProperties": False}
    if origin is Literal:
        return {"enum": [*args, *([False] if "off" in args else [])]}  # a bare `off` is false
    if origin in (typing.Union, types.UnionType):
        options = [_schema(option) for option in args]
        if all(list(option) == ["type"] for option in options):
            return {"type": [option["type"] for option in options]}
        return {"anyOf": options}
    if origin is list:
        return {"type": "array", "items": _schema(args[0])}
    if origin is dict:
        more = {} if args[1] is Any else {"additionalProperties": _schema(args[1])}
        return {"type": "object", **more}
    names = {int: "integer", float: "number", bool: "boolean", str: "string"}
    return {"type": names.get(hint, "null")}


def _lines(key: Key) -> Iterator[str]:
    """Yields the path, the default, the type and the help, which move to lines of their own."""
    default = f" ({key.default})" if key.default else ""
    first = f"{key.path}{default}: {key.type}"
    if len(first) <= WIDTH:
        yield first
    else:
        yield f"{key.path}:"
        yield from _wrapped(f"{key.type}{default}")
    yield from _wrapped(key.help)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )

"""Reads YAML files into typed dataclasses, with `extends` and `key.path=value` overrides.

This module checks types and keys, and suggests the closest key for an unknown one. `schema.py`
defines the sections of a run.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import io
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from self_judge.errors import ConfigError

# Names from older versions of Transformers and TRL that are still in use. `older_names.py` reads
# those of run files whose values have not changed.
_RENAMED = {
    "warmup_ratio": "warmup_steps (a number below 1 is a fraction of all steps)",
    "group_by_length": "jsft_args.group_by_length, or train_sampling_strategy: group_by_length",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "max_prompt_length": "max_length and max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "label_pad_token_id": "ignore_index",
    "no_cuda": "use_cpu",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
}

# Stands for a value that cannot be used.
WRONG: Any = object()

# OmegaConf rejects a "${" that does not start a reference. This character, inserted between "$" and
# "{", hides the "${" from OmegaConf.
_HIDDEN = "\ue000"
_NO_REFERENCE = re.compile(r"\$\{(?![A-Za-z_]\w*(\.\w+)*\})")


def _plain(config: Any) -> Any:
    """Converts a parsed file to plain dictionaries and lists and restores each hidden `${`."""
    return _shown_again(OmegaConf.to_container(config, resolve=False))


def _hidden(text: str) -> str:
    return text.replace("${", f"${_HIDDEN}{{")


def resolve_references(tree: dict[str, Any]) -> dict[str, Any]:
    """Replaces `${section.key}` with the value of that key. Any other `${` remains text.

    Raises:
        OmegaConfBaseException: a key does not exist, or a value is `???`.
    """

    def hidden(node: Any) -> Any:
        if isinstance(node, str):
            # ${dataset.seed} remains a reference; ${oc.env:HOME} and ${5} are text
            return _NO_REFERENCE.sub(_hidden("${"), node)
        return _over_text(hidden, node)

    resolved = OmegaConf.to_container(
        OmegaConf.create(hidden(tree)), resolve=True, throw_on_missing=True
    )
    return typing.cast("dict[str, Any]", _shown_again(resolved))


def _shown_again(node: Any) -> Any:
    if isinstance(node, str):
        return node.replace(_hidden("${"), "${")
    return _over_text(_shown_again, node)


def _over_text(change: Callable[[Any], Any], node: Any) -> Any:
    if isinstance(node, dict):
        return {change(key): change(value) for key, value in node.items()}
    return [change(item) for item in node] if isinstance(node, list) else node


def find_file(name: str | Path, folder: Path = Path()) -> Path:
    """Returns the path of a YAML file, relative to a folder or by the name of a shipped file.

    The names of shipped files have no suffix: `hh_jsft` is a run file, and `hh` has templates.

    Raises:
        ConfigError: the name looks like that of a shipped file, but there is none.
    """
    path = folder / name
    if path.is_file() or not re.fullmatch(r"[\w-]+", str(name)):
        return path
    shipped = Path(str(files("self_judge.config"))) / "shipped"
    every = (*shipped.glob("*.yaml"), *shipped.glob("templates/*.yaml"))
    found = {file.stem: file for file in every if not file.stem.endswith("_accelerate")}
    if str(name) in found:
        return found[str(name)]
    raise ConfigError(
        f"{path}: no such file, and no shipped file has this name; shipped files are "
        f"{', '.join(sorted(found))}"
    )


def read_yaml(name: str | Path, opened_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Loads a file and merges it over the files it extends, as plain dictionaries and lists.

    Args:
        name: see `find_file`. `extends` takes the same names, relative to the file that extends.

    Raises:
        ConfigError: a file is missing, is not valid YAML (the message names the line), or extends
            itself.
    """
    path = find_file(name, opened_by[-1].parent if opened_by else Path())
    named_in = f" (named by extends in {opened_by[-1]})" if opened_by else ""
    if os.path.realpath(path) in map(os.path.realpath, opened_by):
        raise ConfigError(f"{path}: extends itself through {opened_by[-1]}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{named_in}")
    try:
        text = path.read_text(encoding="utf-8")
        tree = _plain(OmegaConf.load(io.StringIO(_hidden(text))))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = error.problem or error.context
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from error
    except Exception as error:  # the parsers raise errors of many kinds
        reason = first_line(error) or type(error).__name__
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path}: expected sections such as 'model:', found none")
    bases = tree.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: extends must be a file or a list of files, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, read_yaml(base, (*opened_by, path)))
    return _merge(merged, typing.cast("dict[str, Any]", tree))


def key_lines(name: str | Path, folder: Path = Path()) -> dict[str, str]:
    """Returns `file:line` for every key path in a file and in the files that it extends."""
    path = find_file(name, folder)
    found: dict[str, str] = {}
    extended: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return found

    def visit(node: yaml.Node | None, where: str) -> None:
        items: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            items = [(str(key.value), key, value) for key, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            items = [(str(i), value, value) for i, value in enumerate(node.value)]
        for name, key, value in items:
            own = f"{where}.{name}" if where else name
            if own == "extends":
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for base in bases:
                    extended.update(key_lines(str(base.value), path.parent))
                continue
            found[own] = f"{path}:{key.start_mark.line + 1}"
            visit(value, own)

    visit(root, "")
    return {**extended, **found}


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Applies a `key.path=value` override to `tree`. `build` later checks that the key exists."""
    said = f"override {override!r:.80}"
    path, equals, text = override.partition("=")
    keys = path.strip().lstrip("-").split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{said}: expected key.path=value")
    if keys[0] == "extends":
        raise ConfigError(f"{said}: extends is only allowed in a file")
    try:
        value = _plain(OmegaConf.from_dotlist([f"value={_hidden(text)}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{said}: the value is not valid YAML") from error
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(
                    f"{said}: {'.'.join(keys[:depth])} is a list of length {len(node)}, and "
                    f"{key!r} is not a valid index; indices start at 0"
                )
            position: Any = int(key)
        elif isinstance(node, dict):
            position = key
            if not last and node.get(key) is None:
                node[key] = {}
        else:
            raise ConfigError(
                f"{said}: {'.'.join(keys[:depth])} is {_shown(node)}, which has no key {key!r}"
            )
        if last:
            node[position] = value
        else:
            node = node[position]


def build(cls: type, tree: Any, where: str) -> Any:
    """Builds a dataclass instance and its nested instances from plain dictionaries and lists.

    Args:
        where: the key path of `tree`, which starts error messages. It is empty at the top level.

    Raises:
        ConfigError: keys are unknown or missing, values have the wrong type, or the class's
            `__post_init__` raises an error. The arguments of the error are all these problems.
    """
    problems: list[str] = []
    instance = built(cls, tree, where, problems)
    if problems:
        raise ConfigError(*problems)
    return instance


def built(cls: type, tree: Any, where: str, problems: list[str]) -> Any:
    """Builds an instance like `build`, but appends problems to a list.

    Returns:
        The instance, with default values in place of wrong ones, or `WRONG`.
    """
    if not isinstance(tree, dict):
        problems.append(f"{where or 'the file'}: expected a section with keys, got {tree!r:.60}")
        return WRONG
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    problems += [
        f"{prefix}{unknown_key(str(key), list(hints))}" for key in tree if key not in hints
    ]
    values: dict[str, Any] = {}
    wrong: set[str] = set()
    complete = True
    for f in dataclasses.fields(cls):
        count = len(problems)
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        value = WRONG
        if f.name in tree and not (tree[f.name] is None and _is_section(hints[f.name])):
            value = converted(hints[f.name], tree[f.name], f"{prefix}{f.name}", problems)
        elif required:
            problems.append(f"{prefix}{f.name}: missing")
        if value is not WRONG:
            values[f.name] = value
        elif required and typing.get_origin(hints[f.name]) is list:
            values[f.name] = []  # so that the other values are checked too
        elif required:
            complete = False
        if len(problems) > count:
            wrong.add(f.name)
    if not complete:
        return WRONG
    try:
        return cls(**values)
    except ValueError as error:
        # Wrong values are replaced by defaults, so a message about them may be wrong too.
        paths = (problem.partition(":")[0] for problem in problems)
        wrong |= {path.rpartition(".")[2] for path in paths if path.startswith(prefix)}
        start = f"{where}: " if where else ""
        problems += [
            f"{start}{message}"
            for message in map(str, error.args)
            if not wrong & set(re.findall(r"\w+", message))
        ]
        return WRONG


def _is_section(hint: Any) -> bool:
    """Returns whether `key:` without a value means an empty section rather than null."""
    return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict


def converted(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Checks that `value` has type `hint`, and returns it or `WRONG`.

    Sections become dataclasses, integers become floats where needed, and a false choice becomes
    `off`. No other value is converted. A list is returned without its wrong items.

    Args:
        problems: gets a message for each wrong value, with its key, the expected type and the
            value.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return built(typing.cast(type, hint), value, where, problems)
    if origin is Literal:
        if value is False and "off" in args:
            return "off"  # YAML parses a bare `off` as false
        if value in args:
            return value
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return built(typing.cast(type, option), value, where, problems)
            container = typing.get_origin(option) or option
            if container is float and type(value) is int:
                return float(value)
            if isinstance(container, type) and type(value) is container:
                return converted(option, value, where, problems)
    elif origin is list and isinstance(value, list):
        items = [converted(args[0], x, f"{where}.{i}", problems) for i, x in enumerate(value)]
        return [item for item in items if item is not WRONG]
    elif origin is dict and isinstance(value, dict):
        problems += [
            f"{where}: key {key!r} must be text: quote it"
            for key in value
            if not isinstance(key, str)
        ]
        if args[1] is Any:
            return value
        items_by_key = {
            k: converted(args[1], v, f"{where}.{k}", problems) for k, v in value.items()
        }
        return {key: item for key, item in items_by_key.items() if item is not WRONG}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    problems.append(f"{where}: expected {type_name(hint)}, got {_shown(value)}")
    return WRONG


def type_name(hint: Any) -> str:
    """Describes a type in plain words."""
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        list: "a list",
        dict: "a mapping",
    }
    if dataclasses.is_dataclass(hint):
        return "a section"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    return words.get(typing.get_origin(hint) or hint, str(hint))


def _shown(value: Any) -> str:
    kind = {str: "text", type(None): ""}.get(type(value), type_name(type(value)))
    shown = "null" if value is None else repr(value)
    return f"{kind} {shown:.60}".strip()


def unknown_key(key: str, valid: Sequence[str]) -> str:
    """Returns an error text with the closest valid name, or with the new name of a renamed key."""
    if key in _RENAMED:
        return f"{key}: unknown key; it is now {_RENAMED[key]}"
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if nearest:
        return f"{key}: unknown; did you mean {nearest[0]}?"
    # If there is no close match, list the valid keys, unless there are too many (150 in SFTConfig).
    known = (
        f"valid names are {', '.join(valid)}"
        if len(valid) <= 30
        else "see the class's documentation"
    )
    return f"{key}: unknown; {known}"


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message."""
    return str(error).strip().partition("\n")[0]

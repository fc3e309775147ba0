"""Defines parsed records, maps the columns of raw records, and validates their fields.

The parsers for individual data formats build on this module, which does not import torch.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from self_judge.config.yaml import unknown_key
from self_judge.datatypes import Message, PreferenceRecord
from self_judge.errors import DataError, UnusableRecordError
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.messages import content_of, lost, lost_column
from self_judge.prompting.thoughts import NO_ANSWER, answer_of
from self_judge.storage.atomic import loads

_ROLES = ("system", "user", "assistant", "tool")

# The names that data may give to its columns with a mapping such as {"prompt": "question"}.
COLUMNS = (
    *("prompt", "chosen", "rejected", "system", "history", "score_chosen", "score_rejected"),
    *("instruction", "input", "completions", "messages", "subset"),
    *("context", "response", "responses", "response_a", "response_b", "label"),
)
# The columns that contain a prompt, in order of precedence.
_PROMPTS = ("prompt", "messages", "turns", "instruction")
LABELS = {"label.a": "a", "label.b": "b", "label.tie": "tie"}
# The start of messages that were written as text, and the keys of their first message.
_MESSAGES_AS_TEXT = re.compile(r"""["\s]*\[?\s*\{.*?["'](?:role|from)\\?["']\s*:""", re.DOTALL)
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Parses `name=column` arguments of a command line; see `map_columns`.

    Raises:
        DataError: an argument is not `name=column`, or a name is given twice.
    """
    columns: dict[str, str] = {}
    for argument in given:
        name, equals, column = argument.partition("=")
        if not (name and equals and column):
            raise DataError(f"columns: expected name=column, got {argument!r:.80}")
        if column in COLUMNS and name not in (*COLUMNS, *LABELS):
            if get_close_matches(name, COLUMNS, cutoff=0.8):
                raise DataError(f"columns: {unknown_key(name, COLUMNS)}")
            raise DataError(f"columns: {argument} is the wrong way round: write {column}={name}")
        if any(f",{other}=" in column for other in COLUMNS):
            raise DataError(f"columns: separate the columns with spaces: {argument!r:.80}")
        if name in columns:
            raise DataError(f"columns: {name!r} is given twice")
        columns[name] = column
    return columns


def is_named(column: str, usual: Sequence[str]) -> bool:
    """Returns whether a word in a column's name begins with a usual name, and none is a negation.

    "better answer" and "chosenText" are named as usual, but "unaccepted" and "not chosen" are not.
    """
    words = [word.lower() for word in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", column)]
    return not {"not", "non", "no"} & {*words} and any(w.startswith(tuple(usual)) for w in words)


def map_columns(
    record: Mapping[str, Any], columns: Mapping[str, str], where: RecordRef
) -> dict[str, Any]:
    """Returns a raw record with renamed columns.

    Args:
        columns: the column in the data for each name in `COLUMNS`, such as `{"prompt":
            "question"}`. The names `label.a`, `label.b` and `label.tie` give the values of the
            column `label` in the data: `{"label": "winner", "label.a": "model_1"}`.
        where: the record, for error messages.

    Raises:
        DataError: a name is unknown, or the record lacks a column or has another label.
    """
    renamed = {name: column for name, column in columns.items() if name not in LABELS}
    for name, column in renamed.items():
        if name not in COLUMNS:
            raise DataError(f"{where.source}: columns.{unknown_key(name, (*COLUMNS, *LABELS))}")
        if column not in record:
            found = sorted(map(str, record))
            raise where.error(column, f"is missing (columns.{name}); found {found}")
    others = {name: v for name, v in record.items() if name not in renamed.values()}
    mapped = {f"{name} (replaced)" if name in renamed else name: v for name, v in others.items()}
    mapped.update({name: record[column] for name, column in renamed.items()})
    labels = {columns[name]: label for name, label in LABELS.items() if name in columns}
    if len({*renamed.values()}) + len(labels) < len(columns):
        twice = next(c for c, n in Counter(columns.values()).items() if n > 1)
        raise DataError(f"{where.source}: columns: {twice!r} is given for two names")
    if labels:
        value = str(where.value(mapped, "label"))
        if value not in labels:
            raise where.error("label", f"is {value!r:.40}, expected one of {', '.join(labels)}")
        mapped["label"] = labels[value]
    return mapped


def listed(value: Any) -> Any:
    """Returns the list in a text; other values are unchanged.

    Files without lists, such as CSV, contain them as JSON or as Python shows them.
    """
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    for parse in (partial(loads, nan_is_null=True), ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if isinstance(parsed := parse(value), list):
                return parsed
    return value


def prompt_columns(record: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a record that form its prompt; the first one contains the question.

    The list is empty if the record has no prompt. `input` is a part of the prompt only with
    `instruction`.
    """
    name = next((name for name in _PROMPTS if record.get(name) is not None), None)
    own = () if name is None else (name, "system", "history")
    return [*own, "input"] if name == "instruction" else [*own]


def question_columns(record: Mapping[str, Any]) -> list[str]:
    """Returns the columns of a record that form the question that the judge sees."""
    return ["context"] if record.get("context") is not None else prompt_columns(record)


def unused_text(record: Mapping[str, Any], used: Collection[str]) -> list[str]:
    """Returns the names of columns that contain text and are not in `used`."""
    return [name for name, value in record.items() if name not in used and _has_text(value)]


def _has_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple)) and any(map(_has_text, items))


class UnusedText:
    """Collects the text columns that a command does not use, and reports them in one line.

    Args:
        source: the source, for the line.
        used: returns the columns that the command uses of a record; see `prompt_columns`.
        say: prints the line.
    """

    def __init__(
        self,
        source: str,
        used: Callable[[Mapping[str, Any]], Collection[str]],
        say: Callable[[str], None],
    ) -> None:
        self._source = source
        self._used = used
        self._say: Callable[[str], None] | None = say
        self._found: Counter[str] = Counter()

    def add(self, record: Mapping[str, Any]) -> None:
        """Notes the unused text columns of a record."""
        if self._say is not None:
            self._found.update(unused_text(record, self._used(record)))

    def report(self) -> None:
        """Prints the line if there are unused text columns. Later calls do nothing."""
        if self._say is not None and self._found:
            self._say(f"{self._source}: unused columns with text: {', '.join(self._found)}")
        self._say = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """The result of parsing one raw record.

    Attributes:
        record: the parsed record, or `None` if it is unusable.
        skipped: a short phrase for each skipped part, with the reason. `"record: …"` means that the
            whole record is skipped. `"pair: …"` means that only a pair is skipped, and the
            demonstration is still usable. Equal phrases are counted together.
        removed: a short phrase for each part removed from a usable record. Equal phrases are
            counted together.
        unused: the columns that contain text but are not part of the parsed record.
    """

    record: PreferenceRecord | None
    skipped: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def is_held_out(prompt: str, fraction: float) -> bool:
    """Returns whether a prompt is held out, based only on a hash of its text.

    The held-out prompts are therefore the same for every training stage, seed, data order and
    number of processes. A prompt is never in both subsets.
    """
    digest = hashlib.sha256(prompt.strip().encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def first_question(record: PreferenceRecord) -> str:
    """Returns the first user message, whose text determines whether the record is held out."""
    return next(m["content"] for m in record.prompt if m["role"] == "user")


def judge_context(record: PreferenceRecord) -> str:
    """Returns the dialogue text for a record's judge prompts, in both training and inference."""
    return dialogue_text(record.prompt) if record.context is None else record.context


def merge_turns(messages: Iterable[Message]) -> list[Message]:
    """Removes empty turns and joins consecutive turns of the same role, as chat templates require.

    Real data contains both kinds of turns. For example, an answer may contain a second "Assistant:"
    header, or a user may ask again after an empty answer.
    """
    merged: list[Message] = []
    for message in messages:
        if not message["content"].strip():
            continue
        if merged and merged[-1]["role"] == message["role"] != "tool":
            content = merged[-1]["content"] + "\n\n" + message["content"]
            merged[-1] = {"role": message["role"], "content": content}
        else:
            merged.append(message)
    return merged


def pair_problem(chosen: str, rejected: str) -> str:
    """Returns the reason why two responses cannot be judged as a pair, or `""` if they can."""
    better, worse = answer_of(chosen), answer_of(rejected)
    if better is None or worse is None:
        return NO_ANSWER
    return "identical responses" if better == worse else ""


@dataclass(frozen=True, slots=True)
class RecordRef:
    """Reads a record's fields, and raises errors that name the record's source and its place.

    The place is the record's index (from 0), or its line number (from 1) if `line` is given.
    """

    source: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        place = f"record {self.index}" if self.line is None else f"line {self.line}"
        return f"{self.source}, {place}"

    def error(self, field: str, problem: str) -> DataError:
        """Creates an error about a field of this record."""
        return DataError(f"{self}, field {field!r}: {problem}")

    def expected(self, what: str, value: Any, field: str) -> DataError:
        """Creates an error about a value of the wrong type."""
        return self.error(field, f"expected {what}, got {type(value).__name__}")

    def value(self, holder: Mapping[str, Any], name: str, path: str = "") -> Any:
        """Returns `holder[name]`; `path` is the path of `holder` in the record."""
        if name not in holder:
            field = f"{path}.{name}" if path else name
            raise self.error(field, f"is missing; found {sorted(map(str, holder))}")
        return holder[name]

    def text(self, holder: Mapping[str, Any], name: str, path: str = "") -> str:
        """Returns the string `holder[name]`."""
        field = f"{path}.{name}" if path else name
        value = self.value(holder, name, path)
        if not isinstance(value, str):
            raise self.expected("text", value, field)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            problem = "is not valid Unicode: it contains an unpaired surrogate"
            raise self.error(field, problem) from None
        return value

    def one_of(self, holder: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
        """Returns the string `holder[name]`, or the known name that it is or begins with.

        Upper and lower case are the same, so that "Safety" and "safety-refuse" both are `safety`.
        """
        text = self.text(holder, name).strip()
        begun = (own for own in known if f"{text}-".lower().startswith(f"{own}-".lower()))
        return next(begun, text)

    def number(self, value: Any, field: str) -> float | None:
        """Converts a number or numeric string to a float.

        The result is `None` for null, NaN, infinity and non-numeric text such as "N/A".
        """
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise self.expected("a number or text", value, field)
        try:
            number = float(value)
        except (OverflowError, ValueError):
            return None
        return number if math.isfinite(number) else None

    def items(self, holder: Mapping[str, Any], name: str) -> list[Any]:
        """Returns the list `holder[name]`."""
        value = self.value(holder, name)
        if not isinstance(value, list):
            raise self.expected("a list", value, name)
        return list(value)

    def texts(self, holder: Mapping[str, Any], name: str) -> list[str]:
        """Returns the non-empty list of strings `holder[name]`."""
        given = {f"{name}[{i}]": text for i, text in enumerate(self.items(holder, name))}
        if not given:
            raise self.error(name, "expected a non-empty list of strings")
        return [self.text(given, at) for at in given]

    def refuse_lost_columns(self, record: Mapping[str, Any]) -> None:
        """Raises `UnusableRecordError` if the record has a column with tools or images."""
        if what := lost_column(record):
            raise self._unusable("", what, f"a column {what!r}")

    def _unusable(self, at: str, what: str, reason: str) -> UnusableRecordError:
        return UnusableRecordError(
            f"{self}{at}: has {what}, which cannot be judged as text: remove such records",
            reason=reason,
        )

    def dialogue(self, value: Any, field: str) -> Any:
        """Returns messages for a single message or messages as text; other values are unchanged.

        Files without lists, such as CSV, contain messages as JSON or as a Python list.
        """
        if isinstance(value, Mapping):
            return [value]
        if not (isinstance(value, str) and _MESSAGES_AS_TEXT.match(value)):
            return value
        for parse in (loads, ast.literal_eval):
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, str):
                return self.dialogue(parsed, field)
            items = parsed if isinstance(parsed, list) else [parsed]
            are_messages = all(
                isinstance(item, Mapping) and any(keys <= item.keys() for keys in _MESSAGE_KEYS)
                for item in items
            )
            return items if are_messages else value
        if value.lstrip().startswith("[") and '"content' in value.replace("'", '"'):
            raise self.error(
                field, f"looks like messages as text, but is not JSON: {value.strip()[:40]!r}"
            )
        return value

    def earlier(self, record: Mapping[str, Any]) -> list[Message]:
        """Returns the messages before the prompt, from the columns `system` and `history`.

        `history` contains messages, or pairs of a question and an answer.
        """
        system = record.get("system") or ""
        if not isinstance(system, str):
            raise self.expected("text", system, "system")
        history = self.dialogue(record.get("history") or [], "history")
        if isinstance(history, str):
            try:
                history = loads(history) if history.strip() else []
            except ValueError:
                raise self.expected("a list of messages or pairs", history, "history") from None
        messages: list[Message] = []
        if system.strip():
            messages.append({"role": "system", "content": self.text(record, "system").strip()})
        if isinstance(history, list) and all(isinstance(turn, (list, tuple)) for turn in history):
            if any(len(turn) != 2 for turn in history):
                raise self.error("history", "expected pairs of a question and an answer")
            roles = ("user", "assistant")
            history = [
                {"role": role, "content": text}
                for turn in history
                for role, text in zip(roles, turn, strict=True)
            ]
        return messages + self.messages(history, "history")

    def after_earlier(self, record: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
        """Returns a prompt with the messages in the columns `system` and `history` before it."""
        earlier = self.earlier(record)
        own = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
        if own and earlier[:1] and earlier[0]["role"] == "system":
            if own[0]["content"].strip() != earlier[0]["content"]:
                raise self.error("system", "differs from the system message in the prompt")
            earlier = earlier[1:]
        return [*own, *earlier, *prompt[len(own) :]]

    def messages(self, value: Any, field: str) -> list[Message]:
        """Validates a list of messages and returns their roles and text content.

        Raises:
            UnusableRecordError: a message contains anything other than text (see `messages.lost`).
        """
        value = self.dialogue(value, field)
        if not isinstance(value, list):
            raise self.expected("text or a list of messages", value, field)
        messages: list[Message] = []
        for number, message in enumerate(value):
            at = f"{field}[{number}]"
            if not isinstance(message, Mapping):
                raise self.expected("a message", message, at)
            role = self.text(message, "role", at)
            if role not in _ROLES:
                raise self.error(f"{at}.role", f"is {role!r}, expected one of {', '.join(_ROLES)}")
            if what := lost(message):
                raise self._unusable(f", field {at!r}", what, f"a message with {what}")
            self.value(message, "content", at)
            content = {"content": content_of(message)}
            messages.append({"role": role, "content": self.text(content, "content", at)})
        return messages

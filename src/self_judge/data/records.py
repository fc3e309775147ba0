"""Defines parsed records, and validates the fields of raw records.

The parsers for individual data formats build on this module, which does not import torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from self_judge.datatypes import Message, PreferenceRecord
from self_judge.errors import DataError, UnusableRecordError
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.messages import content_of, lost, lost_column
from self_judge.prompting.thoughts import NO_ANSWER, answer_of

_ROLES = ("system", "user", "assistant", "tool")


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
    """

    record: PreferenceRecord | None
    skipped: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


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
    """Reads a record's fields, and raises errors that name the record's source and index."""

    source: str
    index: int

    def error(self, field: str, problem: str) -> DataError:
        """Creates an error about a field of this record."""
        return DataError(f"{self.source}, record {self.index}, field {field!r}: {problem}")

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

    def refuse_lost_columns(self, record: Mapping[str, Any]) -> None:
        """Raises `UnusableRecordError` if the record has a column with tools or images."""
        if what := lost_column(record):
            raise self._unusable("", what, f"a column {what!r}")

    def _unusable(self, at: str, what: str, reason: str) -> UnusableRecordError:
        return UnusableRecordError(
            f"{self.source}, record {self.index}{at}: has {what}, which cannot be judged as text: "
            "remove such records",
            reason=reason,
        )

    def messages(self, value: Any, field: str) -> list[Message]:
        """Validates a list of messages and returns their roles and text content.

        Raises:
            UnusableRecordError: a message contains anything other than text (see `messages.lost`).
        """
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

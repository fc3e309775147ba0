"""The layout of a chat: the template's structure as token ids, with slots for the messages.

This module uses one chat template and its tokenizer. It does not depend on the message contents.

The template is rendered with placeholders, which show the positions of the message contents. All
other text is structure, which is tokenized once. This is the ChatML layout for the roles user and
assistant, with the ending `closed`:

    rendered  <|im_start|>user↵ zqcontent0qz <|im_end|>↵<|im_start|>assistant↵ zqcontent1qz …
    layout    (ids of structure) Slot(0)     (ids of structure)                Slot(1)     (ids)

The three endings differ only in the last part:

    closed  … Slot(1) <|im_end|>↵                          a whole dialogue, for training
    prompt  … Slot(0) <|im_end|>↵<|im_start|>assistant↵    ends with the generation prompt
    open    … Slot(1)                                      the next token continues the content
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jinja2.exceptions import TemplateError as JinjaError

from self_judge.datatypes import Message
from self_judge.errors import EncodingError, in_a_line
from self_judge.prompting.content_tokenizer import ContentTokenizer
from self_judge.prompting.template_source import CLOCK, at_date, literals_in, written_in

Ending = Literal["closed", "prompt", "open"]


class ContentChangedError(EncodingError):
    """Raised if a template changes message content in a way that layouts cannot express."""


# The padding around each placeholder shows how the template trims the message content (see
# `_trimmed`). These examples show the padding that remains before the placeholder (the padding
# after the placeholder mirrors it):
#
#     ↵↵↵↵↵ tab tab zqcontent0qz   {{ content }}             trims nothing
#           tab tab zqcontent0qz   {{ content.strip('\n') }} trims newlines (Qwen 3)
#                   zqcontent0qz   {{ content | trim }}      trims all whitespace
#
# Templates themselves do not write two tabs or five newlines.
_TABS, _NEWLINES = "\t\t", "\n\n\n\n\n"
# Message contents that reveal whether a template quotes, escapes, replaces, wraps, cuts or trims
# them. "#" is replaced by the number of the message.
_ODD = (
    "Ab# \"c\" 'd' \\e\\n &amp; <f> {{ g }} {% h %} {i} ${j} [k]\r\n\r\n* l\tm  n\n\n\n"
    "### \u00e9 \u65e5\u672c \U0001f642 \u200b 1,234.50 https://example.org/?a=b&c=d"
)
_PROBES = (
    _ODD,
    " \n\t\u00a0# is it \u00a0\t\n ",
    "0042.0",
    '{"a": ["#"]}',
    "#",
    "word " * 8000 + _ODD,
)
# Chats in which a template may inspect contents (see `ChatLayouts.inspected`).
_INSPECTED_SHAPES = (
    (("user", "assistant", "user"), True),
    (("user", "assistant"), False),
    (("system", "user"), True),
)
# A template is code. For example, it may call a method of an undefined value or divide by zero.
_TEMPLATE_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError),
    ValueError,
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")
_GUARDED_SHAPES = (
    ("user",),
    ("user", "assistant"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
)
_SYSTEM_SHAPES: tuple[tuple[tuple[str, ...], Ending], ...] = (
    (("system", "user"), "prompt"),
    (("system", "user", "assistant"), "closed"),
    (("system", "user", "assistant", "user"), "prompt"),
)


@dataclass(frozen=True, slots=True)
class Slot:
    """The position of a message in a layout, and how the template trims its content.

    The ids of a slot are those of `lead + content`, tokenized after `anchor`.
    """

    message: int
    anchor: str  # text that precedes the content during tokenization; its ids are dropped
    # The trailing spaces of the structure. Tokenizers attach them to the next word: "Human: Hi"
    # becomes "Human", ":", " Hi". The structure then ends with ":" and the lead of the slot is " ".
    lead: str
    strip_left: str | None  # as in str.lstrip: None strips all whitespace, "" strips nothing
    strip_right: str | None


@dataclass(frozen=True, slots=True)
class _Gap:
    """The position of a message's content in the rendered text."""

    message: int
    strip_left: str | None
    strip_right: str | None

    def trim(self, content: str) -> str:
        return content.lstrip(self.strip_left).rstrip(self.strip_right)


# The slots and the ids of the structure between them. These ids do not depend on the messages.
Layout: TypeAlias = tuple[Slot | tuple[int, ...], ...]


class ChatLayouts:
    """The layouts of one chat template, each computed once and cached.

    Args:
        text: the tokenizer that renders the template and tokenizes its structure. The tokens in
            the structure become control tokens.
        chat_template, chat_template_kwargs: a Jinja chat template and its arguments, including
            `CLOCK` if the template reads the clock.

    Attributes:
        takes_system: whether the template supports system messages in all prompts and dialogues.

    Raises:
        EncodingError: the template drops, repeats or changes the content of a message, or renders
            differently each time.
    """

    def __init__(
        self,
        text: ContentTokenizer,
        chat_template: str,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        self._text = text
        values = dict(chat_template_kwargs)
        if CLOCK in values:
            chat_template = at_date(chat_template, values.pop(CLOCK))
        self._render: Callable[..., Any] = functools.partial(
            text.tokenizer.apply_chat_template,
            chat_template=chat_template,
            tokenize=False,
            **values,
        )
        self._pieces = functools.lru_cache(maxsize=512)(self._split)
        self.of = functools.lru_cache(maxsize=512)(self._layout)
        self._pieces(("user",), True)  # every usable template renders a user turn
        self._guard_structure(chat_template)
        self._literals = literals_in(chat_template)
        self.of(("user",), "prompt")
        self.takes_system = True
        try:
            for roles, ending in _SYSTEM_SHAPES:
                self.of(roles, ending)
        except ContentChangedError:
            raise
        except EncodingError:  # Gemma rejects system messages; other templates drop them
            self.takes_system = False

    def messages_of(self, prompt: str) -> list[Message] | None:
        """Returns the messages that the template renders as `prompt`, or `None`."""
        found: list[list[Message]] = []
        for head in ((), ("system",)) if self.takes_system else ((),):
            roles: tuple[str, ...] = (*head, "user")
            with contextlib.suppress(EncodingError):
                while contents := _contents(self._pieces(roles, True), prompt):
                    pairs = zip(roles, contents, strict=True)
                    found.append([Message(role=role, content=text) for role, text in pairs])
                    roles = (*roles, "assistant", "user")
        # A question could contain all other turns as text, so choose the candidate with the least
        # content.
        return min(found, key=_characters, default=None)

    def inspected(
        self, roles: tuple[str, ...], contents: Sequence[str], generation: bool
    ) -> str | None:
        """Returns what in the contents makes the template write them in another way, or `None`.

        A layout has the template's branch for plain words. Another branch needs one of the texts
        in the template itself ("/no_think"), or an empty message.
        """
        search = self._inspecting and self._inspecting.search
        found = next(filter(None, map(search, contents)), None) if search else None
        if found is None and all(map(str.strip, contents)):
            return None
        with contextlib.suppress(ContentChangedError):
            self._compare_rendered(roles, contents, generation)
            return None
        return repr(found[0]) if found else "no text"

    @functools.cached_property
    def _inspecting(self) -> re.Pattern[str] | None:
        found = "|".join(map(re.escape, filter(self._is_inspected, self._literals)))
        return re.compile(found) if found else None

    def _is_inspected(self, literal: str) -> bool:
        for roles, generation in _INSPECTED_SHAPES:
            for text in (literal, f"x {literal}", f"{literal} x"):
                try:
                    self._compare_rendered(roles, [text] * len(roles), generation)
                except ContentChangedError:
                    return True
                except EncodingError:  # some templates reject some roles
                    break
        return False

    def _compare_rendered(
        self, roles: tuple[str, ...], contents: Sequence[str], generation: bool
    ) -> None:
        rendered = self._rendered(roles, contents, generation)
        self._compare(roles, self._pieces(roles, generation), contents, rendered)

    def _guard_structure(self, chat_template: str) -> None:
        """Prevents message content from producing the tokens that the template writes."""
        ids: set[int] = set()
        for roles in _GUARDED_SHAPES:
            for generation in (False, True):
                with contextlib.suppress(EncodingError):  # some templates reject some roles
                    for piece in self._pieces(roles, generation):
                        ids |= set(self._structure(piece)) if isinstance(piece, str) else set()
        self._text.guard(ids, written_in(chat_template))

    def _layout(self, roles: tuple[str, ...], ending: Ending) -> Layout:
        *pieces, tail = self._pieces(roles, ending == "prompt")
        parts: list[Slot | tuple[int, ...]] = []
        before = lead = ""
        for piece in pieces:
            if isinstance(piece, str):
                before, lead = self._text.without_lead(piece)
                if before:
                    parts.append(self._structure(before, at_start=not parts))
            else:
                anchor = self._text.anchor_after(before, at_start=not parts)
                parts.append(Slot(piece.message, anchor, lead, piece.strip_left, piece.strip_right))
        assert isinstance(tail, str)
        if ending == "prompt":
            tail, _ = self._text.without_lead(tail)
        if tail and ending != "open":
            parts.append(self._structure(tail))
        for token in self._text.unguarded(i for p in parts if isinstance(p, tuple) for i in p):
            raise EncodingError(
                f"the chat template writes the added token {token!r} for the roles "
                f"{'/'.join(roles)}, and message content can produce it as well: mark it as "
                "special in the tokenizer"
            )
        return tuple(parts)

    def _structure(self, text: str, at_start: bool = False) -> tuple[int, ...]:
        anchor = "" if at_start else self._text.anchor
        return tuple(self._text.encode_after(anchor, text))

    def _split(self, roles: tuple[str, ...], generation: bool) -> tuple[str | _Gap, ...]:
        """Renders a chat and splits it at the message contents. The last part is structure."""
        padded = [f"{_NEWLINES}{_TABS}zqcontent{i}qz{_TABS}{_NEWLINES}" for i in range(len(roles))]
        rendered = self._rendered(roles, padded, generation)
        found = [
            (m.start(), m.end(), int(m[1]))
            for m in re.finditer(r"zqcontent(\d+)qz", rendered)
            if int(m[1]) < len(roles)
        ]
        counts = Counter(i for *_, i in found)
        for i, role in enumerate(roles):
            if counts[i] != 1:
                raise EncodingError(
                    f"the chat template writes the content of a {role!r} message "
                    f"{counts[i]} times for the roles {'/'.join(roles)}: the "
                    "content must appear exactly once"
                )
        pieces: list[str | _Gap] = []
        cursor = 0
        # Structure and then padding precede each placeholder, and padding follows it. `cursor` is
        # the end of the text that `pieces` already contains.
        for start, end, i in found:
            before, strip_left = _trimmed(rendered[cursor:start])
            # The padding after the placeholder mirrors the padding before it, so reverse the text.
            following = rendered[end : end + len(_NEWLINES + _TABS)]
            left, strip_right = _trimmed(following[::-1])
            cursor = end + len(following) - len(left)
            pieces += [before, _Gap(i, strip_left, strip_right)]
        pieces.append(rendered[cursor:])
        for probe in _PROBES:
            contents = [probe.replace("#", str(i)) for i in range(len(roles))]
            self._compare(roles, pieces, contents, self._rendered(roles, contents, generation))
        return tuple(pieces)

    def _rendered(self, roles: Sequence[str], contents: Sequence[str], generation: bool) -> str:
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
        for _ in range(3):  # another thread may draw random numbers at the same time
            state = random.getstate()
            try:
                rendered = str(self._render(messages, add_generation_prompt=generation))
            except (JinjaError, *_TEMPLATE_ERRORS) as error:
                why = str(error) if isinstance(error, JinjaError) else in_a_line(error)
                raise EncodingError(
                    f"the chat template cannot render the roles {'/'.join(roles)}: {why}"
                ) from error
            if random.getstate() == state and not _ADDRESS.search(rendered):
                return rendered
        raise ContentChangedError(
            "the chat template renders differently every time (it draws random numbers, or writes "
            "a memory address): set templates.chat to a template that depends only on the messages"
        )

    @staticmethod
    def _compare(
        roles: Sequence[str],
        pieces: Sequence[str | _Gap],
        contents: Sequence[str],
        rendered: str,
    ) -> None:
        """Raises an error if the template changes contents in any way other than trimming."""
        ours = ""
        spans: list[tuple[int, int, int]] = []  # start, end, message
        for piece in pieces:
            if isinstance(piece, _Gap):
                content = piece.trim(contents[piece.message])
                spans.append((len(ours), len(ours) + len(content), piece.message))
                ours += content
            else:
                ours += piece
        if rendered == ours:
            return
        at = common_length(ours, rendered)
        start, _, message = min(spans, key=lambda span: max(span[0] - at, at - span[1]))
        inside = max(0, at - start)
        raise ContentChangedError(
            f"the chat template changes the content of a {roles[message]!r} message: "
            f"{contents[message][max(0, inside - 12) : inside + 24]!r} is written as "
            f"{rendered[max(0, at - 12) : at + 24]!r}. Set templates.chat to a template that "
            "writes contents unchanged or trimmed"
        )


def common_length(first: Any, second: Any) -> int:
    """Returns the length of the longest common prefix of two strings or lists."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _contents(pieces: Sequence[str | _Gap], prompt: str) -> list[str] | None:
    """Returns the message contents in `prompt`, or `None` if `prompt` does not match the pieces."""
    # pieces "Q: " _ "\nA: " _ "\nQ: " _ "\nA:"    prompt "Q: a\nA: b\nQ: c\nA:"    -> a b c
    contents: dict[int, str] = {}
    before, *rest = pieces
    *inner, tail = rest
    tail = str(tail) if prompt.endswith(str(tail)) else str(tail).rstrip(" ")
    if not (prompt.startswith(str(before)) and prompt.endswith(tail)):
        return None
    at, last = len(str(before)), len(prompt) - len(tail)
    texts = [piece for piece in inner if isinstance(piece, str)]
    for gap in (piece for piece in inner if isinstance(piece, _Gap)):
        following = texts.pop(0) if texts else None
        end = last if following is None else prompt.find(following, at, last)
        content = prompt[at : max(at, end)]
        # A template that trims does not write whitespace around contents.
        if not content.strip() or content != gap.trim(content):
            return None
        contents[gap.message] = content
        at = end + len(following or "")
    return [contents[i] for i in range(len(contents))]


def _characters(messages: Sequence[Message]) -> int:
    return sum(len("".join(message["content"].split())) for message in messages)


def _trimmed(before: str) -> tuple[str, str | None]:
    """Returns `before` without the padding at its end, and the characters the template trims.

    See `_TABS`. The second return value is an argument for `str.strip`: `None`, `"\\n"` or `""`.
    """
    if not before.endswith(_TABS):
        return before, None
    before = before[: -len(_TABS)]
    if not before.endswith(_NEWLINES):
        return before, "\n"
    return before[: -len(_NEWLINES)], ""


def system_into_user(messages: Sequence[Message]) -> list[Message]:
    """Moves the system text to the first user turn, for templates without a system role."""
    system, *rest = messages
    if not system["content"].strip() and rest:
        return rest
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        return [Message(role="user", content=system["content"]), *rest]
    content = f"{system['content']}\n\n{rest[first]['content']}"
    rest[first] = Message(role="user", content=content)
    return rest

"""The layout of a chat: the template's structure as token ids, with slots for the messages.

This module uses one chat template and its tokenizer. It does not depend on the message contents.

The template is rendered with placeholders, which show the position of each message content. All
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

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2.exceptions import TemplateError as JinjaError

from self_judge.datatypes import Message
from self_judge.errors import EncodingError
from self_judge.prompting.content_tokenizer import ContentTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ending = Literal["closed", "prompt", "open"]

# The padding around each placeholder shows how the template trims the message content (see
# `_trimmed`). This padding is left before the placeholder (the padding after it mirrors this):
#
#     ↵↵↵↵↵ tab tab zqcontent0qz   {{ content }}             trims nothing
#           tab tab zqcontent0qz   {{ content.strip('\n') }} trims newlines (Qwen 3)
#                   zqcontent0qz   {{ content | trim }}      trims all whitespace
#
# Templates themselves do not write two tabs or five newlines.
_TABS, _NEWLINES = "\t\t", "\n\n\n\n\n"
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


# The slots and the ids of the structure between them. These ids do not depend on the messages.
Layout: TypeAlias = tuple[Slot | tuple[int, ...], ...]


class ChatLayouts:
    """The layouts of one chat template, each computed once and cached.

    Args:
        text: renders the template and tokenizes its structure.
        chat_template, chat_template_kwargs: the Jinja chat template and its arguments.

    Attributes:
        takes_system: whether the template supports system messages in all prompts and dialogues.

    Raises:
        EncodingError: the template drops or repeats the content of a single user message.
    """

    def __init__(
        self,
        text: ContentTokenizer,
        chat_template: str,
        chat_template_kwargs: Mapping[str, Any],
    ) -> None:
        self._text = text
        self._render: Callable[..., Any] = functools.partial(
            text.tokenizer.apply_chat_template,
            chat_template=chat_template,
            tokenize=False,
            **chat_template_kwargs,
        )
        self.of = functools.lru_cache(maxsize=512)(self._layout)
        self.of(("user",), "prompt")  # every usable template supports this
        self.takes_system = True
        try:
            for roles, ending in _SYSTEM_SHAPES:
                self.of(roles, ending)
        except EncodingError:  # Gemma rejects a system message; other templates drop it
            self.takes_system = False

    def _layout(self, roles: tuple[str, ...], ending: Ending) -> Layout:
        messages = [
            {"role": role, "content": f"{_NEWLINES}{_TABS}zqcontent{i}qz{_TABS}{_NEWLINES}"}
            for i, role in enumerate(roles)
        ]
        try:
            rendered = str(self._render(messages, add_generation_prompt=ending == "prompt"))
        except JinjaError as error:
            raise EncodingError(
                f"the chat template cannot render the roles {'/'.join(roles)}: {error}"
            ) from error
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
                    f"{counts[i]} times for the roles {'/'.join(roles)}: it must "
                    "write it exactly once"
                )
        parts: list[Slot | tuple[int, ...]] = []
        cursor = 0
        # Each placeholder adds: structure before it | lead | padding, placeholder, padding.
        # `cursor` is the end of the text that is already split into parts.
        for start, end, i in found:
            before, strip_left = _trimmed(rendered[cursor:start])
            lead = before[len(before.rstrip(" ")) :]
            before = before[: len(before) - len(lead)]
            if before:
                parts.append(self._structure(before, at_start=cursor == 0))
            cursor = end
            # The padding after the placeholder mirrors the padding before it, so the text is
            # reversed.
            following = rendered[cursor : cursor + len(_NEWLINES + _TABS)]
            left, strip_right = _trimmed(following[::-1])
            cursor += len(following) - len(left)
            anchor = self._text.anchor_after(before, at_start=not parts)
            parts.append(Slot(i, anchor, lead, strip_left, strip_right))
        tail = "" if ending == "open" else rendered[cursor:]
        if ending == "prompt":
            # A trailing space belongs to the first word of the answer, as in `Slot.lead`.
            tail = tail.rstrip(" ")
        if tail:
            parts.append(self._structure(tail, at_start=False))
        return tuple(parts)

    def _structure(self, text: str, at_start: bool) -> tuple[int, ...]:
        anchor = "" if at_start else self._text.anchor
        return tuple(self._text.encode_after(anchor, text))


def _trimmed(before: str) -> tuple[str, str | None]:
    """Removes the padding at the end of `before` and returns the characters the template trims.

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


def marker_template(user_marker: str, assistant_marker: str, with_bos: bool) -> str:
    """Returns a chat template with plain-text turn markers and an EOS token after every answer."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # Jinja does not decode escaped surrogate pairs

    def turn(marker: str) -> str:
        spaced = marker if marker[-1:].isspace() else marker + " "
        return "{{ " + quoted(spaced) + " + message['content'] }}"

    opening = "{{ " + quoted(assistant_marker.rstrip(" ")) + " }}"
    return (
        ("{{ bos_token }}" if with_bos else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'system' %}{{ message['content'] }}"
        + "{% elif message['role'] == 'user' %}"
        + turn(user_marker)
        + "{% else %}"
        + turn(assistant_marker)
        + "{{ eos_token }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + opening
        + "{% endif %}"
    )


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # as in Transformers, use the template named "default"
        return template.get("default")
    return template


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]

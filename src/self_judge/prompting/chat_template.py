"""What a chat template writes around the contents of a chat: structure, and slots for contents.

It knows one chat template, and how its tokenizer treats what it writes. It does not know contents.
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

# Around a placeholder, they tell what a template trims off a content: all whitespace, newlines
# (Qwen 3) or nothing. No template writes two tabs or five newlines.
_TABS, _NEWLINES = "\t\t", "\n\n\n\n\n"
_SYSTEM_SHAPES: tuple[tuple[tuple[str, ...], Ending], ...] = (
    (("system", "user"), "prompt"),
    (("system", "user", "assistant"), "closed"),
    (("system", "user", "assistant", "user"), "prompt"),
)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a message's content goes, and how the template treats it there."""

    message: int
    anchor: str  # text in front of the content while it is tokenized; its ids are dropped again
    lead: str  # spaces of the structure that tokenizers attach to the word that follows
    strip_left: str | None  # as for str.lstrip: None is all whitespace, "" is nothing
    strip_right: str | None


# Slots, and between them the ids that stand there whatever the contents say.
Layout: TypeAlias = tuple[Slot | tuple[int, ...], ...]


class ChatLayouts:
    """The layouts of one chat template, each made once.

    Args:
        text: the tokenizer that renders the template, and gives the ids of what it writes.
        chat_template, chat_template_kwargs: a Jinja chat template and the values it is given.

    Attributes:
        takes_system: whether system messages reach every prompt and dialogue.

    Raises:
        EncodingError: the template drops or repeats the content of a lone user message.
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
        self.of(("user",), "prompt")  # a template that cannot do this is of no use
        self.takes_system = True
        try:
            for roles, ending in _SYSTEM_SHAPES:
                self.of(roles, ending)
        except EncodingError:  # Gemma, for one, refuses it; others drop it, or only sometimes
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
                    f"{counts[i]} times for the roles {'/'.join(roles)}: it must be "
                    "written exactly once"
                )
        parts: list[Slot | tuple[int, ...]] = []
        cursor = 0
        for start, end, i in found:
            before, strip_left = _trimmed(rendered[cursor:start])
            lead = before[len(before.rstrip(" ")) :]
            before = before[: len(before) - len(lead)]
            if before:
                parts.append(self._structure(before, at_start=cursor == 0))
            cursor = end
            # The same from the other side: mirrored, so is the padding.
            following = rendered[cursor : cursor + len(_NEWLINES + _TABS)]
            left, strip_right = _trimmed(following[::-1])
            cursor += len(following) - len(left)
            anchor = self._text.anchor_after(before, at_start=not parts)
            parts.append(Slot(i, anchor, lead, strip_left, strip_right))
        tail = "" if ending == "open" else rendered[cursor:]
        if ending == "prompt":
            # The space before an answer belongs to the answer's first word, as in `Slot.lead`.
            tail = tail.rstrip(" ")
        if tail:
            parts.append(self._structure(tail, at_start=False))
        return tuple(parts)

    def _structure(self, text: str, at_start: bool) -> tuple[int, ...]:
        anchor = "" if at_start else self._text.anchor
        return tuple(self._text.encode_after(anchor, text))


def _trimmed(before: str) -> tuple[str, str | None]:
    """What stands in front of a padded placeholder less the padding, and what was trimmed of it."""
    if not before.endswith(_TABS):
        return before, None
    before = before[: -len(_TABS)]
    if not before.endswith(_NEWLINES):
        return before, "\n"
    return before[: -len(_NEWLINES)], ""


def system_into_user(messages: Sequence[Message]) -> list[Message]:
    """Puts the system text in front of the first user turn, for templates without a system role."""
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
    """A chat template of plain-text turn markers; every answer ends in the tokenizer's EOS."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # Jinja reads no surrogate pairs

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
    if isinstance(template, dict):  # several named templates: Transformers' own choice
        return template.get("default")
    return template


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]

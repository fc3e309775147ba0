"""ChatEncoder: the only place where text becomes token ids, with the loss mask built alongside.

It knows one tokenizer and one chat template. It does not know models, datasets or principles.

A chat template is rendered once per sequence of roles, with placeholders for the contents; the
structure around them is tokenized once, and every content is tokenized by itself. Hence the ids of
the structure stand where the template put them whatever the contents say, a prompt is a prefix of
prompt + answer, masks need no searching, and no text from data can become a control token.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError as JinjaError

from self_judge.datatypes import Comparison, Message
from self_judge.errors import EncodingError
from self_judge.prompting.judge_templates import JudgeTemplates, turns_of
from self_judge.prompting.text_tokenizer import ContentTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A message's role: a word in which no control token can be written.
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")

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
class EncodedChat:
    """Token ids with their loss mask.

    Attributes:
        ids: token ids, length T.
        mask: 1 where the loss falls on the token, else 0; length T.
    """

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True, slots=True)
class _Structure:
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a message's content goes, and how the template treats it there."""

    message: int
    anchor: str  # text in front of the content while it is tokenized; its ids are dropped again
    lead: str  # spaces of the structure that tokenizers attach to the word that follows
    strip_left: str | None  # as for str.lstrip: None is all whitespace, "" is nothing
    strip_right: str | None


class ChatEncoder:
    """Turns chats into token ids under one tokenizer and one chat template.

    The ids are those of `tokenizer.apply_chat_template`, except that
    - control tokens written out in a content, `<think>` too, are tokenized as ordinary text;
    - content and structure are not joined into one token ("?\\n" in Llama 3's vocabulary);
    - a system text that the template refuses or loses opens the first user message;
    - a template's decisions that depend on what a content says are taken as for plain words.

    Args:
        tokenizer: a Transformers tokenizer.
        chat_template: a Jinja chat template that overrides the tokenizer's own.
        user_marker, assistant_marker: plain-text turn markers such as `"\\n\\nHuman:"`; used only
            when neither `chat_template` nor the tokenizer brings a template.
        chat_template_kwargs: passed to the template; `enable_thinking` is off unless set here.
            Plain JSON values, since they are kept beside the model.

    Raises:
        EncodingError: there is no template, or it drops or repeats contents; values that are not
            plain JSON.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        user_marker: str | None = None,
        assistant_marker: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template or _own_template(tokenizer)
        if self.chat_template is None and user_marker and assistant_marker:
            self.chat_template = marker_template(
                user_marker, assistant_marker, with_bos=_adds_bos(tokenizer)
            )
        if self.chat_template is None:
            raise EncodingError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                "template: set templates.chat, or the turn markers templates.user and "
                "templates.assistant"
            )
        given = {"enable_thinking": False, **(chat_template_kwargs or {})}
        self.chat_template_kwargs = _plain_json(given)
        self._text = ContentTokenizer(tokenizer)
        self._layout = functools.lru_cache(maxsize=512)(self._make_layout)
        self._takes_system = self._check_system_role()

    def __reduce__(self) -> tuple[Any, ...]:
        # For `datasets.map(num_proc=…)`: caches are made anew in every process.
        return _rebuilt, (self.tokenizer, self.chat_template, self.chat_template_kwargs)

    # -- chats ---------------------------------------------------------------------------------

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids from which the model answers: the dialogue, then the assistant's turn opened."""
        return self._encode(messages, "prompt").ids

    def encode_open(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat whose last message is not finished: the next token continues it."""
        return self._encode(messages, "open").ids

    def encode_dialogue(self, messages: Sequence[Message]) -> EncodedChat:
        """A whole dialogue; the loss falls on every assistant turn and the token that ends it."""
        return self._encode(messages, "closed")

    def encode_query(self, query: str) -> list[int]:
        """Ids of a rendered text from which the model continues, with at most one BOS.

        Control tokens in `query` are honoured, since it is a rendered prompt: text from strangers
        belongs into messages (`encode_prompt`), not here.
        """
        ids = list(self.tokenizer(query)["input_ids"])
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if len(ids) > 1 and ids[-1] == eos and not query.endswith(self.tokenizer.eos_token or "\0"):
            ids.pop()  # some tokenizers close every text; the model is to continue this one
        if bos is not None and ids[:2] == [bos, bos]:
            ids.pop(0)
        return ids

    def encode_content(self, text: str) -> list[int]:
        """Ids of a text as it stands inside another text: no BOS, no control tokens."""
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text for the judge and for people: no special tokens, no surrounding whitespace."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def is_control(self, token_id: int) -> bool:
        """Whether a token steers the model (BOS, a turn marker, an end); no text from data does."""
        return token_id in self._text.control

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens at which an answer ends: the tokenizer's EOS and the template's end of turn."""
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
        encoded = self.encode_dialogue(messages)
        trained = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
        ends = [i for i in trained[-1:] if i in self._text.control]
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*ends, *([] if eos is None else [eos])]))

    # -- judging -------------------------------------------------------------------------------

    def letter_ids(
        self,
        templates: JudgeTemplates,
        token_id_a: int | None = None,
        token_id_b: int | None = None,
    ) -> tuple[int, int]:
        """The ids of " A" and " B" right after the lead-in of every judge template.

        Args:
            token_id_a, token_id_b: ids to check against the derived ones.

        Raises:
            EncodingError: a letter is not exactly one token there, principles disagree, or a given
                id is not the derived one; both readings are shown.
        """
        show = self._text.show
        found: dict[str, tuple[int, str]] = {}
        for principle in templates:
            lead_in = templates[principle].assistant
            before = self.encode_content(lead_in)
            for letter in "AB":
                after = self.encode_content(f"{lead_in} {letter}")
                added = after[len(before) :]
                if after[: len(before)] != before or len(added) != 1:
                    raise EncodingError(
                        f"the letter {letter!r} is not exactly one token after the lead-in of "
                        f"judge template {principle!r}: {show(before[-3:])} becomes "
                        f"{show(after[max(0, len(before) - 3) :])}; change the lead-in's end "
                        "or use a tokenizer with single-token letters"
                    )
                known = found.setdefault(letter, (added[0], principle))
                if known[0] != added[0]:
                    raise EncodingError(
                        f"the letter {letter!r} is token {show(added)} after the lead-in of "
                        f"{principle!r} but {show([known[0]])} after that of {known[1]!r}: "
                        "let all lead-ins end in the same word"
                    )
        for name, letter, given in (
            ("token_id_a", "A", token_id_a),
            ("token_id_b", "B", token_id_b),
        ):
            derived = found[letter][0]
            if given is not None and given != derived:
                raise EncodingError(
                    f"{name}={given} is {show([given])}, but after the judge's lead-in the "
                    f"letter {letter!r} is {show([derived])}: correct it or leave it out"
                )
        if found["A"][0] == found["B"][0]:
            raise EncodingError(
                f"the letters A and B are the same token {show([found['A'][0]])}: this "
                "tokenizer cannot tell them apart"
            )
        return found["A"][0], found["B"][0]

    def encode_orders(
        self,
        templates: JudgeTemplates,
        principle: str,
        comparison: Comparison,
        max_length: int | None = None,
    ) -> tuple[list[int], list[int]] | None:
        """Judge prompts of a comparison in both orders: a first, then b first.

        A prompt longer than `max_length` tokens loses the oldest turns of its context, the same in
        both orders; never the question, a response or the lead-in.

        Returns:
            The two lists of ids, or `None` when the pair does not fit even so.
        """

        def orders_of(context: str) -> tuple[list[int], list[int]] | None:
            given = Comparison(context, comparison.response_a, comparison.response_b)
            orders = (
                self.encode_open(templates.render(principle, given)),
                self.encode_open(templates.render(principle, given.swapped())),
            )
            fits = max_length is None or max(map(len, orders)) <= max_length
            return orders if fits else None

        best = orders_of(comparison.context)
        if best is not None:
            return best
        # As many of the newest turns as fit: from the question backwards in steps that double, then
        # by halves. What does not fit is never encoded at more than twice the length of what does.
        turns = turns_of(comparison.context)
        fitting, too_many = 0, len(turns)
        while too_many - fitting > 1:
            kept = min(max(1, 2 * fitting), (fitting + too_many) // 2)
            orders = orders_of("\n\n".join(turns[-kept:]))
            if orders is None:
                too_many = kept
            else:
                fitting, best = kept, orders
        return best

    # -- inside --------------------------------------------------------------------------------

    def _encode(self, messages: Sequence[Message], ending: Ending) -> EncodedChat:
        messages = list(messages)
        if not messages:
            raise EncodingError("a dialogue needs at least one message, got none")
        for message in messages:
            role: Any = message["role"]
            # The template writes it into the structure, where control tokens are honoured.
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise EncodingError(
                    f"the role {role!r:.80} is not a plain word, as user and assistant are"
                )
            if not isinstance(message["content"], str):
                raise EncodingError(
                    f"the content of a {message['role']!r} message is a "
                    f"{type(message['content']).__name__}: only text can be encoded"
                )
        if not self._takes_system and messages and messages[0]["role"] == "system":
            messages = _system_into_user(messages)
        layout = self._layout(tuple(m["role"] for m in messages), ending)
        ids: list[int] = []
        mask: list[int] = []
        ends_turn = False
        for part in layout:
            if isinstance(part, _Structure):
                new = part.ids
                trained = self._end_of_turn(part.ids) if ends_turn else 0
                mask += [1] * trained + [0] * (len(new) - trained)
                ends_turn = False
            else:
                message = messages[part.message]
                content = message["content"]
                content = content.lstrip(part.strip_left).rstrip(part.strip_right)
                new = tuple(self._text.encode(part.lead + content, part.anchor))
                ends_turn = message["role"] == "assistant"
                mask += [int(ends_turn)] * len(new)
            ids += new
        return EncodedChat(ids, mask)

    def _end_of_turn(self, structure: tuple[int, ...]) -> int:
        """How many ids after an answer end its turn: through the first control token."""
        for position, token_id in enumerate(structure):
            if token_id in self._text.control:
                return position + 1
        return 0

    def _make_layout(
        self, roles: tuple[str, ...], ending: Ending
    ) -> tuple[_Structure | _Slot, ...]:
        names = [f"zqcontent{i}qz" for i in range(len(roles))]
        contents = [_NEWLINES + _TABS + name + _TABS + _NEWLINES for name in names]
        try:
            rendered = self._render(
                [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)],
                add_generation_prompt=ending == "prompt",
            )
        except JinjaError as error:
            raise EncodingError(
                f"the chat template cannot render the roles {'/'.join(roles)}: {error}"
            ) from error
        found = [(m.start(), m[0]) for m in re.finditer(r"zqcontent\d+qz", rendered)]
        counts = Counter(name for _, name in found)
        for name, role in zip(names, roles, strict=True):
            if counts[name] != 1:
                raise EncodingError(
                    f"the chat template writes the content of a {role!r} message "
                    f"{counts[name]} times for the roles {'/'.join(roles)}: it must be "
                    "written exactly once"
                )
        number = {name: i for i, name in enumerate(names)}
        places = [(place, number[name]) for place, name in found if name in number]
        parts: list[_Structure | _Slot] = []
        cursor = 0
        for place, i in places:
            before, strip_left = _trimmed(rendered[cursor:place])
            lead = before[len(before.rstrip(" ")) :]
            before = before[: len(before) - len(lead)]
            if before:
                parts.append(self._structure(before, at_start=cursor == 0))
            cursor = place + len(names[i])
            # The same from the other side: mirrored, so is the padding.
            following = rendered[cursor : cursor + len(_NEWLINES + _TABS)]
            left, strip_right = _trimmed(following[::-1])
            cursor += len(following) - len(left)
            anchor = self._text.anchor_after(before, at_start=not parts)
            parts.append(_Slot(i, anchor, lead, strip_left, strip_right))
        tail = "" if ending == "open" else rendered[cursor:]
        if ending == "prompt":
            # The space before an answer belongs to the answer's first word, as in `_Slot.lead`.
            tail = tail.rstrip(" ")
        if tail:
            parts.append(self._structure(tail, at_start=False))
        return tuple(parts)

    def _structure(self, text: str, at_start: bool) -> _Structure:
        anchor = "" if at_start else self._text.anchor
        return _Structure(tuple(self._text.encode_after(anchor, text)))

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.chat_template_kwargs,
        )
        return str(rendered)

    def _check_system_role(self) -> bool:
        """Whether system messages reach every prompt and dialogue; else they go to the user's."""
        self._layout(("user",), "prompt")  # a template that cannot do this is of no use
        try:
            for roles, ending in _SYSTEM_SHAPES:
                self._layout(roles, ending)
        except EncodingError:  # Gemma, for one, refuses it; others drop it, or only sometimes
            return False
        return True


def _plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(values, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise EncodingError(
            f"chat_template_kwargs must be plain JSON values, as judge.json keeps them: {error}"
        ) from error


def _rebuilt(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, kwargs: Mapping[str, Any]
) -> ChatEncoder:
    return ChatEncoder(tokenizer, chat_template, chat_template_kwargs=kwargs)


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


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several named templates: Transformers' own choice
        return template.get("default")
    return template


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _trimmed(before: str) -> tuple[str, str | None]:
    """What stands in front of a padded placeholder less the padding, and what was trimmed of it."""
    if not before.endswith(_TABS):
        return before, None
    before = before[: -len(_TABS)]
    if not before.endswith(_NEWLINES):
        return before, "\n"
    return before[: -len(_NEWLINES)], ""


def _system_into_user(messages: Sequence[Message]) -> list[Message]:
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

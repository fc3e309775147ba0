"""ChatEncoder: encodes chats as token ids with a loss mask, and decodes ids to text.

This module uses one tokenizer and one chat template. It does not depend on models or datasets.

The chat template is rendered once for each sequence of roles, with placeholders for the message
contents. The structure around the placeholders is tokenized once, and the content of each message
is tokenized separately. As a result, the ids of the structure do not depend on the contents, a
prompt is always a prefix of prompt + answer, the loss mask is built without searching for template
tokens, and text from the data cannot become a control token:

    tokens  <|im_start|> user ↵  Hi   <|im_end|> ↵ <|im_start|> assistant ↵  Hello !  <|im_end|> ↵
    part    structure            slot structure                              slot     structure
    mask    0            0    0  0    0          0 0            0         0  1     1  1          0
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from self_judge.datatypes import Message
from self_judge.errors import EncodingError
from self_judge.prompting.chat_template import ChatLayouts, Ending, Slot, system_into_user
from self_judge.prompting.content_tokenizer import ContentTokenizer
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.letter_tokens import letter_ids
from self_judge.prompting.messages import content_of, lost, reasoning_key
from self_judge.prompting.template_source import CLOCK, adds_bos, marker_template, own_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# The role of a message must be a plain word, so that it cannot spell a control token.
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """Token ids with their loss mask.

    Attributes:
        array: token ids, length T.
        trained: 1 for tokens that the loss covers, else 0; length T.
    """

    array: array[int]
    trained: bytes

    @property
    def ids(self) -> list[int]:
        """The token ids as a list."""
        return self.array.tolist()

    @property
    def mask(self) -> list[int]:
        """The loss mask as a list."""
        return list(self.trained)


class ChatEncoder:
    """Encodes chats as token ids with one tokenizer and one chat template.

    The ids are the same as those from `tokenizer.apply_chat_template`, with these exceptions:
    - Control tokens spelled out in a message, such as `<think>`, are tokenized as ordinary text.
    - A token never spans content and structure ("?\\n" is one token in Llama 3's vocabulary).
    - If the template rejects or drops system messages, the system text moves to the start of the
      first user message.
    - If the template branches on the content of a message, the branch for plain words is used, and
      a warning is logged.
    - If the template reads the clock, it gets midnight on a fixed date.

    Control tokens are special tokens, added tokens that look like markup, and all added tokens that
    the template writes, including plain words.

    Args:
        tokenizer: a Transformers tokenizer.
        chat_template: a Jinja chat template that overrides the tokenizer's own.
        user_marker, assistant_marker: plain-text turn markers such as `"\\n\\nHuman:"`; used only
            if there is no `chat_template` and the tokenizer has no chat template.
        chat_template_kwargs: arguments for the template; `enable_thinking` is off unless set here.
            `strftime_now` is the date for a template that reads the clock ("2026-03-01"; default:
            today). All values must be plain JSON, because they are saved with the model.

    Raises:
        EncodingError: there is no template, the template drops, repeats or changes the content of a
            message (trimming is allowed) or renders differently each time, or
            `chat_template_kwargs` are not plain JSON.
    """

    @classmethod
    def of(cls, encoder: ChatEncoder | PreTrainedTokenizerBase) -> ChatEncoder:
        """Returns the encoder itself, or one for a tokenizer's own chat template."""
        return encoder if isinstance(encoder, ChatEncoder) else cls(encoder)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        user_marker: str | None = None,
        assistant_marker: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(tokenizer, str | os.PathLike):
            name = os.fspath(tokenizer)
            raise TypeError(f"ChatEncoder takes a tokenizer: pass load_tokenizer({name!r:.80})")
        self.tokenizer = tokenizer
        self.chat_template = chat_template or own_template(tokenizer)
        if self.chat_template is None and user_marker and assistant_marker:
            self.chat_template = marker_template(
                user_marker, assistant_marker, with_bos=adds_bos(tokenizer)
            )
        if self.chat_template is None:
            raise EncodingError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                "template: set templates.chat, or the turn markers templates.user and "
                "templates.assistant"
            )
        given = {"enable_thinking": False, **(chat_template_kwargs or {})}
        if CLOCK not in self.chat_template:
            given.pop(CLOCK, None)
        elif given.get(CLOCK) is None:
            given[CLOCK] = datetime.date.today().isoformat()
        self.chat_template_kwargs = _plain_json(given)
        self._text = ContentTokenizer(tokenizer)
        self._layouts = ChatLayouts(self._text, self.chat_template, self.chat_template_kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Used by `datasets.map(num_proc=…)`. Each process builds its own caches.
        return _rebuilt, (self.tokenizer, self.chat_template, self.chat_template_kwargs)

    # -- chats ---------------------------------------------------------------------------------

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encodes a dialogue and the start of the assistant turn that the model generates next."""
        return self.encode_chat(messages, "prompt").ids

    def encode_open(self, messages: Sequence[Message]) -> list[int]:
        """Encodes a chat whose last message is unfinished and is continued by the next token."""
        return self.encode_chat(messages, "open").ids

    def encode_dialogue(self, messages: Sequence[Message]) -> EncodedChat:
        """Encodes a whole dialogue; the loss covers assistant turns and their end tokens."""
        return self.encode_chat(messages, "closed")

    def encode_chat(self, messages: Sequence[Message], ending: Ending) -> EncodedChat:
        """Encodes a chat with one of the endings of a layout; see `chat_template`."""
        messages, turns = list(messages), list[Message]()
        if not messages:
            raise EncodingError("a dialogue needs at least one message, got none")
        for message in messages:
            role: Any = message["role"]
            # The role becomes part of the structure, where control tokens remain control tokens.
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise EncodingError(
                    f"the role {role!r:.80} is not a plain word such as 'user' or 'assistant'"
                )
            last = message is messages[-1] and ending != "prompt"
            if what := lost(message) or (reasoning_key(message) if last else None):
                raise EncodingError(f"a {role!r} message has {what}: only text can be encoded")
            content = content_of(message)
            if not isinstance(content, str):
                raise EncodingError(
                    f"the content of a {role!r} message is a "
                    f"{type(message['content']).__name__}: only text can be encoded"
                )
            turns.append({"role": role, "content": content})
        if not self._layouts.takes_system and turns[0]["role"] == "system":
            turns = system_into_user(turns)
        roles = tuple([turn["role"] for turn in turns])
        layout = self._layouts.of(roles, ending)
        contents = [turn["content"] for turn in turns]
        if what := self._layouts.inspected(roles, contents, ending == "prompt"):
            _say_inspected(what)
        ids, mask = array("i"), bytearray()
        ends_turn = False
        for part in layout:
            if isinstance(part, Slot):
                turn = turns[part.message]
                content = turn["content"].lstrip(part.strip_left).rstrip(part.strip_right)
                ids.frombytes(self._text.pack(part.lead + content, part.anchor))
                ends_turn = turn["role"] == "assistant"
                mask += bytes([ends_turn]) * (len(ids) - len(mask))
            else:
                trained = self._end_of_turn(part) if ends_turn else 0
                ids.extend(part)
                mask += bytes([1]) * trained + bytes(len(part) - trained)
                ends_turn = False
        return EncodedChat(ids, bytes(mask))

    def encode_query(self, query: str) -> list[int]:
        """Encodes a prompt that is already rendered as a string.

        If the prompt has this template's format, the ids are the same as those that `encode_prompt`
        returns. They begin with BOS if the template's prompts do. Control tokens in `query` remain
        control tokens. Pass untrusted text as messages to `encode_prompt` instead.
        """
        messages = self.messages_of(query)
        if messages and not any(self._text.spells_control(m["content"]) for m in messages):
            return self.encode_prompt(messages)
        ids = list(self.tokenizer(query, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if self._first_id == bos and ids[:1] != [bos] else ids

    def messages_of(self, query: str) -> list[Message] | None:
        """Returns the messages that the template renders as this prompt, or `None`."""
        return self._layouts.messages_of(query)

    def encode_content(self, text: str) -> list[int]:
        """Encodes text that is part of a longer text, without BOS or control tokens."""
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids to text, without special tokens or surrounding whitespace."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def is_control(self, token_id: int) -> bool:
        """Returns whether a token is a control token, such as BOS or a turn marker."""
        return token_id in self._text.control

    def marker_in(self, text: str) -> str | None:
        """Returns the first turn marker in `text`, which shows that `text` is already rendered.

        The markers are those in this template, except plain words, and those in well-known
        templates.
        """
        return self._text.marker_in(text)

    @functools.cached_property
    def _first_id(self) -> int:
        return self.encode_prompt([Message(role="user", content="a")])[0]

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the tokenizer's EOS and the template's end of turn."""
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
        """Returns the ids of " A" and " B" after the judge's lead-in; see `letter_tokens`."""
        return letter_ids(self._text, templates, token_id_a, token_id_b)

    # -- inside --------------------------------------------------------------------------------

    def _end_of_turn(self, structure: tuple[int, ...]) -> int:
        """Counts the ids up to and including the first control token; 0 if there is none."""
        for position, token_id in enumerate(structure):
            if token_id in self._text.control:
                return position + 1
        return 0


@functools.lru_cache(maxsize=64)
def _say_inspected(what: str) -> None:
    """Logs each warning only once."""
    logger.warning(
        "the chat template treats a message with %s in another way than plain words: such messages "
        "are encoded like plain words",
        what,
    )


def _plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(values, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise EncodingError(
            f"chat_template_kwargs must be plain JSON values that judge.json can store: {error}"
        ) from error


def _rebuilt(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, kwargs: Mapping[str, Any]
) -> ChatEncoder:
    return ChatEncoder(tokenizer, chat_template, chat_template_kwargs=kwargs)

"""ContentTokenizer: the ids of a text as it stands inside another, free of control tokens.

It knows one tokenizer: how it treats the start of a text, and which of its tokens steer a model. It
does not know chats, templates or masks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Non-special added tokens that look like markup (<think>, [TOOL_CALLS], <|...|>) steer a chat model
# as much as special ones; added words and runs of spaces do not.
_MARKUP = re.compile(r"^[<\[{|].*[>\]}|]$", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")
# "\n" first: it merges with nothing in the SentencePiece vocabularies that need an anchor.
_ANCHORS = ("\n", ":", "|", "。")


class ContentTokenizer:
    """Tokenizes texts from data.

    Args:
        tokenizer: a Transformers tokenizer.

    Attributes:
        control: the tokens that steer a model, id to text; no text from data becomes one.
        anchor: what is put in front of a text by default, or `""` where that makes no difference.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = _control_tokens(tokenizer)
        # Longest first, so that "<|a|>" is found before "<|" where both are tokens.
        self._controls_longest_first = sorted(self.control.values(), key=len, reverse=True)
        self._control_pattern = re.compile(
            "|".join(map(re.escape, self._controls_longest_first)) or r"(?!)"
        )
        # What an unknown character becomes steers nothing; its name, written out, is just text.
        self._unknown = _unknown_token(tokenizer)
        if self._unknown is not None:
            self.control.pop(self._unknown[0], None)
        self._head = functools.lru_cache(maxsize=64)(self._ids)
        self._anchors = self._find_anchors()
        self.anchor = self._anchors[0] if self._anchors else ""

    def encode(self, text: str, anchor: str | None = None) -> list[int]:
        """Ids of a text as it stands inside another text: no BOS, no control tokens.

        Args:
            text: any text, hostile text included.
            anchor: what stands in front of it; only for tokenizers that treat the start of a text
                differently (a dummy space). The ids of the anchor are not returned.
        """
        anchor = self.anchor if anchor is None else anchor
        ids = self.encode_after(anchor, text)
        named_unknown = self._unknown is not None and self._unknown[1] in text
        if self.control.keys().isdisjoint(ids) and not named_unknown:
            return ids
        # Break every control string after its first character and tokenize the parts apart.
        cuts = [match.start() + 1 for match in self._control_pattern.finditer(text)]
        ids = self._encode_parts(anchor, text, cuts)
        if not self.control.keys().isdisjoint(ids):  # e.g. a look-alike that is normalized to one
            ids = self._encode_parts(anchor, text, range(1, len(text)))
        return [i for i in ids if i not in self.control]

    def encode_after(self, anchor: str, text: str) -> list[int]:
        """Ids of a text behind `anchor`, control tokens honoured: for texts of a template."""
        if not text:
            return []
        text = _SURROGATE.sub("\ufffd", text)
        if not anchor:
            return self._ids(text)
        for before in dict.fromkeys((anchor, *self._anchors)):
            head = self._head(before)
            ids = self._ids(before + text)
            if ids[: len(head)] == head:  # else it merged, and would take a part of the text along
                return ids[len(head) :]
        return self._ids(text)

    def _encode_parts(self, anchor: str, text: str, cuts: Sequence[int]) -> list[int]:
        """Ids of a text tokenized apart at `cuts`; the later parts stand inside a text."""
        ids: list[int] = []
        # Hostile texts repeat themselves: a call of the tokenizer costs more than a short part.
        known: dict[tuple[str, str], list[int]] = {}
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = (self.anchor if start else anchor, text[start:end])
            if part not in known:
                known[part] = self.encode_after(*part)
            ids += known[part]
        return ids

    def _ids(self, text: str) -> list[int]:
        # Not verbose: what is too long is dealt with by those who know how long it may be.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_anchors(self) -> tuple[str, ...]:
        """Texts to put in front, where the tokenizer treats the start of a text differently."""
        plain, spaced, inside = self._ids("a"), self._ids(" a"), self._ids("b\na")
        if spaced != plain and inside[-len(plain) :] == plain and len(inside) > len(plain):
            return ()
        anchors = []
        for anchor in _ANCHORS:
            head, *tails = self._ids(anchor), self._ids(anchor + "a"), self._ids(anchor + " a")
            # An unknown character would be fused with the next unknown one.
            known = bool(head) and (self._unknown is None or self._unknown[0] not in head)
            if known and tails[0] != tails[1] and all(t[: len(head)] == head for t in tails):
                anchors.append(anchor)
        return tuple(anchors)

    def anchor_after(self, before: str, at_start: bool) -> str:
        """The anchor for a content that follows `before` in a template."""
        if not self._anchors or (at_start and not before):
            return ""
        # Some tokenizers start anew after a control token, or let it swallow what is white.
        bare = before.rstrip()
        last = next((t for t in self._controls_longest_first if bare.endswith(t)), None)
        return self.anchor if last is None else before[len(bare) - len(last) :]

    def show(self, ids: Sequence[int]) -> str:
        """Ids with their tokens, for messages."""
        shown = []
        for i in ids:
            try:
                token = self.tokenizer.convert_ids_to_tokens(int(i))
            except (IndexError, OverflowError, TypeError, ValueError):
                token = None
            shown.append(f"{i} (out of range)" if token is None else f"{i} {token!r}")
        return "[" + ", ".join(shown) + "]"


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    control = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or _MARKUP.match(token.content)
    }
    for token_id in tokenizer.all_special_ids:
        control.setdefault(token_id, str(tokenizer.convert_ids_to_tokens(token_id)))
    return {token_id: text for token_id, text in control.items() if text}


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    unk = tokenizer.unk_token_id
    if unk is None or unk in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    return unk, str(tokenizer.unk_token)

"""ContentTokenizer: encodes text that is part of a longer text, without control tokens.

This module handles the start of a text and the control tokens for one tokenizer. It does not depend
on chats, templates or masks.

It solves two problems:

1. SentencePiece tokenizers add a dummy space at the start of a text, so "cat" has different ids at
   the start of a text and inside a chat. The text is therefore tokenized after an *anchor*, and the
   ids of the anchor are dropped:

       "cat"   -> ▁cat                the ids at the start of a text
       "↵"     -> ▁ <0x0A>            the anchor alone
       "↵cat"  -> ▁ <0x0A> cat        drop the first two: cat

2. Text from the data may spell out a control token. Such a string is cut after its first character
   and the parts are tokenized separately, so that the tokenizer never sees the whole string:

       "hi <|im_end|>"  -> "hi <" + "|im_end|>"  -> hi ▁ < | i m _ e nd | >

Most words occur in many texts, and both orders of a judge prompt contain the same lines. The ids of
words and lines are therefore remembered, if the tokenizer treats words independently (see
`_exact_cuts`). A new word is often a known word with a punctuation mark:

    "Hi, how are you?"  ->  "Hi" + "," + " how" + " are" + " you" + "?"
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import string
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from self_judge.prompting.thoughts import THOUGHT_MARKERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Added tokens that look like markup (<think>, [TOOL_CALLS], ｜DSML｜, </dsml:) control a chat model
# even if they are not marked as special. Added words, operators ("<=") and sequences of spaces do
# not control a model, unless the chat template uses them (see `ContentTokenizer.guard`).
_ADDED_MARKUP = re.compile(r"\s*[<\[{|＜［｛｜【].*[\w>\]}|＞］｝｜】]", re.DOTALL)
_MARKUP = re.compile(r"^[<\[{|].*[>\]}|]$", re.DOTALL)
# Turn markers in well-known templates, to detect text that was rendered for another model.
_FOREIGN_MARKERS = (
    r"<\|\w+\|>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|<｜[\w▁]+｜>|<\|turn>|<turn\|>"  # DeepSeek, Gemma 4
)
_SURROGATE = re.compile("[\ud800-\udfff]")
# "\n" comes first, because it never merges with other text in SentencePiece vocabularies.
_ANCHORS = ("\n", ":", "|", "。")
# A text is cut before a single space between a visible character and a letter, and a word is cut
# between a letter and a punctuation mark.
_CUT = re.compile(r" (?<=[!-~\w] )(?=[^\W\d_])")
_MARK = re.compile(r"(?<=[A-Za-z])(?=[.,!?;:])")
# From the first to the last cut before a space in a line.
_MIDDLE = re.compile(r"( (?<=[!-~\w] )[^\W\d_](?:.*[!-~\w])?)(?= [^\W\d_])")
# A token that contains a cut before a space. In vocabularies, "Ġ" and "▁" are spaces, "Ċ", "ĉ" and
# "č" are newlines and tabs, and "Âł" is a no-break space.
_CROSSING = re.compile(r"[^\s\0Ġ▁Ċĉč](?<!Âł)[ Ġ▁][^\s\0Ġ▁Ċĉč]")
# Texts before and after a cut, which show whether a tokenizer treats both sides independently.
_BEFORE = (
    *("a", "Hello", "DON'T", "it's", "I'", "A's.", "1,234", "a1", "x  = 12", "is\n\nB:", "_", "é"),
    *("end.\n\n- x", "日本", "…or", "\tif(x)", "done!!!", '"yes"', "a/b\\c", "<b>", "\r\n#x"),
)
_AFTER = (
    *(" a", " I'm", " Hello, you", " then\n\nB: c", " x  y", " x 12", " é", " 日本", " iPhone's"),
    *(" S.A.", " ll", " WORLD!\n"),
)
_ENDS = [m + after for m in ".,!?;:" for after in ("", " a", "a's", "1", ".", "\n\nB: c")]
_BEFORE_MARK = (*(before for before in _BEFORE if re.search("[A-Za-z]$", before)), "at http", "www")
# Some tokenizers keep addresses whole, and then merge what they separate elsewhere.
_AFTER_MARK = (*_ENDS, "://www.wiki.org/wiki/a_b?c=d&e=f#g", ".wiki.org/w", ".com@a.co, b")
# The maximum length of all recent words whose ids are remembered, and of all middles and joints.
# Words recur in all texts, but most middles recur only in the prompts of one record.
_KNOWN_CHARACTERS, _KNOWN_PIECE_CHARACTERS = 2**21, 2**17


class _SpelledControlError(Exception):
    """Raised if the ids of a text contain a control token."""


class _Known(dict[str, bytes]):
    """Remembers the packed ids of recent texts, up to a total length.

    If too many texts are known, they become the older texts, and those that recur are kept.
    """

    def __init__(self, encode: Callable[[str], bytes], characters: int) -> None:
        super().__init__()
        self._encode, self._limit, self._characters = encode, characters, 0
        self._older: dict[str, bytes] = {}

    def __missing__(self, text: str) -> bytes:
        ids = self._older.get(text)
        self[text] = ids = self._encode(text) if ids is None else ids
        self._characters += len(text)
        if self._characters > self._limit:
            self._older, self._characters = dict(self), 0
            self.clear()
        return ids


class ContentTokenizer:
    """Tokenizes text from the data.

    Args:
        tokenizer: a Transformers tokenizer.

    Attributes:
        control: maps the ids of control tokens to their text. Text from the data never becomes a
            control token.
        anchor: the default anchor, or `""` if the tokenizer does not need one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Unknown characters become <unk>, which is not a control token. A spelled-out "<unk>" is
        # ordinary text.
        self._unknown = _unknown_token(tokenizer)
        self._set_control(_control_tokens(tokenizer))
        self._marker_pattern = re.compile(_FOREIGN_MARKERS)
        self._head = functools.lru_cache(maxsize=64)(self._ids)
        self._anchors = self._find_anchors()
        self.anchor = self._anchors[0] if self._anchors else ""
        self._forget()

    def _forget(self) -> None:
        def words_after(anchor: str) -> _Known:
            return _Known(functools.partial(self._pack_word, anchor), _KNOWN_CHARACTERS)

        self._words_after = functools.cache(words_after)
        self._words = _Known(self._pack_spaced, _KNOWN_CHARACTERS)
        self._pieces = _Known(self._pack_piece, _KNOWN_PIECE_CHARACTERS)

    def _set_control(self, control: dict[int, str]) -> None:
        # The longest token comes first, because "<|a|>" must match before "<|" if both are tokens.
        self._controls_longest_first = sorted(control.values(), key=len, reverse=True)
        self._control_pattern = re.compile(
            "|".join(map(re.escape, self._controls_longest_first)) or r"(?!)"
        )
        self.control = dict(control)
        if self._unknown is not None:
            self.control.pop(self._unknown[0], None)

    def guard(self, ids: Iterable[int], written: str) -> None:
        """Marks the tokens of a chat template as control tokens, regardless of their spelling.

        Whitespace and punctuation remain text, because newlines are added tokens in Gemma's
        vocabulary and commas are added tokens in Jurassic-2's vocabulary.

        Args:
            ids: the ids of the template's structure.
            written: the literal text in the template, which may contain more added tokens.
        """
        used = set(ids)
        control = _control_tokens(self.tokenizer)
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if not _is_text(token.content) and (token_id in used or token.content in written):
                control.setdefault(token_id, token.content)
        for token_id in used:  # a marker may also be an ordinary token in the vocabulary
            text = str(self.tokenizer.decode([token_id])).strip()
            if _MARKUP.match(text) and re.search(r"\w", text):
                control.setdefault(token_id, text)
        self._set_control(control)
        self._forget()
        markers = {self.control[i] for i in used & self.control.keys()}
        markers |= THOUGHT_MARKERS & {*self.control.values()}
        own = [re.escape(t.strip()) for t in sorted(markers) if re.search(r"[^\w\s]", t)]
        self._marker_pattern = re.compile("|".join([*own, _FOREIGN_MARKERS]))

    def spells_control(self, text: str) -> bool:
        return self._control_pattern.search(text) is not None

    def marker_in(self, text: str) -> str | None:
        """Returns the first turn marker in `text`, from this template or a well-known template."""
        found = self._marker_pattern.search(text)
        return found and found[0]

    def unguarded(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the added tokens among `ids` that text from the data could produce."""
        added = self.tokenizer.added_tokens_decoder
        unknown = {self._unknown[0]} if self._unknown is not None else set()
        for token_id in {*ids} & added.keys() - self.control.keys() - unknown:
            if not _is_text(added[token_id].content):
                yield added[token_id].content

    def encode(self, text: str, anchor: str | None = None) -> list[int]:
        """Encodes text that is part of a longer text, without BOS or control tokens.

        Args:
            text: any text, including hostile text.
            anchor: text to prepend, for tokenizers that treat the start of a text differently (a
                dummy space). The ids of the anchor are not returned.
        """
        return array("i", self.pack(text, anchor)).tolist()

    def pack(self, text: str, anchor: str | None = None) -> bytes:
        """Returns the ids of `encode` as 32-bit numbers, which are fast to join."""
        anchor = self.anchor if anchor is None else anchor
        text = _SURROGATE.sub("\ufffd", text)
        try:
            if self._unknown is None or self._unknown[1] not in text:
                return self._pack_words(anchor, text)
        except _SpelledControlError:
            pass
        # Cut every control string after its first character and tokenize the parts separately.
        # A marker with one character cannot be cut, so it is tokenized as a separate part.
        found = list(self._control_pattern.finditer(text))
        cuts = {m.start() + 1 for m in found} | {m.start() for m in found if len(m[0]) == 1}
        ids = self._encode_parts(anchor, text, sorted(cuts - {0, len(text)}))
        if not self.control.keys().isdisjoint(ids):  # "＜" may be normalized to "<"
            ids = self._encode_parts(anchor, text, range(1, len(text)))
        return packed(ids)

    def encode_after(self, anchor: str, text: str) -> list[int]:
        """Encodes template text after `anchor`; control tokens remain control tokens."""
        if not text:
            return []
        text = _SURROGATE.sub("\ufffd", text)
        if not anchor:
            return self._ids(text)
        for before in dict.fromkeys((anchor, *self._anchors)):
            head = self._head(before)
            ids = self._ids(before + text)
            if ids[: len(head)] == head:  # otherwise, the anchor merged with the text
                return ids[len(head) :]
        return self._ids(text)

    def _pack_words(self, anchor: str, text: str) -> bytes:
        """Returns the same ids as `encode_after`, but encodes only words that are not known."""
        if not (text and _CUT in self._exact_cuts):
            return self._pack_text(self.encode_after(anchor, text))
        # The middle of a line, between its first and its last cut, often recurs as a whole. What
        # remains between two middles is a joint:
        #
        #   I saw old Paris.↵It was very big.     ->  I | saw old | Paris.↵It | was very | big.
        start, *pieces = _MIDDLE.split(text)
        known = map(self._pieces.__getitem__, pieces)
        return b"".join([self._words_after(anchor)[start], *known])

    def _pack_piece(self, piece: str) -> bytes:
        return b"".join(map(self._words.__getitem__, _CUT.split(piece[1:])))

    def _pack_spaced(self, word: str) -> bytes:
        return self._pack_word(self.anchor, f" {word}")

    def _pack_word(self, anchor: str, word: str) -> bytes:
        start, *marks = _MARK.split(word) if _MARK in self._exact_cuts else [word]
        if not marks:
            return self._pack_text(self._encode_word(anchor, word))
        known = map(self._words_after(self.anchor).__getitem__, marks)
        return b"".join([self._words_after(anchor)[start], *known])

    def _pack_text(self, ids: Sequence[int]) -> bytes:
        if not self.control.keys().isdisjoint(ids):
            raise _SpelledControlError
        return packed(ids)

    def _encode_word(self, anchor: str, word: str) -> list[int]:
        """Returns the ids of `encode_after` in a fraction of its time."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.encode_after(anchor, word)
        backend.no_truncation()
        backend.no_padding()
        whole = backend.encode_batch_fast([anchor + word], add_special_tokens=False)
        ids: list[int] = whole[0].ids
        head = self._head(anchor) if anchor else []
        return ids[len(head) :] if ids[: len(head)] == head else self.encode_after(anchor, word)

    @functools.cached_property
    def _exact_cuts(self) -> tuple[re.Pattern[str], ...]:
        """The cuts for which the ids of a text are the ids of its parts.

        If no token of the vocabulary contains the place of a cut, then no merge and no segmentation
        crosses it. An added token and a text that the normalizer replaces must not contain it
        either, and an added token must not absorb the space beside it. The samples show whether the
        tokenizer splits, changes or prepends text at a cut, or joins unknown characters.
        """
        added = self.tokenizer.added_tokens_decoder
        for token_id, token in added.items():
            # `encode` cuts a text with control tokens in any case.
            absorbs = (token.lstrip or token.rstrip) and token_id not in self.control
            if absorbs or token.single_word:
                return ()
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = getattr(backend, "normalizer", None)
        texts = [f"a{token.content}a" for token in added.values()]
        if normalizer is not None:
            own = [token.content for token in added.values() if token.normalized]
            texts += [f"a{normalizer.normalize_str(content)}a" for content in own]
            texts += [f"{text}a" for text in _replaced(json.loads(normalizer.__getstate__()))]
        contents = "\0".join(texts)
        tokens = (str(t) for t, i in self.tokenizer.get_vocab().items() if i not in added)
        vocabulary = "\0".join(tokens)
        exact, at_marks = [], (_MARK, _MARK, _BEFORE_MARK, _AFTER_MARK)
        for cut, crossing, befores, afters in ((_CUT, _CROSSING, _BEFORE, _AFTER), at_marks):
            if not (cut.search(contents) or crossing.search(vocabulary)):
                left = [self.encode_after(self.anchor, before) for before in befores]
                right = [self.encode_after(self.anchor, after) for after in afters]
                sums = [first + second for first, second in itertools.product(left, right)]
                wholes = map("".join, itertools.product(befores, afters))
                # Unknown characters on both sides of a cut may be one token.
                unknown = self._unknown is not None and [self._unknown[0]] in (r[:1] for r in right)
                if not unknown and [self._encode_word(self.anchor, w) for w in wholes] == sums:
                    exact.append(cut)
        return tuple(exact)

    def _encode_parts(self, anchor: str, text: str, cuts: Sequence[int]) -> list[int]:
        """Cuts a text at `cuts` and encodes each part separately.

        The first part follows `anchor`, and the other parts follow the default anchor.
        """
        ids: list[int] = []
        # Hostile text may repeat parts. Cache their ids, because a tokenizer call is slow.
        known: dict[tuple[str, str], list[int]] = {}
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part = (self.anchor if start else anchor, text[start:end])
            if part not in known:
                known[part] = self.encode_after(*part)
                if len(part[1]) == 1 and not self.control.keys().isdisjoint(known[part]):
                    known[part] = self._character(part[1])
            ids += known[part]
        return ids

    def _character(self, character: str) -> list[int]:
        """Encodes a one-character control token with the base vocabulary, without added tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return []
        pre = backend.pre_tokenizer
        # A pre-tokenizer may add a space before the character: "🧑" -> "▁🧑".
        words = [word for word, _ in pre.pre_tokenize_str(character)] if pre else [character]
        bare = [word if len(word) == 1 else word.lstrip("▁Ġ") for word in words]
        ids = [token.id for word in bare for token in backend.model.tokenize(word)]
        return [i for i in ids if i not in self.control]

    def _ids(self, text: str) -> list[int]:
        # `verbose=False` turns off the warning about long texts. The caller checks the length.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _find_anchors(self) -> tuple[str, ...]:
        """Returns the usable anchors, best first. No anchor is needed if the tuple is empty.

        An anchor is usable if it is in the vocabulary, never merges with the text after it, and
        keeps "a" and " a" distinct.
        """
        plain, spaced, inside = self._ids("a"), self._ids(" a"), self._ids("b\na")
        # Byte-level BPE:  "a" -> a   " a" -> Ġa    "b↵a" -> b Ċ a          no anchor needed
        # SentencePiece:   "a" -> ▁a  " a" -> ▁▁ a  "b↵a" -> ▁ b <0x0A> a   "a" differs inside
        if spaced != plain and inside[-len(plain) :] == plain and len(inside) > len(plain):
            return ()
        anchors = []
        for anchor in _ANCHORS:
            head, *tails = self._ids(anchor), self._ids(anchor + "a"), self._ids(anchor + " a")
            # An unknown anchor would merge with an unknown character after it.
            known = bool(head) and (self._unknown is None or self._unknown[0] not in head)
            if known and tails[0] != tails[1] and all(t[: len(head)] == head for t in tails):
                anchors.append(anchor)
        return tuple(anchors)

    def anchor_after(self, before: str, at_start: bool) -> str:
        """Returns the anchor for message content that follows `before` in a template.

        After a control token, the anchor is that token and the whitespace that follows it. Some
        tokenizers treat the position after a control token as the start of a text. In others, the
        token absorbs the whitespace. After other text, the default anchor precedes the whitespace,
        because some tokenizers treat whitespace only as the start of a word: T5's "user↵Hi" is
        ▁user ▁Hi.
        """
        if not self._anchors or (at_start and not before):
            return ""
        bare = before.rstrip()
        ends = (t.rstrip() for t in self._controls_longest_first)
        last = next((t for t in ends if t and bare.endswith(t)), None)
        return (self.anchor if last is None else last) + before[len(bare) :]

    def without_lead(self, structure: str) -> tuple[str, str]:
        """Splits template structure into text and trailing spaces (see `Slot.lead`).

        A control token that ends with a space keeps the space.
        """
        bare = structure.rstrip(" ")
        kept = (t for t in self.control.values() if t.endswith(" ") and structure.endswith(t))
        end = max((len(bare), *(len(structure) for _ in kept)))
        return structure[:end], structure[end:]

    def show(self, ids: Sequence[int]) -> str:
        """Formats ids with their tokens, for error messages."""
        shown = []
        for i in ids:
            try:
                token = self.tokenizer.convert_ids_to_tokens(int(i))
            except (IndexError, OverflowError, TypeError, ValueError):
                token = None
            shown.append(f"{i} (out of range)" if token is None else f"{i} {token!r}")
        return "[" + ", ".join(shown) + "]"


def packed(ids: Sequence[int]) -> bytes:
    """Returns ids as 32-bit numbers."""
    return array("i", ids).tobytes()


def _replaced(normalizer: Any) -> Iterator[str]:
    """Yields texts that a normalizer replaces, from its JSON.

    A regular expression may match any text, except one for whitespace.
    """
    if isinstance(normalizer, list):
        yield from itertools.chain(*map(_replaced, normalizer))
    elif isinstance(normalizer, dict):
        yield from _replaced(normalizer.get("normalizers"))
        pattern = normalizer.get("pattern") or {}
        yield pattern.get("String", "")
        if not re.fullmatch(r"(?:\s|\\[nrst]|[+*{},\d])*", pattern.get("Regex", "")):
            yield "a b.c"


def _is_text(token: str) -> bool:
    """Returns whether a token is whitespace or one punctuation mark."""
    bare = token.strip()
    return not bare or (
        len(bare) == 1 and (bare in string.punctuation or unicodedata.category(bare)[0] == "P")
    )


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    control = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or _ADDED_MARKUP.match(token.content)
    }
    for token_id in tokenizer.all_special_ids:
        control.setdefault(token_id, str(tokenizer.convert_ids_to_tokens(token_id)))
    return {token_id: text for token_id, text in control.items() if text}


def _unknown_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str] | None:
    unk = tokenizer.unk_token_id
    if unk is None or unk in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    return unk, str(tokenizer.unk_token)

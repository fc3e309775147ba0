"""Splits the responses of thinking models into a thought and an answer.

This module handles the markers of thoughts. It does not depend on sampling, judging or training.

Judging, lengths and tournaments use only the answer. The loss covers every sampled id. A response
has no answer if its thought never ends, or if nothing follows the thought:

    text                               thought    answer
    "Paris."                           None       "Paris."
    "<think>\\nHm.\\n</think>\\n\\nParis."  "Hm."      "Paris."
    "Hm.\\n</think>\\n\\nParis."          "Hm."      "Paris."     opened by the prompt (DeepSeek-R1)
    "<think>\\nHm. Wait"                "Hm. Wait" None
    "<think>\\nHm.\\n</think>\\n"        "Hm."      ""         which is no answer
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from self_judge.datatypes import Comparison, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_ANSWER = "no answer after a thought"  # the reason a pair is undecidable or skipped

# The markers that open and close a thought, with the first models that use them.
_MARKERS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen 3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<thinking>", "</thinking>"),  # Reflection
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1
    ("<reasoning>", "</reasoning>"),  # Reka Flash 3
    ("<longcat_think>", "</longcat_think>"),  # LongCat-Flash
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel|>commentary<|message|>", "<|channel|>final<|message|>"),  # gpt-oss, with a preamble
)
THOUGHT_MARKERS = frozenset(marker for pair in _MARKERS for marker in pair)
_BRACKETS = frozenset(marker[0] for marker in THOUGHT_MARKERS)
# A closing marker on its own line or at the end of a paragraph.
_END = r"(?m)(?:^[ \t]*{0}[ \t]*$|{0}(?=[ \t]*\n[ \t]*\n))"
# The assistant's turns in a dialogue as text (see `judge_templates.dialogue_text`).
_ASSISTANT_TURN = re.compile(
    r"(?:\A|(?<=\n))(Assistant: *)(.*?)(?=\n+(?:Human|Assistant):|\Z)", re.DOTALL
)
# Only this many tokens at the end of a prompt are searched for an opening marker.
_LONGEST_OPENING = 32


class Parts(NamedTuple):
    """The parts of a response. A missing part is `None`."""

    thought: str | None
    answer: str | None


def split_thought(text: str, close: str | None = None) -> Parts:
    """Splits a response into its thought and its answer.

    A response has a thought if it begins with an opening marker, or if a closing marker is on its
    own line or at the end of a paragraph and no opening marker precedes it (the prompt then opened
    the thought).

    Args:
        text: the response, without its prompt.
        close: the closing marker of a thought that the prompt opened (see `opened_by`).

    Returns:
        The parts. If there is no thought, the answer is the unchanged response. If nothing follows
        a thought, the answer is empty.
    """
    thoughts: list[str] = []
    answer: str | None = text
    while answer is not None:
        found = _first_thought(answer, close)
        if found is None:
            break
        thoughts.append(found.thought or "")
        answer, close = found.answer, None
    return Parts("\n\n".join(filter(None, thoughts)) if thoughts else None, answer)


def _first_thought(text: str, close: str | None) -> Parts | None:
    if close is None and not _may_think(text):
        return None
    head = text.lstrip()
    for opening, closing in _MARKERS:
        if closing == close or (close is None and head.startswith((opening, closing))):
            thought, found, answer = head.removeprefix(opening).partition(closing)
            return Parts(thought.strip(), answer.lstrip() if found else None)
    if close is None:
        for opening, closing in _MARKERS:
            end = closing in text and re.search(_END.format(re.escape(closing)), text)
            if end and opening not in text[: end.start()]:
                return Parts(text[: end.start()].strip(), text[end.end() :].lstrip())
    return None


def _may_think(text: str) -> bool:
    """Returns whether a text may contain a marker. This is fast, and few texts have brackets."""
    return any(bracket in text for bracket in _BRACKETS)


def before_thought(text: str, *whole: str) -> str:
    """Returns `text`, a common prefix of `whole`, without a thought that is still open at its end.

    An opening marker that is never closed in `whole` is not a thought: "What does <think> mean?".
    """
    starts = [len(text)]
    for opening, closing in _MARKERS:
        at = text.rfind(opening)
        if at >= 0 and closing not in text[at:].rstrip().removesuffix(closing):
            starts += [at] if any(closing in one[at:] for one in whole) else []
    return text[: min(starts)]


def answer_of(text: str) -> str | None:
    """Returns the answer in a response, or `None` if nothing follows its thought."""
    thought, answer = split_thought(text)
    return answer if answer or thought is None else None


def answers_of(comparison: Comparison) -> Comparison | None:
    """Returns the comparison without thoughts, or `None` if an answer is missing.

    In the context, thoughts are removed from the assistant's turns, as in
    `judge_templates.dialogue_text`.
    """
    a, b = answer_of(comparison.response_a), answer_of(comparison.response_b)
    if a is None or b is None:
        return None
    context = comparison.context
    if _may_think(context):
        context = _ASSISTANT_TURN.sub(lambda turn: turn[1] + (answer_of(turn[2]) or ""), context)
    return Comparison(context, a, b)


def with_answers(responses: Sequence[str]) -> list[int]:
    """Returns the indices of the responses that have an answer."""
    return [k for k, text in enumerate(responses) if answer_of(text) is not None]


def opened_by(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str | None:
    """Returns the closing marker of a thought that a prompt opens at its end, or `None`."""
    end = _decoded(tokenizer, prompt[-_LONGEST_OPENING:]).rstrip()
    return next((closing for opening, closing in _MARKERS if end.endswith(opening)), None)


def closing_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]
) -> str | None:
    """Returns the marker that closes the thought in which `ids` end, or `None` if there is none."""
    close = opened_by(tokenizer, prompt)
    text = _decoded(tokenizer, ids)
    if split_thought(text, close).answer is not None:
        return None
    head = text.lstrip()
    return close or next((c for o, c in _MARKERS if head.startswith(o)), None)


def sampled(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int], ended: bool
) -> Response:
    """Returns the response for the given sampled ids.

    Args:
        tokenizer: the tokenizer. Its markers may be special tokens, added tokens or ordinary text.
        prompt: the ids before the response.
        ids: the sampled ids.
        ended: whether the last id ends the response.
    """
    close = opened_by(tokenizer, prompt)
    whole = split_thought(_decoded(tokenizer, ids[: len(ids) - ended]), close)
    if whole.thought is None:
        return Response(tuple(ids), _text(tokenizer, ids).strip(), ended)
    without_answer = Response(tuple(ids), "", False, whole.thought, len(ids), answered=False)
    if whole.answer is None:
        return without_answer

    # The first ids, up to and including the closing marker, belong to the thought:
    #
    #   ids   <think> ↵ Hm . ↵ </think> | ↵↵ Paris . <end>
    def holds(length: int) -> bool:
        part = split_thought(_decoded(tokenizer, ids[:length]), close)
        return part.thought == whole.thought and part.answer is not None

    length = bisect_left(range(len(ids)), True, key=holds)
    # If the marker is ordinary text, its last token may also contain the start of the answer: ">P".
    last, begun = ids[max(0, length - 1) : length], _decoded(tokenizer, ids[:length])
    start = len(split_thought(begun, close).answer or "")
    answer = _text(tokenizer, ids[length - len(last) :])[len(_text(tokenizer, last)) - start :]
    if not answer.strip():
        return without_answer
    return Response(tuple(ids), answer.strip(), ended, whole.thought, length)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decodes ids and keeps special tokens, because markers may be special tokens."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )

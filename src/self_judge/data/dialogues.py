"""Parses dialogues with a chosen and a rejected last answer: HH dialogues and TRL preference data.

The parsers are pure functions of one record.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from self_judge.data.records import (
    Parsed,
    RecordRef,
    merge_turns,
    pair_problem,
    unused_text,
)
from self_judge.datatypes import LabeledPair, Message, PreferenceRecord
from self_judge.prompting.chat_template import common_length
from self_judge.prompting.messages import reasoning_key
from self_judge.prompting.thoughts import NO_ANSWER, answer_of, before_thought

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
# Redundant headers at the start of a turn's text, such as "Human:" in "\n\nAssistant: Human: Hi".
_HEADER = re.compile(r"\A(?:\s*(?:Human|Assistant):)+")
_HEADER_OF_TURN = "redundant header of a turn"
_LAST_ANSWER = "\n\nAssistant:"
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}
_DIFFERENT_PREFIX = "the two dialogues differ before the last answer"
_USED = ("prompt", "chosen", "rejected", "system", "history", "score_chosen", "score_rejected")
# Columns that contain the prompt in some datasets.
_PROMPTS = {"input", "instruction", "query", "question"}


def select_hh(
    record: Mapping[str, Any],
    index: int,
    *,
    with_pairs: bool = True,
    source: str = "hh",
    line: int | None = None,
) -> Parsed:
    """Parses an HH record, in which `chosen` and `rejected` are whole dialogues as text.

    The demonstration is the last answer in `chosen`. Earlier answers are part of the prompt. With
    `with_pairs=False`, `rejected` is ignored.

    Raises:
        DataError: a field is missing, is not text, or is not a dialogue that starts with "Human:".
    """
    where = RecordRef(source, index, line)
    chosen_text = where.text(record, "chosen")
    chosen = _dialogue(chosen_text, where, "chosen")
    prompt, demonstration, problem = _split_dialogue(chosen)
    if problem:
        return Parsed(None, (f"record: {problem}",))
    pairs: tuple[LabeledPair, ...] = ()
    skipped: tuple[str, ...] = ()
    rejected_text = ""
    if with_pairs:
        rejected_text = where.text(record, "rejected")
        other_prompt, worse, problem = _split_dialogue(_dialogue(rejected_text, where, "rejected"))
        same_prefix = (
            chosen_text.rpartition(_LAST_ANSWER)[0] == rejected_text.rpartition(_LAST_ANSWER)[0]
        )
        if not problem and not (same_prefix and prompt == other_prompt):
            problem = _DIFFERENT_PREFIX
        problem = problem or _pair_problem(demonstration, worse)
        if problem:
            skipped = (f"pair: {problem}",)
        else:
            pairs = (LabeledPair(demonstration, worse),)
    removed = (_HEADER_OF_TURN,) * _headers(chosen_text, rejected_text)
    parsed = PreferenceRecord(prompt, demonstration, pairs, source, index)
    return Parsed(parsed, skipped, removed, tuple(unused_text(record, ("chosen", "rejected"))))


def _headers(chosen: str, rejected: str) -> int:
    """Counts the headers removed from a pair. Headers in the shared prompt count once."""
    own, other = (
        [bool(_HEADER.match(turn)) for turn in _TURN.split(text)[2::2]]
        for text in (chosen, rejected)
    )
    return sum(own) + sum(other[-1:])


def parse_dialogue(text: str) -> list[Message]:
    """Splits the text of an HH dialogue into messages. Empty turns and repeated roles are kept.

    A second header at the start of a turn ("Assistant: Human: Hi") is removed (see section A.1 of
    the paper).

    Raises:
        ValueError: the text does not start with a Human turn.
    """
    if not starts_with_human(text):
        raise ValueError("does not start with 'Human:'")
    parts = _TURN.split(text)[1:]
    return [
        {"role": _ROLE_OF[speaker], "content": _HEADER.sub("", content).strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def starts_with_human(text: str) -> bool:
    return text.lstrip().startswith("Human:")


def _dialogue(text: str, where: RecordRef, field: str) -> list[Message]:
    try:
        return parse_dialogue(text)
    except ValueError as error:
        raise where.error(field, f"{error}: {text[:40]!r}") from None


def _split_dialogue(turns: list[Message]) -> tuple[tuple[Message, ...], str, str]:
    """Returns (prompt, last answer, problem). `problem` is `""` if the dialogue is usable."""
    if turns[-1]["role"] != "assistant":
        return (), "", "the dialogue does not end with an answer"
    if problem := _response_problem(turns[-1]["content"]):
        return (), "", problem
    *prompt, answer = merge_turns(turns)
    if not prompt or prompt[0]["role"] != "user":
        return (), "", "empty prompt"
    return tuple(prompt), answer["content"], ""


def _pair_problem(chosen: str, rejected: str) -> str:
    return _response_problem(rejected) or pair_problem(chosen, rejected)


def _response_problem(text: str) -> str:
    answer = answer_of(text)
    return NO_ANSWER if answer is None else "" if answer.strip() else "empty response"


def select_preference(
    record: Mapping[str, Any],
    index: int,
    *,
    with_pairs: bool = True,
    source: str = "preference",
    line: int | None = None,
) -> Parsed:
    """Parses a TRL preference record with `chosen`, `rejected` and optionally `prompt`.

    The record may be standard (strings) or conversational (lists of messages), or it may mix
    strings and lists of messages. The prompt may be explicit, repeated in the responses, or
    implicit (only in the responses). A single message may replace a list, and messages may be JSON
    text. The columns `system` and `history` precede the prompt. OpenAI's `input`,
    `preferred_output` and `non_preferred_output` are also accepted. If the record or its `metadata`
    has `score_chosen` and `score_rejected`, the pair is skipped unless the chosen response has the
    higher score.

    Raises:
        DataError: a field is missing or has the wrong type, a response is not from the assistant,
            or another column may contain the prompt.
        UnusableRecordError: the record or a message contains tools or images.
    """
    where = RecordRef(source, index, line)
    record = _from_openai(record, where)
    where.refuse_lost_columns(record)
    chosen, rejected = (
        where.dialogue(where.value(record, name), name) for name in ("chosen", "rejected")
    )
    given = where.dialogue(record.get("prompt"), "prompt")
    unused = tuple(unused_text(record, _USED))
    if given is None:
        _refuse_other_prompts(record, unused, isinstance(chosen, str), where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt, better, worse = _standard(chosen, rejected, given, where)
        same_prompt = True
    else:
        better_dialogue = _whole_dialogue(given, chosen, "chosen", where)
        worse_dialogue = _whole_dialogue(given, rejected, "rejected", where)
        prompt, better = better_dialogue[:-1], better_dialogue[-1]["content"].strip()
        worse = worse_dialogue[-1]["content"].strip()
        same_prompt = prompt == worse_dialogue[:-1]
    asked = bool(prompt) and bool(prompt[-1]["content"].strip())
    prompt = merge_turns(where.after_earlier(record, prompt))
    if not asked or not any(m["role"] == "user" for m in prompt):
        return Parsed(None, (f"record: {'no common prompt' if given is None else 'empty prompt'}",))
    if prompt[-1]["role"] != "user":
        raise where.error("prompt", f"ends with role {prompt[-1]['role']!r}, expected 'user'")
    if problem := _response_problem(better):
        return Parsed(None, (f"record: {problem}",))
    problem = "" if same_prompt else _DIFFERENT_PREFIX
    problem = problem or _score_problem(record, where) or _pair_problem(better, worse)
    pairs = (LabeledPair(better, worse),) if with_pairs and not problem else ()
    skipped = (f"pair: {problem}",) if with_pairs and problem else ()
    answers = [answer[-1] for answer in (chosen, rejected) if isinstance(answer, list)]
    removed = tuple(filter(None, map(reasoning_key, answers)))
    if isinstance(given, str) and starts_with_human(given):
        removed += (_HEADER_OF_TURN,) * _headers(given, "")
    parsed = PreferenceRecord(tuple(prompt), better, pairs, source, index)
    return Parsed(parsed, skipped, removed, unused)


def is_openai(record: Mapping[str, Any]) -> bool:
    """Returns whether a record has the columns of OpenAI's preference data."""
    return {"preferred_output", "non_preferred_output"} <= record.keys()


def _from_openai(record: Mapping[str, Any], where: RecordRef) -> Mapping[str, Any]:
    """Renames the columns of OpenAI's preference data; other records are unchanged."""
    if not is_openai(record):
        return record
    asked = where.value(record, "input")
    fields = {"messages": asked} if not isinstance(asked, Mapping) else asked
    others = {k: v for k, v in record.items() if not k.endswith(("input", "preferred_output"))}
    return {
        **others,
        **{name: value for name, value in fields.items() if name != "messages"},
        "prompt": where.value(fields, "messages", "input"),
        "chosen": record["preferred_output"],
        "rejected": record["non_preferred_output"],
    }


def _refuse_other_prompts(
    record: Mapping[str, Any], others: Collection[str], texts: bool, where: RecordRef
) -> None:
    """Raises an error if the prompt is missing and another column may contain it.

    Otherwise, the common prefix of both responses would be treated as the prompt.
    """
    named = sorted(_PROMPTS & set(others)) or (list(others) if texts else [])
    if named:
        raise where.error(
            "prompt",
            f"is missing; rename the column {named[0]!r}, map it (columns: {{prompt: "
            f"{named[0]}}}), or remove the columns beside chosen and rejected: {', '.join(others)}",
        )


def _standard(
    chosen: str, rejected: str, given: Any, where: RecordRef
) -> tuple[list[Message], str, str]:
    """Returns (prompt, chosen response, rejected response) for a record with string responses."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        where.text({name: text}, name)
    if isinstance(given, list):
        return where.messages(given, "prompt"), chosen.strip(), rejected.strip()
    if given is None:
        given = chosen[: _shared_prefix(chosen, rejected)]
        # The prompt excludes words that the thoughts share: "q <think>Hm. A", "q <think>Hm. B".
        given = before_thought(given, chosen, rejected)
    elif not isinstance(given, str):
        raise where.expected("text or messages", given, "prompt")
    where.text({"prompt": given}, "prompt")
    if given and chosen.startswith(given) and rejected.startswith(given):
        chosen, rejected = chosen[len(given) :], rejected[len(given) :]
    prompt: list[Message] = [{"role": "user", "content": given.strip()}]
    if starts_with_human(given):
        turns = parse_dialogue(given)
        if turns[-1] == {"role": "assistant", "content": ""}:  # ends with "\n\nAssistant:", like HH
            prompt = turns[:-1]
    return prompt, chosen.strip(), rejected.strip()


def _shared_prefix(a: str, b: str) -> int:
    """Returns the length of the common prefix of two strings, shortened to a word boundary."""
    length = common_length(a, b)
    # If one string is a prefix of the other, the end of the prompt is unknown.
    if length == min(len(a), len(b)):
        return 0
    while length and not a[length - 1].isspace():
        length -= 1
    return length


def _whole_dialogue(given: Any, response: Any, field: str, where: RecordRef) -> list[Message]:
    """Joins the prompt and response into one dialogue that ends with an assistant message.

    The response may repeat the whole prompt or only its end, or it may contain its own prompt.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": where.text({"prompt": given}, "prompt")}]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    prompt = [] if given is None else where.messages(given, "prompt")
    answer = where.messages(response, field)
    if not answer or answer[-1]["role"] != "assistant":
        got = f"ends with role {answer[-1]['role']!r}" if answer else "is empty"
        raise where.error(field, f"{got}, expected the last message to have role 'assistant'")
    repeated = (n for n in range(len(prompt), 0, -1) if prompt[-n:] == answer[:n])
    if (n := next(repeated, 0)) or answer[0]["role"] == "assistant":
        return prompt + answer[n:]
    return answer


def _score_problem(record: Mapping[str, Any], where: RecordRef) -> str:
    metadata = record.get("metadata")
    scores = metadata if isinstance(metadata, Mapping) else {}
    scores = record if "score_chosen" in record else scores
    better = where.number(scores.get("score_chosen"), "score_chosen")
    worse = where.number(scores.get("score_rejected"), "score_rejected")
    if better is None or worse is None or better > worse:
        return ""
    return "tied scores" if better == worse else "chosen has the lower score"

"""Parses one record of a judge benchmark or of preference data into labeled comparisons.

The parsers are functions of one record. `reader_of_columns` selects the parser.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, product, takewhile
from typing import Any, Literal

from self_judge.data.records import (
    RecordRef,
    first_question,
    is_held_out,
    judge_context,
    listed,
    pair_problem,
    question_columns,
    unused_text,
)
from self_judge.data.sources import PARSERS, kind_of, question_of
from self_judge.datatypes import Comparison, Message
from self_judge.errors import DataError, UnusableRecordError
from self_judge.prompting.judge_templates import dialogue_text

Label = Literal["a", "b", "tie"]
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")
# The subsets that benchmarks report. A subset in the data belongs to one by its prefix.
_JUDGE_BENCH = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
_RM_BENCH = ("chat", "code", "math", "safety")
_REWARD_BENCH_2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
_VOTES = ("winner_model_a", "winner_model_b", "winner_tie")


@dataclass(frozen=True, slots=True)
class LabeledComparison:
    """A comparison with its label from the data.

    Attributes:
        comparison: the context and the responses, in the data's order. If the data has chosen and
            rejected responses, a hash of the texts determines which response is `a`, so that the
            better response is not always `a`.
        label: the better response, or `"tie"`.
        subset: the part of the data for which separate results are reported; may be empty.
        principle: the principle to which the label applies; `None` means overall.
        source, index: the source of the record, and the record's index in the source. Pairs of the
            same record are consecutive.
        benchmark: the benchmark whose own metric applies (see `benchmark_metrics`); may be empty.
        part: the part of the metric: `"easy"`, `"normal"` or `"hard"` in RM-Bench, the prompt's ID
            in the subset Ties of RewardBench 2, and otherwise empty.
    """

    comparison: Comparison
    label: Label
    subset: str
    principle: str | None
    source: str
    index: int
    benchmark: str = ""
    part: str = ""

    @property
    def digest(self) -> str:
        """A hash of the texts, label and principle, used to match pairs between evaluations."""
        c = self.comparison
        parts = (c.context, c.response_a, c.response_b, self.label, self.principle or "")
        return _digest(*parts).hex()


Found = Iterator[LabeledComparison | str]
Reader = Callable[[Mapping[str, Any], RecordRef], Found]


def reader_of_columns(record: Mapping[str, Any], label: str, held_out: float = 0.0) -> Reader:
    """Returns the parser for the format of a source, detected from one of its records.

    A parser yields the record's pairs, and the reason for each skipped part as a string.

    Args:
        label: the name of the source for messages.
        held_out: see `BenchmarkSource`.

    Raises:
        DataError: the columns match no format, or `held_out` is set for a benchmark.
    """
    if held_out:
        try:
            return partial(_parsed, kind_of(record, label), held_out=held_out)
        except DataError:
            raise DataError(f"{label}: --held-out is only for preference data") from None
    columns = record.keys()
    if {"output_1", "output_2", "label"} <= columns:
        return _llmbar
    if {"response1", "response2", *_ANNOTATORS} <= columns:
        return _pandalm
    if {"question", "response_A", "response_B", "label"} <= columns:
        return _judge_bench
    if {"conversation_a", "conversation_b", "winner"} <= columns:
        return _votes_on_conversations
    if {"prompt", "response_a", "response_b"} <= columns and {"winner", _VOTES[0]} & columns:
        return _votes_on_responses
    if {"response_a", "response_b", "label"} <= columns:
        return _labeled
    texts, rejected = listed(record.get("chosen")), listed(record.get("rejected"))
    of_texts = isinstance(texts, list) and set(map(type, texts)) == {str}
    as_text = texts is not record.get("chosen")  # an answer may be a JSON list
    known = isinstance(rejected, list) and bool({"domain", "subset"} & columns)
    if of_texts and (known or not as_text) and {"prompt", "rejected"} <= columns:
        return _reader_of_lists(columns, label)
    if {"input", "targets"} <= columns:
        return _hhh_targets
    if {"instruction", "chosen", "rejected"} <= columns and "prompt" not in columns:
        return _hhh
    try:
        kind = kind_of(record, label)
    except DataError as error:
        raise DataError(
            f"{error}; or the columns of LLMBar (output_1, output_2, label), PandaLM (response1, "
            "response2, annotator1…), JudgeBench (question, response_A, response_B, label), votes "
            "(conversation_a, conversation_b, winner) or HHH (input, targets)"
        ) from None
    return partial(_parsed, kind)


def _reader_of_lists(columns: Collection[str], label: str) -> Reader:
    """Returns the reader of records whose `chosen` and `rejected` are lists of responses."""
    if "domain" in columns:
        return _rm_bench
    if "subset" in columns:
        return _reward_bench_2
    raise DataError(
        f"{label}: chosen is a list of texts, which needs a column domain (RM-Bench) or subset "
        f"(RewardBench 2); found {sorted(columns)}"
    )


def _unused(record: Mapping[str, Any], *used: str) -> Iterator[str]:
    return (f"column {name!r}" for name in unused_text(record, used))


def usable(found: Found) -> Found:
    """Yields what a parser finds. An unusable record becomes the reason for skipping it."""
    try:
        yield from found
    except UnusableRecordError as error:
        yield f"record: {error.reason}"


def _labeled(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses the columns that a mapping yields; see `BenchmarkSource`."""
    labels: dict[str, Label] = {"a": "a", "b": "b", "tie": "tie"}
    label = labels.get(str(where.value(record, "label")))
    if label is None:
        given = f"expected a, b or tie, got {record['label']!r:.40}"
        raise where.error(
            "label", f"{given}; map its values, as in label.a={record['label']!s:.20}"
        )
    context, _ = question_of(record, where)
    a, b = (where.text(record, name).strip() for name in ("response_a", "response_b"))
    subset = record.get("subset")
    yield _pair(where, context.strip(), a, b, label, subset if isinstance(subset, str) else "")
    asked = question_columns(record)
    yield from _unused(record, *asked, "response_a", "response_b", "label", "subset")


def _llmbar(record: Mapping[str, Any], where: RecordRef) -> Found:
    label = where.number(record["label"], "label")
    if label not in (1, 2):
        raise where.error("label", f"expected 1 or 2, got {record['label']!r}")
    a, b = where.text(record, "output_1").strip(), where.text(record, "output_2").strip()
    asked = "input" if "input" in record else "instruction"
    context = where.text(record, asked).strip()
    yield _pair(where, context, a, b, "a" if label == 1 else "b")
    yield from _unused(record, asked, "output_1", "output_2", "label")


def _pandalm(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a record, with the majority vote of three annotators as the label; 0 means a tie."""
    votes = Counter(where.number(record[name], name) for name in _ANNOTATORS)
    if not votes.keys() <= {0, 1, 2}:
        given = [record[name] for name in _ANNOTATORS]
        raise where.error("annotator1", f"expected 0, 1 or 2 from each annotator, got {given}")
    vote, count = votes.most_common(1)[0]
    if count < 2:
        yield "no majority among the annotators"
        return
    labels: dict[Any, Label] = {0: "tie", 1: "a", 2: "b"}
    asked = [where.text(record, "instruction").strip()]
    if record.get("input"):
        asked.append(where.text(record, "input").strip())
    a, b = (
        # In the published file, the response "True" became a boolean.
        str(record[name]) if isinstance(record[name], bool) else where.text(record, name).strip()
        for name in ("response1", "response2")
    )
    yield _pair(where, "\n\n".join(asked), a, b, labels[vote])
    yield from _unused(record, "instruction", "input", "response1", "response2", *_ANNOTATORS)


def _judge_bench(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a pair of JudgeBench (arXiv 2410.12784)."""
    labels: dict[str, Label] = {"A>B": "a", "B>A": "b"}
    label = labels.get(where.text(record, "label"))
    if label is None:
        raise where.error("label", f"expected 'A>B' or 'B>A', got {record['label']!r}")
    subset = where.one_of(record, "source", _JUDGE_BENCH) if "source" in record else ""
    a, b = where.text(record, "response_A").strip(), where.text(record, "response_B").strip()
    question = where.text(record, "question").strip()
    yield _pair(where, question, a, b, label, subset, "JudgeBench")
    yield from _unused(record, "question", "response_A", "response_B", "label", "source")


def _votes_on_conversations(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a human vote of MT-Bench or Chatbot Arena.

    `turn` is the number of turns that were judged; without it, all turns count. The
    conversations are lists of messages, or such lists as JSON text.
    """
    label = _winner(record, where)
    turn = _turn(record, where)
    sides = []
    for name in ("conversation_a", "conversation_b"):
        messages = where.messages(_listed(record, name, where)[: turn and 2 * turn], name)
        if len(messages) < 2 * (turn or 1) or messages[-1]["role"] != "assistant":
            raise where.error(name, f"expected a question and an answer for turn {turn or 1}")
        sides.append(messages)
    yield _vote(where, sides, label, f"turn {turn}" if turn else "")
    yield from _unused(record, "conversation_a", "conversation_b", "winner", "turn")


def _turn(record: Mapping[str, Any], where: RecordRef) -> int | None:
    given = record.get("turn")
    if given is None:
        return None
    turn = where.number(given, "turn")
    if turn is None or turn < 1 or turn % 1:
        raise where.error("turn", f"expected an integer of at least 1, got {given!r}")
    return int(turn)


def _votes_on_responses(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a human vote of Chatbot Arena with the columns `prompt`, `response_a`, `response_b`.

    With the columns `winner_model_a`, `winner_model_b` and `winner_tie`, the texts are JSON lists
    with one text (or null) per turn.
    """
    names = ("prompt", "response_a", "response_b")
    if "winner" in record:
        label = _winner(record, where)
        prompts, *answers = ([where.text(record, name)] for name in names)
    else:
        votes = [where.number(where.value(record, name), name) for name in _VOTES]
        if sorted(vote or 0 for vote in votes) != [0, 0, 1]:
            raise where.error(_VOTES[0], f"expected one 1 and two 0 in {_VOTES}, got {votes}")
        outcomes: tuple[Label, ...] = ("a", "b", "tie")
        label = outcomes[votes.index(1)]
        prompts, *answers = (
            [text or "" for text in _listed(record, name, where)] for name in names
        )
    sides = []
    for name, texts in zip(names[1:], answers, strict=True):
        if not texts or len(texts) != len(prompts):
            raise where.error(name, f"expected {len(prompts)} answers, got {len(texts)}")
        turns = chain.from_iterable(zip(prompts, texts, strict=True))
        roles = ("user", "assistant") * len(texts)
        given = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
        sides.append(where.messages(given, name))
    yield _vote(where, sides, label, "")
    yield from _unused(record, *names, *(["winner"] if "winner" in record else _VOTES))


def _listed(record: Mapping[str, Any], name: str, where: RecordRef) -> list[Any]:
    """Returns a list that may be stored as text."""
    value = listed(where.value(record, name))
    if isinstance(value, str):
        raise where.error(name, f"expected a list, or one as JSON, got {value:.40}")
    return where.items({name: value}, name)


def _winner(record: Mapping[str, Any], where: RecordRef) -> Label:
    """Returns the label of a vote. "tie (bothbad)" and "both_bad" prefer neither response."""
    winner = where.text(record, "winner")
    labels: dict[str, Label] = {"model_a": "a", "model_b": "b", "both_bad": "tie"}
    label = "tie" if winner.startswith("tie") else labels.get(winner)
    if label is None:
        raise where.error("winner", f"expected model_a, model_b, tie or both_bad, got {winner!r}")
    return label


def _vote(
    where: RecordRef, sides: list[list[Message]], label: Label, subset: str
) -> LabeledComparison | str:
    """Returns a voted pair. The context is the first question, and the response is the rest."""
    asked = [list(takewhile(lambda m: m["role"] != "assistant", side)) for side in sides]
    if not asked[0]:
        raise where.error("conversation_a", "expected a question before the first answer")
    if asked[0] != asked[1]:
        raise where.error("conversation_b", "has a different first question from conversation_a")
    answers = [side[len(asked[0]) :] for side in sides]
    a, b = (
        answer[0]["content"].strip()
        if len(answer) == 1
        else dialogue_text(answer).removeprefix("Assistant: ")
        for answer in answers
    )
    return _pair(where, dialogue_text(asked[0]), a, b, label, subset, "human votes")


def _rm_bench(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a record of RM-Bench (arXiv 2410.16184): three styles, from concise to formatted.

    Each chosen response is compared with each rejected one. A pair is hard if the rejected response
    has the more elaborate style, and easy if the chosen one has. The subset is the domain.
    """
    chosen, rejected = _texts(record, "chosen", where), _texts(record, "rejected", where)
    for name, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != 3:
            raise where.error(name, f"expected three styles, got {len(texts)}")
    question = where.text(record, "prompt").strip()
    if problem := _problem(chosen, rejected):
        yield problem
        return
    subset = where.one_of(record, "domain", _RM_BENCH)
    for (i, better), (j, worse) in product(enumerate(chosen), enumerate(rejected)):
        part = "hard" if i < j else "easy" if i > j else "normal"
        yield replace(
            _ranked(where, question, better, worse, subset), benchmark="RM-Bench", part=part
        )
    yield from _unused(record, "prompt", "chosen", "rejected", "domain")


def _reward_bench_2(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses a record of RewardBench 2 (arXiv 2506.01937).

    Each chosen response is compared with each rejected one. In the subset Ties, several responses
    are right; they are also compared with each other, with the label `"tie"`. The ID there is
    `ref:N` or `tied:N`, for two prompts that belong together.
    """
    chosen, rejected = _texts(record, "chosen", where), _texts(record, "rejected", where)
    question = where.text(record, "prompt").strip()
    subset = where.one_of(record, "subset", _REWARD_BENCH_2)
    part = where.text(record, "id") if subset == "Ties" else ""
    if part and not re.fullmatch(r"(ref|tied):\d+", part):
        raise where.error("id", f"expected ref:N or tied:N in the subset Ties, got {part!r}")
    if not chosen or (len(chosen) > 1 and not part):
        raise where.error("chosen", f"expected one response, got {len(chosen)}")
    if not rejected:
        raise where.error("rejected", "expected at least one response, got none")
    if problem := _problem(chosen, rejected):
        yield problem
        return
    for better, worse in product(chosen, rejected):
        ranked = _ranked(where, question, better, worse, subset)
        yield replace(ranked, benchmark="RewardBench 2", part=part)
    for a, b in combinations(chosen, 2):
        yield _pair(where, question, a, b, "tie", subset, "RewardBench 2", part)
    yield from _unused(record, "prompt", "chosen", "rejected", "subset", *(["id"] if part else []))


def _texts(record: Mapping[str, Any], name: str, where: RecordRef) -> list[str]:
    given = {f"{name}[{i}]": value for i, value in enumerate(_listed(record, name, where))}
    return [where.text(given, at).strip() for at in given]


def _problem(chosen: list[str], rejected: list[str]) -> str:
    """Returns the reason why a record's responses cannot all be judged, or `""` if they can."""
    problems = {pair_problem(*pair) for pair in product(chosen, rejected)} - {""}
    return f"record: {min(problems)}" if problems else ""


def _hhh_targets(record: Mapping[str, Any], where: RecordRef) -> Found:
    """Parses HHH in the format of BIG-bench and the Hub: two choices, one of which has label 1."""
    targets = record["targets"]
    if not isinstance(targets, Mapping):
        raise where.error("targets", "expected a mapping with choices and labels")
    choices, labels = where.items(targets, "choices"), where.items(targets, "labels")
    if sorted(labels) != [0, 1] or len(choices) != 2:
        raise where.error("targets.labels", f"expected one 0 and one 1, got {labels}")
    better, worse = (choices[labels.index(value)] for value in (1, 0))
    asked = {"prompt": where.text(record, "input"), "chosen": better, "rejected": worse}
    others = {name: value for name, value in record.items() if name not in ("input", "targets")}
    yield from _parsed("preference", {**others, **asked}, where)


def _hhh(record: Mapping[str, Any], where: RecordRef) -> Found:
    asked = {name: value for name, value in record.items() if name != "instruction"}
    yield from _parsed("preference", {**asked, "prompt": where.text(record, "instruction")}, where)


def _parsed(kind: str, record: Mapping[str, Any], where: RecordRef, held_out: float = 0.0) -> Found:
    """Yields the pairs in a training record. A hash of the texts determines each pair's order."""
    parsed = PARSERS[kind](record, where.index, source=where.source, line=where.line)
    yield from parsed.skipped
    yield from (f"column {name!r}" for name in parsed.unused if name not in ("subset", "source"))
    if parsed.record is None:
        return
    if held_out and not is_held_out(first_question(parsed.record), held_out):
        yield "record: not held out from training"
        return
    # RewardBench stores the name of the subset in `subset`, and HHH stores it in `source`.
    # UltraFeedback has no subsets.
    named = record.get("subset", record.get("source")) if kind == "preference" else None
    subset, context = named if isinstance(named, str) else "", judge_context(parsed.record)
    for pair in parsed.record.pairs:
        ranked = _ranked(where, context, pair.chosen, pair.rejected, subset)
        yield replace(ranked, principle=pair.principle)


def _ranked(
    where: RecordRef, context: str, better: str, worse: str, subset: str
) -> LabeledComparison:
    """Returns a pair in an order that a hash of the texts determines."""
    swapped = _digest(context, *sorted((better, worse)))[0] % 2
    drawn = Comparison(context, better, worse)
    return LabeledComparison(
        drawn.swapped() if swapped else drawn,
        "b" if swapped else "a",
        subset,
        None,
        where.source,
        where.index,
    )


def _pair(
    where: RecordRef,
    context: str,
    a: str,
    b: str,
    label: Label,
    subset: str = "",
    benchmark: str = "",
    part: str = "",
) -> LabeledComparison | str:
    # Empty responses are kept, because people rated them.
    if problem := pair_problem(a, b):
        return f"pair: {problem}"
    pair = Comparison(context, a, b)
    return LabeledComparison(pair, label, subset, None, where.source, where.index, benchmark, part)


def _digest(*parts: str) -> bytes:
    joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=8).digest()

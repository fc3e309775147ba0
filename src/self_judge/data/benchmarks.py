"""Reads labeled comparisons from judge benchmarks and preference data, one by one.

This module supports LLMBar, PandaLM, HHH, MT-Bench's human votes, RewardBench, HH, UltraFeedback
and any TRL preference data, from the Hub or from local files and folders.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from self_judge.data.files import (
    InMemory,
    in_memory,
    is_data_file,
    is_saved_dataset,
    read_raw,
    split_of,
)
from self_judge.data.records import RecordRef, judge_context, pair_problem
from self_judge.data.sources import PARSERS, kind_of, prompt_of
from self_judge.datatypes import Comparison
from self_judge.errors import DataError, UnusableRecordError
from self_judge.prompting.judge_templates import dialogue_text

Label = Literal["a", "b", "tie"]
_ANNOTATORS = ("annotator1", "annotator2", "annotator3")


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
        source, index: the source of the record, and the record's index in the source.
    """

    comparison: Comparison
    label: Label
    subset: str
    principle: str | None
    source: str
    index: int

    @property
    def digest(self) -> str:
        """A hash of the texts, label and principle, used to match pairs between evaluations."""
        c = self.comparison
        parts = (c.context, c.response_a, c.response_b, self.label, self.principle or "")
        return _digest(*parts).hex()


@dataclass(frozen=True, slots=True)
class BenchmarkSource:
    """One source of labeled comparisons.

    Args:
        path: a dataset ID on the Hub, a local file or a local folder, as in `files.read_raw`. If no
            file directly in the folder has a split in its name, each file in the folder and its
            subfolders is a subset (as in LLMBar).
        splits: the splits to read, in the given order. If there are several splits, each is a
            subset. A single file is always read completely.
        data_dir, name, revision: as in `files.read_raw`.
        columns: the data's own column names; see `records.map_columns`. The columns `context` or
            `prompt`, `response_a`, `response_b` and `label` (`a`, `b` or `tie`) form a comparison.
    """

    path: str | InMemory
    splits: tuple[str, ...] = ("test",)
    data_dir: str | None = None
    name: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def read_comparisons(
    source: BenchmarkSource, skipped: Counter[str] | None = None
) -> Iterator[LabeledComparison]:
    """Yields the labeled comparisons from a source in order.

    The format of each file or split is detected from the columns of its first record.

    Args:
        skipped: a counter to which the number of skipped items for each reason is added.

    Raises:
        DataError: the source has no records, its format is unknown, or a record is malformed.
    """
    skipped = Counter() if skipped is None else skipped
    for label, subset, records in _parts(source):
        first = next(records, None)
        if first is None:
            raise DataError(f"{label}: there are no records")
        select = _reader_of(first, label)
        for index, record in enumerate(chain([first], records)):
            for found in _usable(select(record, RecordRef(label, index))):
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    named = "/".join(part for part in (subset, found.subset) if part)
                    yield replace(found, subset=named)


def _parts(source: BenchmarkSource) -> Iterator[tuple[str, str, Iterator[dict[str, Any]]]]:
    """Yields (label for messages, subset, records) for each file or split."""
    if in_memory(source.path):
        yield "dataset in memory", "", read_raw(source.path, columns=source.columns)
        return
    path = str(source.path)
    local = Path(path).expanduser()
    root = local / source.data_dir if source.data_dir else local
    files = _files_without_splits(root, source.splits)
    for subset, file in files.items():
        yield str(file), subset, read_raw(str(file), columns=source.columns)
    if files:
        return
    label = "/".join(part for part in (path, source.name, source.data_dir) if part)
    read = partial(
        read_raw,
        path,
        data_dir=source.data_dir,
        name=source.name,
        revision=source.revision,
        columns=source.columns,
    )
    if local.is_file():
        yield label, "", read()
        return
    for split in source.splits:
        yield f"{label}[{split}]", split if len(source.splits) > 1 else "", read(split=split)


def _files_without_splits(root: Path, splits: tuple[str, ...]) -> dict[str, Path]:
    """Maps each subset of a local folder to a file; returns `{}` if file names contain splits."""
    if not root.is_dir() or is_saved_dataset(root):
        return {}
    files = [f for f in sorted(root.rglob("*")) if is_data_file(f)]
    if any(split_of(f) for f in files if f.parent == root):
        return {}
    files = [f for f in files if split_of(f) in (None, *splits)]
    alone = Counter(f.parent for f in files)
    subsets: dict[str, Path] = {}
    for file in files:
        named = [file.name.partition(".")[0]] if alone[file.parent] > 1 else []
        subsets["/".join([*file.parent.relative_to(root).parts, *named])] = file
    return subsets


# The comparisons in a record, and the reason for each skipped part as a string.
_Found = Iterator[LabeledComparison | str]
_Reader = Callable[[Mapping[str, Any], RecordRef], _Found]


def _reader_of(record: Mapping[str, Any], label: str) -> _Reader:
    columns = record.keys()
    if {"output_1", "output_2", "label"} <= columns:
        return _llmbar
    if {"response1", "response2", *_ANNOTATORS} <= columns:
        return _pandalm
    if {"conversation_a", "conversation_b", "winner"} <= columns:
        return _mt_bench
    if {"response_a", "response_b", "label"} <= columns:
        return _labeled
    if {"input", "targets"} <= columns:
        return _hhh_targets
    if {"instruction", "chosen", "rejected"} <= columns and "prompt" not in columns:
        return _hhh
    try:
        kind = kind_of(record, label)
    except DataError as error:
        raise DataError(
            f"{error}; or the columns of LLMBar (output_1, output_2, label), PandaLM (response1, "
            "response2, annotator1…), MT-Bench (conversation_a, conversation_b, winner) or HHH "
            "(input, targets)"
        ) from None
    return partial(_parsed, kind)


def _usable(found: _Found) -> _Found:
    try:
        yield from found
    except UnusableRecordError as error:
        yield f"record: {error.reason}"


def _llmbar(record: Mapping[str, Any], where: RecordRef) -> _Found:
    label = where.number(record["label"], "label")
    if label not in (1, 2):
        raise where.error("label", f"expected 1 or 2, got {record['label']!r}")
    a, b = where.text(record, "output_1").strip(), where.text(record, "output_2").strip()
    context = where.text(record, "input" if "input" in record else "instruction").strip()
    yield _pair(where, context, a, b, "a" if label == 1 else "b")


def _labeled(record: Mapping[str, Any], where: RecordRef) -> _Found:
    """Parses the columns that a mapping yields; see `BenchmarkSource`."""
    labels: dict[str, Label] = {"a": "a", "b": "b", "tie": "tie"}
    label = labels.get(str(where.value(record, "label")))
    if label is None:
        given = f"expected a, b or tie, got {record['label']!r:.40}"
        raise where.error(
            "label", f"{given}; map its values, as in label.a={record['label']!s:.20}"
        )
    messages = None if "context" in record else prompt_of(record, where)
    context = dialogue_text(messages) if messages else where.text(record, "context").strip()
    a, b = (where.text(record, name).strip() for name in ("response_a", "response_b"))
    subset = record.get("subset")
    yield _pair(where, context, a, b, label, subset if isinstance(subset, str) else "")


def _pandalm(record: Mapping[str, Any], where: RecordRef) -> _Found:
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


def _mt_bench(record: Mapping[str, Any], where: RecordRef) -> _Found:
    """Parses a human vote. The context is the first question, and the response is the rest."""
    labels: dict[Any, Label] = {"model_a": "a", "model_b": "b"}
    winner = where.text(record, "winner")
    label = "tie" if winner.startswith("tie") else labels.get(winner)
    if label is None:
        raise where.error("winner", f"expected model_a, model_b or tie, got {winner!r}")
    turn = int(where.number(record.get("turn", 1), "turn") or 1)
    sides = [
        where.messages(list(record[name])[: 2 * turn], name)
        for name in ("conversation_a", "conversation_b")
    ]
    for name, messages in zip(("conversation_a", "conversation_b"), sides, strict=True):
        if len(messages) < 2 * turn or messages[-1]["role"] != "assistant":
            raise where.error(name, f"expected a question and an answer for turn {turn}")
    if sides[0][0] != sides[1][0]:
        raise where.error("conversation_b", "has a different first question from conversation_a")
    a, b = (
        m[1]["content"].strip() if turn == 1 else dialogue_text(m[1:]).removeprefix("Assistant: ")
        for m in sides
    )
    yield _pair(where, dialogue_text(sides[0][:1]), a, b, label, f"turn {turn}")


def _hhh_targets(record: Mapping[str, Any], where: RecordRef) -> _Found:
    """Parses HHH in the format of BIG-bench and the Hub: two choices, one of which has label 1."""
    targets = record["targets"]
    if not isinstance(targets, Mapping):
        raise where.error("targets", "expected a mapping with choices and labels")
    choices, labels = where.items(targets, "choices"), where.items(targets, "labels")
    if sorted(labels) != [0, 1] or len(choices) != 2:
        raise where.error("targets.labels", f"expected one 0 and one 1, got {labels}")
    better, worse = (choices[labels.index(value)] for value in (1, 0))
    asked = {"prompt": where.text(record, "input"), "chosen": better, "rejected": worse}
    yield from _parsed("preference", {**record, **asked}, where)


def _hhh(record: Mapping[str, Any], where: RecordRef) -> _Found:
    asked = {**record, "prompt": where.text(record, "instruction")}
    asked.pop("instruction")
    yield from _parsed("preference", asked, where)


def _parsed(kind: str, record: Mapping[str, Any], where: RecordRef) -> _Found:
    """Yields the pairs in a training record. A hash of the texts determines each pair's order."""
    parsed = PARSERS[kind](record, where.index, source=where.source)
    yield from parsed.skipped
    yield from (f"column {name!r}" for name in parsed.unused if name not in ("subset", "source"))
    if parsed.record is None:
        return
    # RewardBench stores the name of the subset in `subset`, and HHH stores it in `source`.
    # UltraFeedback has no subsets.
    named = record.get("subset", record.get("source")) if kind == "preference" else None
    subset, context = named if isinstance(named, str) else "", judge_context(parsed.record)
    for pair in parsed.record.pairs:
        swapped = _digest(context, *sorted((pair.chosen, pair.rejected)))[0] % 2
        drawn = Comparison(context, pair.chosen, pair.rejected)
        yield LabeledComparison(
            drawn.swapped() if swapped else drawn,
            "b" if swapped else "a",
            subset,
            pair.principle,
            where.source,
            where.index,
        )


def _pair(
    where: RecordRef, context: str, a: str, b: str, label: Label, subset: str = ""
) -> LabeledComparison | str:
    # Empty responses are kept, because people rated them.
    if problem := pair_problem(a, b):
        return f"pair: {problem}"
    comparison = Comparison(context, a, b)
    return LabeledComparison(comparison, label, subset, None, where.source, where.index)


def _digest(*parts: str) -> bytes:
    joined = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=8).digest()

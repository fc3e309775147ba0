"""Loads preference data from any supported source as `PreferenceRecord`s, with counts.

This module combines file access (`files`) with the parsers (`dialogues`, `ultrafeedback`).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from self_judge.config.schema import Source, SourceKind
from self_judge.config.yaml import build
from self_judge.data.dialogues import is_openai, select_hh, select_preference, starts_with_human
from self_judge.data.files import read_records, reader_of
from self_judge.data.hub import InMemory, in_memory
from self_judge.data.records import (
    Parsed,
    RecordRef,
    UnusedText,
    first_question,
    is_held_out,
    judge_context,
    prompt_columns,
)
from self_judge.data.ultrafeedback import select_ultrafeedback
from self_judge.datatypes import Message, PreferenceRecord
from self_judge.errors import ConfigError, DataError, UnusableRecordError, check_data, suggesting
from self_judge.prompting.judge_templates import dialogue_text

_FIELDS = {f.name for f in fields(Source)}
Subset = Literal["train", "held_out", "all"]
SourceLike: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Source | InMemory"


@dataclass(frozen=True, slots=True)
class PreferenceData:
    """Records in the order of their sources, with counts.

    Attributes:
        records: the selected records.
        counts_by_source: the counts for each source label: `read`, `other subset` (records in the
            other subset of the held-out split), `records`, `demonstrations`, `pairs`, `pairs,
            <principle>`, and `skipped record: …` or `skipped pair: …` for each reason. `removed …`
            counts parts that were removed from usable records, and `unused column: …` counts the
            records with text in a column that is not used.
    """

    records: list[PreferenceRecord]
    counts_by_source: dict[str, dict[str, int]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[PreferenceRecord]:
        return iter(self.records)

    @property
    def counts(self) -> dict[str, int]:
        """The counts over all sources."""
        total: Counter[str] = Counter()
        for counts in self.counts_by_source.values():
            total.update(counts)
        return dict(total)

    def describe(self) -> str:
        """Returns the counts as readable text, with one block per source."""
        blocks = []
        for label, counts in self.counts_by_source.items():
            shown = {k: n for k, n in counts.items() if n or k != "other subset"}
            lines = [f"  {number:>9,}  {what}" for what, number in shown.items()]
            blocks.append("\n".join([label, *lines]))
        return "\n".join(blocks)


@suggesting(split="{'path': ..., 'split': ...} as the source")
def load_preferences(
    sources: SourceLike | Sequence[SourceLike],
    *,
    subset: Subset = "train",
    held_out: float = 0.0,
    seed: int = 0,
    principles: bool | Sequence[str] = False,
    rationales: bool = False,
    max_records: int | None = None,
    num_proc: int | None = None,
) -> PreferenceData:
    """Loads the records from one or more sources.

    Args:
        sources: paths, `datasets.Dataset` objects, mappings with the fields of `Source` (whose path
            may be a `Dataset`), or `Source` objects. They are read in the given order. A list of
            records is one source.
        subset: the training subset, the held-out subset, or both.
        held_out: fraction of prompts to hold out, in [0, 1). A hash of a prompt's text determines
            whether the prompt is held out.
        seed: seed for sampling pairs. A record's pairs depend only on the seed and the record.
        principles: whether to use one pair per principle (`True` for all rated principles, or a
            list of names) instead of one general pair.
        rationales: whether to include rationales and skip pairs without usable rationales.
        max_records: maximum number of records to keep from each source (`None`: all).
        num_proc: number of processes that prepare a dataset from the Hub.

    Raises:
        DataError: a source cannot be read, a record is malformed, or no records can be used. The
            held-out subset may be empty.
    """
    # A data frame is iterable, but over the names of its columns.
    many = isinstance(sources, Sequence | Iterator) and not isinstance(sources, str)
    listed: list[Any] = [*cast("Any", sources)] if many and not in_memory(sources) else [sources]
    if not listed:
        raise DataError("no source of preference data is given")
    if all(isinstance(s, Mapping) and not in_memory(s) and not _FIELDS & set(s) for s in listed):
        from datasets import Dataset

        every = {key: None for record in listed for key in record}
        listed = [Dataset.from_list([{**every, **record} for record in listed])]
    data = PreferenceData([])
    for number, source in enumerate(map(_source_of, listed)):
        label = _label_of(source, number)
        if label in data.counts_by_source:
            raise DataError(f"{label}: the source is listed twice")
        placed = read_records(
            source.path,
            label=label,
            split=source.split,
            data_dir=source.data_dir,
            name=source.name,
            revision=source.revision,
            num_proc=num_proc,
            columns=source.columns,
        )
        selected = select_records(
            placed,
            label=label,
            kind=source.kind,
            sft=source.sft,
            pairs=source.pairs,
            subset=subset,
            held_out=held_out,
            seed=seed,
            principles=principles,
            rationales=rationales,
            max_records=max_records,
        )
        data.records.extend(selected.records)
        data.counts_by_source.update(selected.counts_by_source)
    if not data.records and subset == "train":
        other = data.counts["other subset"]
        raise DataError(
            f"{', '.join(data.counts_by_source)}: all {other:,} usable records are held out "
            f"(held_out {held_out:g}), so none is left for training: set held_out to 0, or add data"
        )
    return data


def _source_of(given: Any) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, os.PathLike):
        given = {"path": given}
    if not (isinstance(given, str | Mapping) or in_memory(given)):
        raise DataError(
            "a source is a path, a mapping with the fields of Source, a list of records or a "
            f"datasets.Dataset, got {type(given).__name__}"
        )
    fields = dict(given) if isinstance(given, Mapping) and not in_memory(given) else {"path": given}
    dataset = fields.get("path")
    if isinstance(dataset, str | os.PathLike):
        fields["path"] = os.fspath(dataset)
        check_data(fields["path"])
    if in_memory(dataset):
        fields["path"] = "in memory"
    try:
        source: Source = build(Source, fields, "")
    except ConfigError as error:
        raise DataError(f"source {fields!s:.80}: {error}") from None
    return replace(source, path=cast("str", dataset)) if in_memory(dataset) else source


def _label_of(source: Source, number: int) -> str:
    """Returns the label of a source for messages and counts."""
    if in_memory(source.path):
        return f"dataset {number} in memory"
    name = "/".join(part for part in (source.path, source.name, source.data_dir) if part)
    # A file is always read completely, so its label needs no split.
    return name if reader_of(Path(source.path)) else f"{name}[{source.split}]"


def select_records(
    placed: Iterable[tuple[RecordRef, Mapping[str, Any]]],
    *,
    label: str,
    kind: SourceKind = "auto",
    sft: bool = True,
    pairs: bool = True,
    subset: Subset = "train",
    held_out: float = 0.0,
    seed: int = 0,
    principles: bool | Sequence[str] = False,
    rationales: bool = False,
    max_records: int | None = None,
) -> PreferenceData:
    """Parses and selects raw records as in `load_preferences`.

    Args:
        placed: the raw records with their places.
        label: the name of the source for messages.

    Raises:
        DataError: an option is invalid, a record is malformed, or no record can be used.
    """
    if isinstance(principles, str):
        principles = (principles,)
    _check_options(kind, subset, held_out, principles, rationales, max_records)
    records = iter(placed)
    first = next(records, None)
    if first is None:
        raise DataError(f"{label}: there are no records")
    known = kind_of(first[1], label) if kind == "auto" else kind
    if principles and pairs and known != "ultrafeedback":
        raise DataError(
            f"{label}: pairs per principle need ratings per principle (kind ultrafeedback), but "
            f"this source has kind {known}"
        )
    parse = PARSERS[known]
    if known == "ultrafeedback":
        parse = partial(parse, seed=seed, principles=principles, rationales=rationales)
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    if pairs and not isinstance(principles, bool):
        counts.update({f"pairs, {principle}": 0 for principle in principles})
    kept: list[PreferenceRecord] = []
    for where, record in chain([first], records):
        if len(kept) == max_records:
            break
        counts["read"] += 1
        try:
            parsed = parse(
                record, where.index, with_pairs=pairs, source=where.source, line=where.line
            )
        except UnusableRecordError as error:
            parsed = Parsed(None, (f"record: {error.reason}",))
        chosen = _in_subset(parsed.record, subset, held_out)
        if parsed.record is not None and chosen is None:
            counts["other subset"] += 1
            continue
        counts.update(f"skipped {why}" for why in parsed.skipped)
        counts.update(f"removed {what}" for what in parsed.removed)
        counts.update(f"unused column: {name}" for name in parsed.unused)
        if chosen is not None and not sft:
            chosen = replace(chosen, demonstration=None)
        if chosen is not None and chosen.demonstration is None and not chosen.pairs:
            counts["skipped record: no pair is left"] += 1
        elif chosen is not None:
            kept.append(chosen)
            counts["records"] += 1
            counts["demonstrations"] += chosen.demonstration is not None
            counts["pairs"] += len(chosen.pairs)
            counts.update(f"pairs, {p.principle}" for p in chosen.pairs if p.principle)
    if not kept and not counts["other subset"]:
        found = "; ".join(f"{what}: {number}" for what, number in counts.items() if number)
        raise DataError(f"{label}: no record could be used as kind {known} ({found})")
    return PreferenceData(kept, {label: dict(counts)})


PARSERS: dict[str, Callable[..., Parsed]] = {
    "hh": select_hh,
    "preference": select_preference,
    "ultrafeedback": select_ultrafeedback,
}
_COUNTED = ("read", "other subset", "records", "demonstrations", "pairs")


def kind_of(record: Mapping[str, Any], label: str) -> Literal["hh", "ultrafeedback", "preference"]:
    """Detects the kind of a source from one of its records.

    Raises:
        DataError: the columns match none of the three kinds.
    """
    if {"instruction", "completions"} <= record.keys():
        return "ultrafeedback"
    if is_openai(record):
        return "preference"
    if {"chosen", "rejected"} <= record.keys():
        chosen = record["chosen"]
        if "prompt" not in record and isinstance(chosen, str) and starts_with_human(chosen):
            return "hh"
        return "preference"
    raise DataError(
        f"{label}: cannot detect the kind of data from the columns {sorted(map(str, record))}; "
        "expected chosen and rejected (HH or TRL preference data), or instruction and completions "
        "(UltraFeedback); map other names: --columns prompt=question, in a run file columns: "
        "{prompt: question}"
    )


def _check_options(
    kind: str,
    subset: str,
    held_out: float,
    principles: bool | Sequence[str],
    rationales: bool,
    max_records: int | None,
) -> None:
    if kind not in ("auto", *PARSERS):
        raise DataError(f"kind must be one of auto, {', '.join(PARSERS)}, got {kind!r}")
    if subset not in ("train", "held_out", "all"):
        raise DataError(f"subset must be 'train', 'held_out' or 'all', got {subset!r}")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out must be a fraction of the prompts in [0, 1), got {held_out}")
    if subset == "held_out" and held_out == 0:
        raise DataError("subset 'held_out' is empty because held_out is 0; set held_out above 0")
    if rationales and not principles:
        raise DataError("rationales requires principles: a rationale explains a principle's rating")
    if max_records is not None and max_records < 1:
        raise DataError(f"max_records must be at least 1 (or None for all), got {max_records}")


def _in_subset(
    record: PreferenceRecord | None, subset: Subset, held_out: float
) -> PreferenceRecord | None:
    if record is None or subset == "all" or held_out == 0:
        return record
    out = is_held_out(first_question(record), held_out)
    return record if out == (subset == "held_out") else None


def to_self_judge_rows(records: Iterable[PreferenceRecord]) -> list[dict[str, Any]]:
    """Returns rows for self-training: `prompt` (messages), `context`, `chosen` and `rejected`.

    `context` is the dialogue text for judge prompts. `chosen` and `rejected` come from the record's
    first pair, or are `None` if the record has no pairs. They are used only for evaluation.
    """
    rows = []
    for record in records:
        pair = record.pairs[0] if record.pairs else None
        rows.append(
            {
                "prompt": [dict(message) for message in record.prompt],
                "context": judge_context(record),
                "chosen": pair.chosen if pair else None,
                "rejected": pair.rejected if pair else None,
            }
        )
    return rows


def read_prompts(
    path: str | InMemory,
    *,
    max_records: int | None = None,
    columns: Mapping[str, str] | None = None,
    unused: UnusedText | None = None,
) -> list[list[Message]]:
    """Reads prompts from a file of any supported type or a dataset. Each prompt is one dialogue.

    Each record has one of the columns `prompt` (a string or messages), `messages`, `turns` (as in
    the question files of MT-Bench and Vicuna; the first turn is the prompt) or `instruction` (with
    `input`, if it has one). The columns `system` and `history` precede the prompt.

    Args:
        max_records: the number of prompts to read (`None`: all).
        columns: see `map_columns`.
        unused: reports the columns that are not used.

    Raises:
        DataError: the file cannot be read, or a record has no prompt or an empty prompt.
    """
    prompts: list[list[Message]] = []
    for where, record in itertools.islice(read_records(path, columns=columns), max_records):
        if unused is not None:
            unused.add(record)
        messages = prompt_of(record, where)
        if messages is None:
            raise where.error("prompt", f"is missing; found {sorted(map(str, record))}")
        prompts.append(messages)
    if unused is not None:
        unused.report()
    return prompts


def prompt_of(record: Mapping[str, Any], where: RecordRef) -> list[Message] | None:
    """Returns a record's prompt as messages, or `None` if the record has no prompt column.

    Raises:
        DataError: the prompt is empty, or its last message is not from the user.
    """
    where.refuse_lost_columns(record)
    if _holds_values(record.get("chat_template_kwargs")):
        raise where.error("chat_template_kwargs", "is not used per record: remove the column")
    columns = prompt_columns(record)
    if not columns:
        return None
    name = columns[0]
    value = record[name]
    if name == "turns" and isinstance(value, list):
        value = value[0] if value else ""
    value = where.dialogue(value, name)
    if isinstance(value, str):
        value = where.text({name: value}, name).strip()
        if "input" in columns and record.get("input"):
            value = "\n\n".join(filter(None, (value, where.text(record, "input").strip())))
        value = [{"role": "user", "content": value}]
    messages = where.messages(value, name)
    if not messages or not messages[-1]["content"].strip() or messages[-1]["role"] != "user":
        raise where.error(name, "expected non-empty text, or messages that end with a user message")
    return where.after_earlier(record, messages)


def _holds_values(kwargs: Any) -> bool:
    values = kwargs.values() if isinstance(kwargs, Mapping) else [kwargs]
    return any(value not in (None, "", "{}", []) for value in values)


def question_of(record: Mapping[str, Any], where: RecordRef) -> tuple[str, list[Message] | None]:
    """Returns what the judge sees of a record's question, and the prompt as messages if given.

    The judge sees the column `context`, or else the prompt as text (see `prompt_of`).

    Raises:
        DataError: both are missing, or one of them cannot be used.
    """
    messages = prompt_of(record, where)
    if record.get("context") is None:
        if messages is None:
            raise where.error("context", "is missing, and so is 'prompt'")
        return dialogue_text(messages), messages
    context = where.text(record, "context")
    if not context.strip():
        raise where.error("context", "expected non-empty text")
    return context, messages

"""Reads labeled comparisons from judge benchmarks and preference data, one by one.

This module supports LLMBar, PandaLM, HHH, JudgeBench, RM-Bench, RewardBench and RewardBench 2,
votes from MT-Bench and Chatbot Arena, HH, UltraFeedback and any TRL preference data, from the Hub
or from local files and folders.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, TypeAlias

from self_judge.data.files import check_files, is_data_file, read_records, split_of
from self_judge.data.hub import InMemory, in_memory, is_saved_dataset
from self_judge.data.labeled_pairs import LabeledComparison, reader_of_columns, usable
from self_judge.data.records import RecordRef
from self_judge.errors import DataError

_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, slots=True)
class BenchmarkSource:
    """One source of labeled comparisons.

    Args:
        path: a dataset ID on the Hub, a local file or a local folder, as in `files.read_records`.
            If no file directly in the folder has a split in its name, each file in the folder and
            its subfolders is a subset (as in LLMBar).
        splits: the splits to read, in the given order. If there are several splits, each is a
            subset. A single file is always read completely.
        data_dir, name, revision: as in `files.read_records`.
        columns: the data's own column names; see `records.map_columns`. The columns `context` or
            `prompt`, `response_a`, `response_b` and `label` (`a`, `b` or `tie`) form a comparison.
        held_out: the fraction of preference data that training holds out (`dataset.held_out`), to
            read only these records; 0 reads all.
    """

    path: str | InMemory
    splits: tuple[str, ...] = ("test",)
    data_dir: str | None = None
    name: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(f"--held-out must be in [0, 1), got {self.held_out}")

    @property
    def label(self) -> str:
        """The path, or a name for a dataset in memory."""
        return "dataset in memory" if in_memory(self.path) else str(self.path)


# A subset; and in the subset Ties of RewardBench 2, the kind of prompt.
_Stratum = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Share:
    """The first records of each subset, as selected by `share_of`.

    Attributes:
        records: the number of records to use from each subset.
        left_out: the number of pairs left out, by reason.
    """

    records: Counter[_Stratum]
    left_out: Counter[str]


def share_of(source: BenchmarkSource, max_pairs: int) -> Share:
    """Selects at most `max_pairs` pairs, spread evenly over the subsets.

    The subsets take turns, and each takes its next record with all of its pairs, because some
    metrics need all pairs of a record. A subset leaves when its next record does not fit.

    Raises:
        DataError: as in `read_comparisons`, or no record has as few as `max_pairs` pairs.
    """
    sizes: defaultdict[_Stratum, list[int]] = defaultdict(list)
    pairs: Counter[str] = Counter()
    for stratum, record in _records(source, Counter()):
        pairs[stratum[0]] += len(record)
        if len(sizes[stratum]) < max_pairs:
            sizes[stratum].append(len(record))
    taken: Counter[_Stratum] = Counter()
    taken_pairs: Counter[str] = Counter()
    active = list(sizes)
    while active:
        for stratum in tuple(active):
            size = next(iter(sizes[stratum][taken[stratum] :]), None)
            if size is None or size > max_pairs - taken_pairs.total():
                active.remove(stratum)
            else:
                taken[stratum] += 1
                taken_pairs[stratum[0]] += size
    if sizes and not taken_pairs:
        least = min(all_of[0] for all_of in sizes.values())
        raise DataError(
            f"{source.label}: max_pairs {max_pairs} is less than the {least} pairs of one record: "
            f"use at least {least}"
        )
    left_out: Counter[str] = Counter()
    for name, count in (pairs - taken_pairs).items():
        whole = "" if taken_pairs[name] else f", the whole subset {name}"
        left_out[f"beyond max_pairs{whole}"] += count
    return Share(taken, left_out)


def read_comparisons(
    source: BenchmarkSource, skipped: Counter[str] | None = None, share: Share | None = None
) -> Iterator[LabeledComparison]:
    """Yields the labeled comparisons from a source in order.

    The format of each file or split is detected from the columns of its first record.

    Args:
        skipped: a counter to which the number of skipped items for each reason is added.
        share: the records to use; default: all.

    Raises:
        DataError: the source has no records, its format is unknown, or a record is malformed.
    """
    skipped = Counter() if skipped is None else skipped
    if share is None:
        yield from _comparisons(source, skipped)
        return
    skipped.update(share.left_out)
    left = Counter(share.records)
    for stratum, record in _records(source, skipped):
        if left[stratum]:
            left[stratum] -= 1
            yield from record
        if not left.total():
            return


def _records(
    source: BenchmarkSource, skipped: Counter[str]
) -> Iterator[tuple[_Stratum, list[LabeledComparison]]]:
    """Yields each record's pairs."""
    for _, found in groupby(_comparisons(source, skipped), lambda pair: (pair.source, pair.index)):
        record = list(found)
        # "ref:3" and "tied:3" belong together, so both kinds of prompts are read from their start.
        yield (record[0].subset, record[0].part.partition(":")[0]), record


def _comparisons(source: BenchmarkSource, skipped: Counter[str]) -> Iterator[LabeledComparison]:
    for label, subset, records in _parts(source):
        first = next(records, None)
        if first is None:
            raise DataError(f"{label}: there are no records")
        select = reader_of_columns(first[1], label, source.held_out)
        for where, record in chain([first], records):
            for found in usable(select(record, where)):
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    named = "/".join(part for part in (subset, found.subset) if part)
                    yield replace(found, subset=named)


_Records: TypeAlias = Iterator[tuple[RecordRef, dict[str, Any]]]


def _parts(source: BenchmarkSource) -> Iterator[tuple[str, str, _Records]]:
    """Yields (label for messages, subset, records with their places) for each file or split."""
    if in_memory(source.path):
        yield source.label, "", read_records(source.path, columns=source.columns)
        return
    path = source.label
    local = Path(path).expanduser()
    root = local / source.data_dir if source.data_dir else local
    files = _files_without_splits(root, source.splits)
    for file, subset in files.items():
        yield str(file), subset, read_records(str(file), columns=source.columns)
    if files:
        return
    label = "/".join(part for part in (path, source.name, source.data_dir) if part)
    read = partial(
        read_records,
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
        part = f"{label}[{split}]"
        yield part, split if len(source.splits) > 1 else "", read(label=part, split=split)


def _files_without_splits(root: Path, splits: tuple[str, ...]) -> dict[Path, str]:
    """Maps each file of a local folder to its subset; `{}` if file names contain splits.

    As on the Hub, files such as `test-00000-of-00002.parquet` are parts of one file, and a folder
    `data` has no meaning.
    """
    if not root.is_dir() or is_saved_dataset(root):
        return {}
    files = [f for f in sorted(root.rglob("*")) if is_data_file(f)]
    if any(split_of(f) for f in files if f.parent == root):
        return {}
    found = {split_of(f) for f in files}
    if files and not found & {None, *splits}:
        raise DataError(
            f"{root}: no file for split {', '.join(splits)}; found splits: "
            f"{', '.join(sorted(filter(None, found)))}"
        )
    files = [f for f in files if split_of(f) in (None, *splits)]
    check_files(files)
    names = {f: _SHARD.sub("", f.name.partition(".")[0]) for f in files}
    subsets: dict[Path, str] = {}
    for file, name in names.items():
        alone = all(names[f] == name for f in files if f.parent == file.parent)
        folders = [part for part in file.parent.relative_to(root).parts if part != "data"]
        subsets[file] = "/".join(folders if alone else [*folders, name])
    return subsets

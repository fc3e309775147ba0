"""Reads labeled comparisons from judge benchmarks and preference data, one by one.

This module supports LLMBar, PandaLM, HHH, JudgeBench, RM-Bench, RewardBench and RewardBench 2,
votes from MT-Bench and Chatbot Arena, HH, UltraFeedback and any TRL preference data, from the Hub
or from local files and folders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from self_judge.data.files import is_saved_dataset, read_raw, reader_of, split_of
from self_judge.data.labeled_pairs import LabeledComparison, reader_of_columns, usable
from self_judge.data.records import RecordRef
from self_judge.errors import DataError

_SHARD = re.compile(r"-\d+-of-\d+$")


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
    """

    path: str
    splits: tuple[str, ...] = ("test",)
    data_dir: str | None = None
    name: str | None = None
    revision: str | None = None


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
        select = reader_of_columns(first, label)
        for index, record in enumerate(chain([first], records)):
            for found in usable(select(record, RecordRef(label, index))):
                if isinstance(found, str):
                    skipped[found] += 1
                else:
                    named = "/".join(part for part in (subset, found.subset) if part)
                    yield replace(found, subset=named)


def _parts(source: BenchmarkSource) -> Iterator[tuple[str, str, Iterator[dict[str, Any]]]]:
    """Yields (label for messages, subset, records) for each file or split."""
    local = Path(source.path).expanduser()
    root = local / source.data_dir if source.data_dir else local
    files = _files_without_splits(root, source.splits)
    for file, subset in files.items():
        yield str(file), subset, read_raw(str(file))
    if files:
        return
    label = "/".join(part for part in (source.path, source.name, source.data_dir) if part)
    read = partial(
        read_raw, source.path, data_dir=source.data_dir, name=source.name, revision=source.revision
    )
    if local.is_file():
        yield label, "", read()
        return
    for split in source.splits:
        yield f"{label}[{split}]", split if len(source.splits) > 1 else "", read(split=split)


def _files_without_splits(root: Path, splits: tuple[str, ...]) -> dict[Path, str]:
    """Maps each file of a local folder to its subset; `{}` if file names contain splits.

    As on the Hub, files such as `test-00000-of-00002.parquet` are parts of one file, and a folder
    `data` has no meaning.
    """
    if not root.is_dir() or is_saved_dataset(root):
        return {}
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and reader_of(f)]
    if any(split_of(f) for f in files if f.parent == root):
        return {}
    found = {split_of(f) for f in files}
    if files and not found & {None, *splits}:
        raise DataError(
            f"{root}: no file for split {', '.join(splits)}; found splits: "
            f"{', '.join(sorted(filter(None, found)))}"
        )
    files = [f for f in files if split_of(f) in (None, *splits)]
    names = {f: _SHARD.sub("", f.name.partition(".")[0]) for f in files}
    subsets: dict[Path, str] = {}
    for file, name in names.items():
        alone = all(names[f] == name for f in files if f.parent == file.parent)
        folders = [part for part in file.parent.relative_to(root).parts if part != "data"]
        subsets[file] = "/".join(folders if alone else [*folders, name])
    return subsets

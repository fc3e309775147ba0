"""Reads datasets with the `datasets` library: from the Hub, from disk and in memory.

Processes that prepare datasets end with the process that started them, even if that is killed.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from self_judge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

Record = dict[str, Any]
InMemory: TypeAlias = "Dataset | DatasetDict | IterableDataset"


def in_memory(source: Any) -> bool:
    """Returns whether a source is a dataset of the `datasets` library."""
    datasets = sys.modules.get("datasets")
    kinds = "Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict"
    return datasets is not None and isinstance(source, tuple(getattr(datasets, k) for k in kinds))


def is_saved_dataset(folder: Path) -> bool:
    """Returns whether a folder was written by the `save_to_disk` method of a dataset."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, split: str) -> Iterator[Record]:
    """Yields the records of a folder that `save_to_disk` wrote."""
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: not a valid save_to_disk folder ({first_line(error)})"
        ) from None
    yield from read_dataset(saved, split, str(folder))


def read_dataset(dataset: InMemory, split: str, label: str) -> Iterator[Record]:
    """Yields the records of a dataset in memory."""
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{label}: no split {split!r}; it has {', '.join(map(str, dataset))}")
        dataset = dataset[split]
    empty = True
    for record in dataset.with_format(None):  # plain values, also of a dataset of tensors
        empty = False
        yield dict(record)
    if empty:
        raise DataError(f"{label}: the dataset has no records")


def read_hub(
    path: str,
    split: str,
    data_dir: str | None,
    name: str | None,
    revision: str | None,
    num_proc: int | None,
) -> Iterator[Record]:
    """Yields the records of a dataset on the Hub."""
    from self_judge.storage.repository import hub_problem

    hub_problem()  # before the import of datasets, which reads whether there is a connection
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    workers_end_with_parent()
    try:
        dataset = load_dataset(
            path, name, data_dir=data_dir, split=split, revision=revision, num_proc=num_proc
        )
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(
            f"{path}: not a local path, and cannot be loaded from the Hub ({first_line(error)}); "
            "check the name and the connection, or use the path of a local copy"
        ) from error
    if not len(dataset):
        raise DataError(f"{path}: split {split!r} has no records")
    yield from dataset


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return str(error).strip().split("\n")[0] or type(error).__name__


@functools.cache
def workers_end_with_parent() -> None:
    """Makes every later worker of `num_proc` end when this process is killed.

    Forked workers wait for work in a pipe that their siblings also hold open, so they would wait
    forever. Workers that are not forked notice a closed pipe by themselves.
    """
    from multiprocess import util  # the `multiprocessing` of the datasets library

    util.register_after_fork(workers_end_with_parent, lambda _: _end_with(os.getppid()))


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

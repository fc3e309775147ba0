"""Reads raw records, one by one, from the Hub or from local files and folders.

Each record is a plain dictionary. This module does not interpret its contents.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from self_judge.data.workers import workers_end_with_parent
from self_judge.errors import DataError
from self_judge.storage.jsonl import loads, parse_lines

Record = dict[str, Any]

# Words in file names that indicate a split, as on the Hub.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def read_raw(
    path: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
) -> Iterator[Record]:
    """Yields the records of a source in order.

    Local JSON is parsed in plain Python, because Arrow cannot infer a schema if the type of a field
    varies (for example, a rating that is sometimes a number and sometimes "N/A").

    Args:
        path: a local file (see `FORMATS`), which is always read completely; a local folder that
            contains such files or was written by `save_to_disk`; or the ID of a dataset on the Hub.
        split: the split to read. In a folder, file names determine the split ("train.jsonl",
            "base_test.jsonl").
        data_dir: a folder inside `path`, which may be local or on the Hub.
        name, revision, num_proc: as in `datasets.load_dataset`; only for datasets on the Hub.

    Raises:
        DataError: the source does not exist or cannot be read. The message names the source and,
            where possible, the line.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if _looks_local(path):
            raise DataError(f"{path}: no such file or folder (working folder: {Path.cwd()})")
        yield from _read_hub(path, split, data_dir, name, revision, num_proc)
        return
    if name or revision:
        given = f"name {name!r}" if name else f"revision {revision!r}"
        raise DataError(f"{path}: {given} applies only to Hub datasets, but this is a local path")
    if local.is_file() and data_dir:
        raise DataError(f"{path}: data_dir {data_dir!r} needs a folder, but this is a file")
    if data_dir:
        local = local / data_dir
        if not local.is_dir():
            raise DataError(f"{local}: no such folder (data_dir {data_dir!r} of {path})")
    if local.is_dir() and is_saved_dataset(local):
        yield from _read_saved(local, split)
        return
    if not (local.is_dir() or local.is_file()):
        raise DataError(f"{path}: not a regular file: save the data to a file, which is read twice")
    for file in _files_of(local, split) if local.is_dir() else [local]:
        read = reader_of(file)
        if read is None:
            raise DataError(
                f"{file}: unknown file type; supported types are {', '.join(FORMATS)} and folders "
                "written by save_to_disk"
            )
        with _named_errors(file):
            yield from _not_empty(read(file), file)


def _not_empty(records: Iterator[Record], file: Path) -> Iterator[Record]:
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{file}: the file has no records")


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turns errors from a damaged file into a `DataError` that names the file."""
    try:
        yield
    except EOFError:
        raise DataError(f"{file}: the gzip file is truncated; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: not a valid gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}, byte {error.start})") from None


def _open_text(file: Path) -> IO[str]:
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _read_lines(file: Path) -> Iterator[Record]:
    with _open_text(file) as lines:
        for _, record in parse_lines(lines, file, DataError):
            yield record


def _read_json(file: Path) -> Iterator[Record]:
    """Reads a list of records, a single record, or JSON Lines from a .json file."""
    with _open_text(file) as text:
        content = text.read()
    if not content.strip():
        return
    try:
        records = loads(content)
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{file}: not JSON ({error})") from None
        if error.msg == "Extra data":  # a second JSON value, so the file is JSON Lines
            yield from _read_lines(file)
            return
        raise DataError(
            f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from None
    for number, record in enumerate(records if isinstance(records, list) else [records]):
        if not isinstance(record, dict):
            found = type(record).__name__
            raise DataError(f"{file}, item {number}: expected a JSON object, got {found}")
        yield record


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a valid parquet file ({_first_line(error)})") from None


FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".json.gz": _read_json,
    ".jsonl": _read_lines,
    ".jsonl.gz": _read_lines,
    ".parquet": _read_parquet,
}


def reader_of(file: Path) -> Callable[[Path], Iterator[Record]] | None:
    """Returns the reader for a file name, or `None` for an unknown file type."""
    name = file.name.lower()
    return next((read for suffix, read in FORMATS.items() if name.endswith(suffix)), None)


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~"))
        or "\\" in path
        or path.count("/") > 1
        or reader_of(Path(path)) is not None
    )


def _files_of(folder: Path, split: str) -> list[Path]:
    """Returns a folder's data files for a split, sorted by name."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and reader_of(f))
    if not files:
        folders = sorted(f.name for f in folder.iterdir() if f.is_dir())
        inside = f"; set data_dir to one of its folders: {', '.join(folders)}" if folders else ""
        raise DataError(f"{folder}: no data file ({', '.join(FORMATS)}) in this folder{inside}")
    splits = {file: split_of(file) for file in files}
    if not any(splits.values()):
        # If no file name contains a split, all files belong to the training split.
        splits = dict.fromkeys(files, "train")
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        known = sorted({name for name in splits.values() if name})
        raise DataError(f"{folder}: no file for split {split!r}; found splits: {', '.join(known)}")
    return chosen


def split_of(file: Path) -> str | None:
    """Returns the split that a file name indicates under the Hub's rules, or `None`."""
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in _SPLIT_WORDS.items() if words & names), None)


def is_saved_dataset(folder: Path) -> bool:
    """Returns whether a folder was written by the `save_to_disk` method of a dataset."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read_saved(folder: Path, split: str) -> Iterator[Record]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: not a valid save_to_disk folder ({_first_line(error)})"
        ) from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise DataError(f"{folder}: no split {split!r}; it has {', '.join(map(str, saved))}")
        saved = saved[split]
    if not len(saved):
        raise DataError(f"{folder}: the dataset has no records")
    yield from saved


def _read_hub(
    path: str,
    split: str,
    data_dir: str | None,
    name: str | None,
    revision: str | None,
    num_proc: int | None,
) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    workers_end_with_parent()
    try:
        dataset = load_dataset(
            path, name, data_dir=data_dir, split=split, revision=revision, num_proc=num_proc
        )
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(
            f"{path}: not a local path, and cannot be loaded from the Hub ({_first_line(error)}); "
            "check the name and the connection, or use the path of a local copy"
        ) from error
    if not len(dataset):
        raise DataError(f"{path}: split {split!r} has no records")
    yield from dataset


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__

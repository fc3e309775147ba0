"""Reads raw records, one by one, from the Hub, local files and folders, or a dataset in memory.

Each record is a plain dictionary. This module does not interpret its contents.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from csv import DictReader, field_size_limit
from csv import Error as CSVError
from functools import partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import yaml

from self_judge.data.hub import (
    InMemory,
    Record,
    first_line,
    is_saved_dataset,
    read_dataset,
    read_hub,
    read_saved,
)
from self_judge.data.records import RecordRef, map_columns
from self_judge.errors import DataError
from self_judge.storage.atomic import loads
from self_judge.storage.jsonl import parse_lines

Placed: TypeAlias = Iterator[tuple[RecordRef, Record]]

# Words in file names that indicate a split, as on the Hub.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
# Split names of preference datasets on the Hub: "train_prefs", "test_sft".
_HUB_SPLIT = re.compile(r"(?:train|validation|test)_(?:prefs|sft|gen)")
# A part of a split in the Hub's folder `data`: "train_prefs-00000-of-00003.parquet".
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")
# Files that describe a dataset, as in `datasets.data_files`.
_DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_records(
    path: str | InMemory,
    *,
    label: str = "",
    split: str = "train",
    data_dir: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    num_proc: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> Placed:
    """Yields the records of a source in order, each with its place for errors.

    Local JSON is parsed in plain Python, because Arrow cannot infer a schema if the type of a field
    varies (for example, a rating that is sometimes a number and sometimes "N/A").

    Args:
        path: a local file (see `FORMATS`), which is always read completely; a local folder that
            contains such files or was written by `save_to_disk`; the ID of a dataset on the Hub; or
            a dataset in memory.
        label: the name of a source that is no file or folder in places; default: its path.
        split: the split to read. In a folder, the dataset card or file names determine the split
            ("train.jsonl", "base_test.jsonl", "train_prefs.parquet").
        data_dir: a folder inside `path`, which may be local or on the Hub.
        name: as in `datasets.load_dataset`; only for the Hub and for folders with a dataset card.
        revision, num_proc: as in `datasets.load_dataset`; only for datasets on the Hub.
        columns: the data's own column names; see `map_columns`.

    Raises:
        DataError: the source does not exist or cannot be read. The message names the source and,
            where possible, the line.
    """
    if isinstance(path, str):
        records = _read_path(path, label or path, split, data_dir, name, revision, num_proc)
    else:
        label = label or "dataset in memory"
        records = placed(label, read_dataset(path, split, label))
    for where, record in records:
        yield where, map_columns(record, columns, where) if columns else record


def read_raw(path: str | InMemory, **options: Any) -> Iterator[Record]:
    """Yields the records of a source in order; see `read_records`."""
    return (record for _, record in read_records(path, **options))


def placed(label: str, records: Iterable[Record]) -> Placed:
    """Yields the records of a source that is no file, each with its place."""
    return ((RecordRef(label, index), record) for index, record in enumerate(records))


def _read_path(
    path: str,
    label: str,
    split: str,
    data_dir: str | None,
    name: str | None,
    revision: str | None,
    num_proc: int | None,
) -> Placed:
    local = Path(path).expanduser()
    if not local.exists():
        if _looks_local(path):
            raise DataError(f"{path}: no such file or folder (working folder: {Path.cwd()})")
        yield from placed(label, read_hub(path, split, data_dir, name, revision, num_proc))
        return
    if revision or (name and not has_card(local)):
        given = f"name {name!r}" if name else f"revision {revision!r}"
        raise DataError(f"{path}: {given} applies only to Hub datasets, but this is a local path")
    if local.is_file() and data_dir:
        raise DataError(f"{path}: data_dir {data_dir!r} needs a folder, but this is a file")
    if data_dir:
        local = local / data_dir
        if not local.is_dir():
            raise DataError(f"{local}: no such folder (data_dir {data_dir!r} of {path})")
    if local.is_dir() and is_saved_dataset(local):
        yield from placed(label, read_saved(local, split))
        return
    if not (local.is_dir() or local.is_file()):
        raise DataError(f"{path}: not a regular file: save the data to a file, which is read twice")
    for file in _files_of(local, split, name) if local.is_dir() else [local]:
        yield from _read_file(file)


def _read_file(file: Path) -> Placed:
    read = known_reader(file)
    _refuse_pointer(file)
    numbered: Iterator[tuple[int | None, Record]] = (
        _numbered_lines(file) if read is _read_lines else ((None, one) for one in read(file))
    )
    index = -1
    with _named_errors(file):
        for index, (line, record) in enumerate(numbered):
            yield RecordRef(str(file), index, line), record
    if index < 0:
        raise DataError(f"{file}: the file has no records")


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as content:
        if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise DataError(
                f"{file}: a git-lfs pointer instead of the data; get the data with: git lfs pull"
            )


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turns errors from a damaged file into a `DataError` that names the file."""
    try:
        yield
    except EOFError:
        raise DataError(f"{file}: the {_kind(file)} file is truncated; download it again") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8, for "
            "example with iconv -f WINDOWS-1252 (or UTF-16) -t UTF-8, or decompress it"
        ) from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the content
            raise
        raise DataError(f"{file}: not a valid {_kind(file)} file ({error})") from None


def _kind(file: Path) -> str:
    return {".gz": "gzip"}.get(suffix := file.suffix.lower(), suffix[1:])


def _open_text(file: Path, newline: str | None = None) -> IO[str]:
    opened: Any = _COMPRESSED.get(file.suffix.lower(), open)
    text: IO[str] = opened(file, "rt", encoding="utf-8-sig", newline=newline)
    return text


def _open_zstd(file: Path, _: str, **options: Any) -> IO[str]:
    from pyarrow import CompressedInputStream

    return TextIOWrapper(CompressedInputStream(str(file), "zstd"), **options)


def _numbered_lines(file: Path) -> Iterator[tuple[int, Record]]:
    with _open_text(file) as lines:
        yield from parse_lines(lines, file, DataError)


def _read_lines(file: Path) -> Iterator[Record]:
    return (record for _, record in _numbered_lines(file))


def _read_json(file: Path) -> Iterator[Record]:
    """Reads a list of records, a single record, or JSON Lines from a .json file."""
    with _open_text(file) as text:
        content = text.read()
    if not content.strip():
        return
    try:
        records = loads(content)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second JSON value, so the file is JSON Lines
            yield from _read_lines(file)
            return
        raise DataError(
            f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from None
    except ValueError as error:  # nested too deeply, or an integer with too many digits
        raise DataError(f"{file}: not JSON ({error})") from None
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
            names = table.schema_arrow.names
            if len({*names}) < len(names):
                raise DataError(f"{file}: two columns have the same name: {names}")
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a valid parquet file ({first_line(error)})") from None


def _read_table(file: Path, delimiter: str) -> Iterator[Record]:
    """Reads a CSV or TSV file with a header. All values are text.

    Spreadsheets write CSV with semicolons in many countries, which the header shows.
    """
    field_size_limit(2**31 - 1)  # the default limit of 128 KiB is too small for some dialogues
    with _open_text(file, newline="") as text:
        names = text.readline()
        delimiter = ";" if delimiter == "," not in names and ";" in names else delimiter
        rows = DictReader(chain([names], text), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = list(rows.fieldnames or ())
            if twice := [name for name, n in Counter(header).items() if n > 1 or not name]:
                problem = f"two columns are named {twice[0]!r}; rename one"
                problem = problem if twice[0] else "a column has no name: name or remove it"
                raise DataError(f"{file}, line 1: {problem}")
            line = rows.line_num + 1
            for row in rows:
                if None in row or None in row.values():
                    raise DataError(
                        f"{file}, line {line}: expected {len(header)} values, as in the header"
                    )
                yield row
                line = rows.line_num + 1
        except CSVError as error:
            raise DataError(f"{file}, line {line}: not a valid table ({error})") from None


FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
}
# The formats of text may be compressed: ".jsonl.gz".
_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
# Endings of files that contain data in a form that no reader has, beside those of text in
# `_COMPRESSED`. A folder's reader names such a file instead of leaving out its records.
_UNREADABLE = (
    *(".arrow", ".feather", ".avro", ".orc", ".xlsx", ".xls", ".ods"),
    *(".zip", ".7z", ".rar", ".tar", ".tgz", ".lz4", *_COMPRESSED),
)
_TYPES = f"{', '.join(FORMATS)} (text also with {', '.join(_COMPRESSED)})"


def reader_of(file: Path) -> Callable[[Path], Iterator[Record]] | None:
    """Returns the reader for a file name, or `None` for an unknown file type."""
    inner, last = ("", "", *(suffix.lower() for suffix in file.suffixes))[-2:]
    compressed = last in _COMPRESSED and inner != ".parquet"
    return FORMATS.get(inner if compressed else last)


def known_reader(file: Path) -> Callable[[Path], Iterator[Record]]:
    """Returns the reader for a file name.

    Raises:
        DataError: the file type is unknown.
    """
    if read := reader_of(file):
        return read
    raise DataError(
        f"{file}: unknown file type; supported types are {_TYPES} and folders written by "
        "save_to_disk: convert or decompress the file, save a spreadsheet as CSV, or move a file "
        "that is not to be read out of its folder"
    )


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~"))
        or "\\" in path
        or path.count("/") > 1
        or reader_of(Path(path)) is not None
    )


def is_data_file(file: Path) -> bool:
    """Returns whether a file in a folder contains data: not hidden, and not a description.

    The file may have a form that cannot be read; see `known_reader`.
    """
    hidden = file.name.startswith((".", "__")) or file.name in _DESCRIPTIONS
    named = reader_of(file) or file.name.lower().endswith(_UNREADABLE)
    return bool(named) and not hidden and file.is_file()


def _files_of(folder: Path, split: str, name: str | None = None) -> list[Path]:
    """Returns a folder's data files for a split, sorted by name."""
    splits = _card_splits(folder, name) if has_card(folder) else _named_splits(folder)
    chosen = [file for file, own in splits.items() if own == split]
    # "train_prefs" is also the name of the file train_prefs.jsonl.
    chosen = chosen or [file for file in splits if file.name.partition(".")[0] == split]
    if not chosen:
        known = sorted({own for own in splits.values() if own})
        raise DataError(f"{folder}: no file for split {split!r}; found splits: {', '.join(known)}")
    check_files(chosen)
    return chosen


def check_files(files: Iterable[Path]) -> None:
    """Checks that files in a folder can all be read together.

    Raises:
        DataError: the type of a file is unknown, or two of them are one file in two forms.
    """
    forms: dict[Path, Path] = {}
    for file in files:
        known_reader(file)
        other = forms.setdefault(_without_form(file), file)
        if other is not file:
            raise DataError(
                f"{file.parent}: {other.name} and {file.name} look like one file in two forms, and "
                "both would be read: move one of them out of the folder"
            )


def _without_form(file: Path) -> Path:
    """Returns the path without the endings of a compression and a format."""
    for known in (_COMPRESSED, FORMATS):
        if file.suffix.lower() in known:
            file = file.with_suffix("")
    return file


def _named_splits(folder: Path) -> dict[Path, str | None]:
    """Returns the split of each data file in a folder, which its name determines."""
    files = sorted(filter(is_data_file, folder.iterdir()))
    inside = folder / "data"
    if not files and inside.is_dir():  # as on the Hub
        files = [f for f in sorted(inside.iterdir()) if is_data_file(f) and _SHARD.match(f.name)]
    if not files:
        folders = sorted(f.name for f in folder.iterdir() if f.is_dir())
        known = f"; set data_dir to one of its folders: {', '.join(folders)}" if folders else ""
        raise DataError(f"{folder}: no data file ({_TYPES}) in this folder{known}")
    splits = {file: split_of(file) for file in files}
    # If no file name contains a split, all files belong to the training split.
    return splits if any(splits.values()) else dict.fromkeys(files, "train")


def split_of(file: Path) -> str | None:
    """Returns the split that a file name indicates under the Hub's rules, or `None`."""
    shard = _SHARD.match(file.name) if file.parent.name == "data" else None
    if shard := shard or _HUB_SPLIT.match(file.name):
        return shard[1] if shard.re is _SHARD else shard[0]
    words = set(re.split(r"[^a-z]+", file.name.lower()))
    return next((split for split, names in _SPLIT_WORDS.items() if words & names), None)


def has_card(folder: Path) -> bool:
    """Returns whether a dataset card in the folder lists data files."""
    return bool(_configurations(folder))


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """Returns the entries under `configs` in a dataset card, or an empty list."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    header = text.split("---\n", 2)[1] if text.startswith("---\n") else ""
    try:
        configs = (yaml.safe_load(header) or {}).get("configs")
    except (yaml.YAMLError, AttributeError) as error:
        raise DataError(f"{card}: not a valid dataset card ({first_line(error)})") from None
    return [c for c in configs or [] if isinstance(c, dict) and c.get("data_files")]


def _card_splits(folder: Path, name: str | None) -> dict[Path, str | None]:
    """Returns the split of each data file that the dataset card lists, as `load_dataset` does."""
    from datasets.data_files import resolve_pattern, sanitize_patterns

    configs = {str(c.get("config_name", "default")): c for c in _configurations(folder)}
    chosen = name or ("default" if "default" in configs else "")
    if len(configs) == 1 and not name:
        chosen = next(iter(configs))
    if chosen not in configs:
        problem = f"no configuration {name!r}" if name else "several configurations"
        raise DataError(f"{folder}: {problem}; set name to one of: {', '.join(configs)}")
    base = str(folder / configs[chosen].get("data_dir", ""))
    splits: dict[Path, str | None] = {}
    try:
        for split, patterns in sanitize_patterns(configs[chosen]["data_files"]).items():
            for pattern in patterns:
                files = map(Path, resolve_pattern(pattern, base))
                splits.update(dict.fromkeys(filter(is_data_file, files), str(split)))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'README.md'}: {first_line(error)}") from None
    return splits

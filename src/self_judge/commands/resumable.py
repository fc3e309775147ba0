"""Resumable processing of many items, with one JSON line of output per item.

Under `accelerate launch`, each process works on its own chunks of items and writes its own file.
The main process joins the files in order. With 3 processes and chunks of 2, rank r's file contains
the items marked in row r:

    item     0 1   2 3   4 5   6 7   8
    rank 0   x x               x x
    rank 1         x x               x
    rank 2               x x

A resumed run reads its file, drops an incomplete chunk at the end, and continues from there.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from self_judge.console import Terminal, say
from self_judge.data.files import read_records
from self_judge.data.records import RecordRef, UnusedText
from self_judge.errors import DataError, JournalError, check_file
from self_judge.runtime import own_device
from self_judge.storage.jsonl import (
    Journal,
    as_json,
    open_journal,
    read_journal,
    refuse_special_files,
    settings_path,
)
from self_judge.storage.repository import refuse_overwriting

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")
Work = Callable[[list[ItemT]], list[dict[str, Any]]]


def input_and_output(
    source: str | Path, target: str | Path, models: Iterable[str | None] = ()
) -> tuple[Path, Path]:
    """Checks the input and output paths and returns both as `Path` objects.

    Raises:
        ValueError: the input does not exist, or the output would overwrite it or a model.
    """
    source, target = Path(source), Path(target)
    check_file(source)
    refuse_overwriting([target, settings_path(target)], [source, *filter(None, models)])
    return source, target


def input_reader(
    source: Path,
    console: Console | None,
    used: Callable[[Mapping[str, Any]], Collection[str]],
    columns: Mapping[str, str] | None = None,
    max_records: int | None = None,
    added: Collection[str] = (),
) -> Callable[[], Iterator[tuple[RecordRef, dict[str, Any]]]]:
    """Returns a function that yields the records of a file from the start at every call.

    The records are plain JSON data (see `as_json`), so they equal what is read back from an output.
    A message names each column whose values change, and one names the text columns that are unused.

    Args:
        used: returns the columns that the command uses of a record.
        columns: the file's own column names; see `map_columns`.
        max_records: the number of records to read, from the start of the file; default: all.
        added: the columns that the output gets, whatever the file has there. A message names those
            that the file has.

    Raises (while reading):
        DataError: the file cannot be read, or a record cannot be written as JSON.
    """
    told: set[tuple[str, str]] = set()
    tell = partial(say, console or Terminal(stderr=True))
    unused = UnusedText(str(source), used, tell)

    def tell_once(names: Collection[str], where: RecordRef, what: str) -> None:
        new = {(name, what) for name in names} - told
        told.update(new)
        if new and RankShards.here(source, 1).rank == 0:
            tell(f"{where}: " + what.format(", ".join(sorted(name for name, _ in new))))

    def read() -> Iterator[tuple[RecordRef, dict[str, Any]]]:
        records = itertools.islice(read_records(str(source), columns=columns), max_records)
        for where, record in records:
            try:
                line = as_json(record)
            except (TypeError, ValueError, RecursionError) as error:
                raise DataError(f"{where}: {error}") from None
            tell_once(
                {name for name in record if line.get(name) != record[name]},
                where,
                "JSON has no form for values in {}; the output has null for NaN and infinity, "
                "ISO text for times, Base64 for bytes",
            )
            tell_once(
                {name for name in added if line.get(name) is not None},
                where,
                "the output has new values in {} instead of those in the input",
            )
            unused.add(line)
            yield where, line
        unused.report()

    return read


@dataclass(frozen=True)
class RankShards:
    """Divides items among processes. Every `world_size`-th chunk belongs to the same process.

    Attributes:
        target: the final output file.
        chunk: the number of items per chunk.
        world_size, rank: the number of processes, and the rank of this process.
    """

    target: Path
    chunk: int
    world_size: int = 1
    rank: int = 0

    @classmethod
    def here(cls, target: Path, chunk: int) -> RankShards:
        """Returns the output shards of the current job, one per process."""
        state = PartialState(cpu=own_device().type == "cpu")
        return cls(target, chunk, state.num_processes, state.process_index)

    @property
    def paths(self) -> list[Path]:
        """The files of all processes. A single process writes directly to the target."""
        if self.world_size == 1:
            return [self.target]
        return [self.target.with_name(f"{self.target.name}.{i}") for i in range(self.world_size)]

    @property
    def path(self) -> Path:
        return self.paths[self.rank]

    def owns(self, index: int) -> bool:
        """Returns whether this process works on the item at `index`."""
        return index // self.chunk % self.world_size == self.rank

    def agreed(self, find: Callable[[], FoundT]) -> FoundT:
        """Calls `find` on the main process and broadcasts the result to all processes.

        Only one process may open a journal.
        """
        if self.world_size == 1:
            return find()
        found: list[Any] = [find() if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]

    def join(self, settings: Mapping[str, Any]) -> None:
        """Waits for all processes, and lets the main process join the chunks in order.

        All processes must call this method.

        Args:
            settings: see `open_journal`.
        """
        if self.world_size == 1:
            return
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            self._join(settings)
        state.wait_for_everyone()

    def _join(self, settings: Mapping[str, Any]) -> None:
        with open_journal(self.target, settings, overwrite=True) as joined:
            for lines in itertools.cycle([read_journal(path) for path in self.paths]):
                chunk = list(itertools.islice(lines, self.chunk))
                joined.append(chunk)
                if len(chunk) < self.chunk:
                    break  # this was the last chunk, which may be empty
        for path in self.paths:
            path.unlink()
            settings_path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class ResumableJob(Generic[ItemT]):
    """Writes one line per item, in order, and resumes interrupted calls.

    Attributes:
        items: returns the items from the start at every call. The function raises an error if an
            item cannot be used.
        target: the output file. The settings are written to a file next to the output.
        settings: all settings that the lines depend on, as plain JSON data.
        is_line_of: returns whether a written line belongs to an item.
        mismatch: error message for a line that does not belong to its item. `{number}` is the
            item's number, counted from 1.
        title, things: the names of the job and of the items in the progress bar.
        chunk: the number of items that are processed together and then written to disk.
        may_be_longer: whether the existing file may have more lines than there are items.
    """

    items: Callable[[], Iterable[ItemT]]
    target: Path
    settings: Mapping[str, Any]
    is_line_of: Callable[[Mapping[str, Any], ItemT], bool]
    mismatch: str
    title: str
    things: str
    chunk: int
    may_be_longer: bool = False

    def run(
        self,
        load: Callable[[], Work[ItemT]],
        *,
        overwrite: bool = False,
        console: Console | None = None,
    ) -> tuple[int, float]:
        """Writes the missing lines.

        The method iterates over the items twice. The first iteration checks all items and existing
        lines before a model is loaded. At most one chunk of items is in memory at a time.

        Args:
            load: loads the models and returns a function that processes a chunk. `load` is called
                only if lines are missing.
            overwrite: whether to start from scratch.
            console: shows progress; default: standard error.

        Returns:
            The number of items, and the number processed per second (NaN if unknown).

        Raises:
            ValueError: an item cannot be used, or the existing file was written for other items or
                settings.
        """
        if self.chunk < 1:
            raise ValueError(f"--chunk must be at least 1, got {self.chunk}")
        refuse_special_files(self.target)  # other processes may write to shards of the target
        console = console or Terminal(stderr=True)
        shards = RankShards.here(self.target, self.chunk)
        if shards.world_size > 1 and not overwrite:
            joined = shards.agreed(self._joined)
            if joined is not None:
                return joined, math.nan
        with open_journal(shards.path, self.settings, overwrite=overwrite) as journal:
            total, own = self._checked(journal, shards)
            if journal.lines < own:
                work = load()
                # Process an incomplete chunk again in full, so that all lines are bit-identical to
                # those of an uninterrupted run.
                journal.cut(journal.lines // self.chunk * self.chunk)
                self._work_off(work, journal, shards, own, console)
            rate = journal.timed / journal.seconds if journal.seconds else math.nan
        shards.join(self.settings)
        return total, rate * shards.world_size

    def _joined(self) -> int | None:
        """Returns the number of items if the target already contains all lines, or `None`."""
        if not self.target.exists() or not settings_path(self.target).exists():
            return None
        with open_journal(self.target, self.settings) as journal:
            total, _ = self._checked(journal, RankShards(self.target, self.chunk))
            return total if journal.lines >= total else None

    def _checked(self, journal: Journal, shards: RankShards) -> tuple[int, int]:
        """Counts all items and this process's items, and compares existing lines with their items.

        Raises:
            ValueError: there are no items, or existing lines do not match the first items.
        """
        written = journal.read()
        total = own = 0
        for total, item in enumerate(self.items(), start=1):
            if not shards.owns(total - 1):
                continue
            own += 1
            line = next(written, None)
            if line is not None and not self.is_line_of(line, item):
                raise JournalError(
                    f"{journal.path}, line {own}: {self.mismatch.format(number=total)}: choose "
                    "another output or pass --overwrite"
                )
        if not total:
            raise ValueError(f"there are no {self.things} to judge")
        if journal.lines > own and not self.may_be_longer:
            raise JournalError(
                f"{journal.path} has {journal.lines:,} lines, but its input has {own:,} "
                f"{self.things}: choose another output or pass --overwrite"
            )
        return total, own

    def _work_off(
        self,
        work: Work[ItemT],
        journal: Journal,
        shards: RankShards,
        own: int,
        console: Console,
    ) -> None:
        if journal.lines and shards.rank == 0:
            say(
                console, f"{self.target}: resuming after {journal.lines:,} of {own:,} {self.things}"
            )
        mine = (item for index, item in enumerate(self.items()) if shards.owns(index))
        todo = itertools.islice(mine, journal.lines, None)
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,}/{task.total:,} " + self.things),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=shards.rank > 0,
        )
        with bar:
            task = bar.add_task(self.title, total=own, completed=journal.lines)
            while batch := list(itertools.islice(todo, self.chunk)):
                started = time.perf_counter()
                journal.append(work(batch), time.perf_counter() - started)
                bar.update(task, advance=len(batch))

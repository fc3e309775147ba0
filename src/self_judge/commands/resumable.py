"""Work over many items, one JSON line each, that an interruption does not lose.

Under `accelerate launch` each process works on its own chunks of the items, into a file of its own;
the first process joins the files in order. It does not know what an item or a line is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from self_judge.console import say
from self_judge.errors import JournalError
from self_judge.runtime import own_device
from self_judge.storage.jsonl import Journal, open_journal, read_journal, settings_path

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")
Work = Callable[[list[ItemT]], list[dict[str, Any]]]


def input_and_output(source: str | Path, target: str | Path) -> tuple[Path, Path]:
    """Both as paths.

    Raises:
        ValueError: there is no input, or the output would overwrite it.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: the output would overwrite the input")
    return source, target


@dataclass(frozen=True)
class RankShards:
    """Who does what: every `world_size`-th chunk is a process's own.

    Attributes:
        target: the file that all lines are for.
        chunk: items of a chunk.
        world_size, rank: how many processes there are, and which this is.
    """

    target: Path
    chunk: int
    world_size: int = 1
    rank: int = 0

    @classmethod
    def here(cls, target: Path, chunk: int) -> RankShards:
        """Over the processes of this launch; one without a launch."""
        state = PartialState(cpu=own_device().type == "cpu")
        return cls(target, chunk, state.num_processes, state.process_index)

    @property
    def paths(self) -> list[Path]:
        """The files of all processes; one alone writes the target itself."""
        if self.world_size == 1:
            return [self.target]
        return [self.target.with_name(f"{self.target.name}.{i}") for i in range(self.world_size)]

    @property
    def path(self) -> Path:
        return self.paths[self.rank]

    def owns(self, place: int) -> bool:
        """Whether this process works on the item at this place, from 0."""
        return place // self.chunk % self.world_size == self.rank

    def agreed(self, find: Callable[[], FoundT]) -> FoundT:
        """What the first process finds, for all: a journal is opened by one process at a time."""
        if self.world_size == 1:
            return find()
        found: list[Any] = [find() if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]

    def join(self, settings: Mapping[str, Any]) -> None:
        """Waits for all; the first puts the chunks together in their order. All call it.

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
                    break  # the last chunk, or the empty one after it
        for path in self.paths:
            path.unlink()
            settings_path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class ResumableJob(Generic[ItemT]):
    """Items in, one line per item out, in order; resumed where an earlier call was stopped.

    Attributes:
        items: gives the items from scratch at every call; raises where one cannot be used.
        target: the file; beside it stands one with the settings.
        settings: what the lines depend on, as plain JSON data.
        is_line_of: whether a written line is an item's.
        mismatch: what a line is that is no item's; `{number}` is the item's number from 1.
        title, things: what the progress bar calls the work and the items.
        chunk: items worked on together and then written to disk.
        may_be_longer: whether lines after those of the last item are left alone.
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
        """Writes the lines that are missing.

        The items are run through twice: first to check them all, and the lines that are there,
        before a model is loaded. No more than a chunk of them is in memory.

        Args:
            load: loads what works on a chunk, if there is something to do.
            overwrite: begin from scratch.
            console: where progress is shown; default: standard error.

        Returns:
            The number of items, and how many per second were worked on (NaN if unknown).

        Raises:
            ValueError: an item cannot be used, or the file there belongs to other items or
                settings.
        """
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        console = console or Console(stderr=True)
        shards = RankShards.here(self.target, self.chunk)
        if shards.world_size > 1 and not overwrite:
            joined = shards.agreed(self._joined)
            if joined is not None:
                return joined, math.nan
        with open_journal(shards.path, self.settings, overwrite=overwrite) as journal:
            total, own = self._checked(journal, shards)
            if journal.lines < own:
                work = load()
                # Whole chunks again: the lines are then the same, to the bit, as without a stop.
                journal.cut(journal.lines // self.chunk * self.chunk)
                self._go_on(work, journal, shards, own, console)
            rate = journal.timed / journal.seconds if journal.seconds else math.nan
        shards.join(self.settings)
        return total, rate * shards.world_size

    def _joined(self) -> int | None:
        """The number of items, if an earlier call of several processes wrote all lines."""
        if not self.target.exists() or not settings_path(self.target).exists():
            return None
        with open_journal(self.target, self.settings) as journal:
            total, _ = self._checked(journal, RankShards(self.target, self.chunk))
            return total if journal.lines >= total else None

    def _checked(self, journal: Journal, shards: RankShards) -> tuple[int, int]:
        """How many items there are, and how many of them are this process's own.

        Raises:
            ValueError: there are none, or the lines that are there are not those of the first ones.
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
                    f"{journal.path}, line {own}: {self.mismatch.format(number=total)}: give "
                    "another output, or --overwrite"
                )
        if not total:
            raise ValueError(f"there are no {self.things} to judge")
        if journal.lines > own and not self.may_be_longer:
            raise JournalError(
                f"{journal.path} has {journal.lines:,} lines, the input {own:,} {self.things} for "
                "it: give another output, or --overwrite"
            )
        return total, own

    def _go_on(
        self,
        work: Work[ItemT],
        journal: Journal,
        shards: RankShards,
        own: int,
        console: Console,
    ) -> None:
        if journal.lines and shards.rank == 0:
            say(console, f"{self.target}: resumes after {journal.lines:,} of {own:,}")
        mine = (item for place, item in enumerate(self.items()) if shards.owns(place))
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

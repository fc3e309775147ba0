"""Shares: the chunks of one input, dealt out over the processes that `accelerate launch` started.

Each process writes the lines of its chunks into a file of its own, which goes on after any
interruption as a journal does; the first joins them in order. It does not know what a line is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from self_judge.runtime import own_device
from self_judge.storage.jsonl import open_journal, settings_path

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class Shares:
    """Who does what: every `count`-th chunk is a process's own.

    Attributes:
        target: the file that all lines are for.
        chunk: items of a chunk.
        count, own: how many processes there are, and which this is.
    """

    target: Path
    chunk: int
    count: int = 1
    own: int = 0

    @classmethod
    def here(cls, target: Path, chunk: int) -> Shares:
        """Over the processes of this launch; one without a launch."""
        state = PartialState(cpu=own_device().type == "cpu")
        return cls(target, chunk, state.num_processes, state.process_index)

    @property
    def paths(self) -> list[Path]:
        """The files of all processes; one alone writes the target itself."""
        if self.count == 1:
            return [self.target]
        return [self.target.with_name(f"{self.target.name}.{i}") for i in range(self.count)]

    @property
    def path(self) -> Path:
        return self.paths[self.own]

    def dealt(self, items: Iterable[ItemT]) -> Iterator[tuple[int, list[ItemT]]]:
        """The chunks of this process, with their numbers among all; one in memory at a time."""
        items = iter(items)
        for number in itertools.count():
            chunk = list(itertools.islice(items, self.chunk))
            if not chunk:
                return
            if number % self.count == self.own:
                yield number, chunk

    def size(self, total: int) -> int:
        """How many of `total` items that is."""
        starts = range(self.own * self.chunk, total, self.count * self.chunk)
        return sum(min(self.chunk, total - start) for start in starts)

    def agreed(self, find: Callable[[], FoundT]) -> FoundT:
        """What the first process finds, for all: a journal is opened by one process at a time."""
        if self.count == 1:
            return find()
        found: list[Any] = [find() if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]

    def join(self, settings: Mapping[str, Any]) -> None:
        """Waits for all; the first puts the chunks together as they were dealt. All call it.

        Args:
            settings: see `open_journal`.
        """
        if self.count == 1:
            return
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            self._join(settings)
        state.wait_for_everyone()

    def _join(self, settings: Mapping[str, Any]) -> None:
        with contextlib.ExitStack() as stack:
            joined = stack.enter_context(open_journal(self.target, settings, overwrite=True))
            files = [stack.enter_context(path.open(encoding="utf-8")) for path in self.paths]
            for file in itertools.cycle(files):
                lines = [json.loads(line) for line in itertools.islice(file, self.chunk)]
                joined.append(lines)
                if len(lines) < self.chunk:
                    break  # the last chunk, or the empty one after it
        for path in self.paths:
            path.unlink()
            settings_path(path).unlink(missing_ok=True)

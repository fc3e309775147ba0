"""Rollouts ahead: the next step's samples are drawn elsewhere while this step updates here.

They come from the policy before the update, one step off-policy; nothing corrects for that. It
knows batches and a thread. It does not know who draws or how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from self_judge.datatypes import Response

Samples = list[list[Response]]


class BatchesAhead:
    """The batches of an optimizer step, and those of the one after it, from one pass of data."""

    def __init__(self) -> None:
        self._source: Iterator[Any] | None = None
        self._waiting: list[Any] = []

    def take(self, source: Iterator[Any], count: int) -> tuple[list[Any], list[Any]]:
        """This step's batches, and as many more; fewer, or none, where the data end.

        Args:
            source: of one epoch; another one begins anew.
            count: batches of a step.
        """
        if source is not self._source:
            self._source, self._waiting = source, []
        self._draw(source, count)
        now, self._waiting = self._waiting[:count], self._waiting[count:]
        self._draw(source, count)
        return now, self._waiting[:count]

    def _draw(self, source: Iterator[Any], count: int) -> None:
        while len(self._waiting) < count:
            try:
                self._waiting.append(next(source))
            except StopIteration:
                return


class SamplesAhead:
    """Samples that are being drawn in a thread of their own, for given batches."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._drawn: tuple[Sequence[Any], Future[Samples]] | None = None

    def start(self, batches: Sequence[Any], draw: Callable[[], Samples]) -> None:
        """Begins to draw; what was begun before is waited for and forgotten."""
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._drawn = (batches, self._thread.submit(draw))

    def take(self, batches: Sequence[Any]) -> Samples | None:
        """The samples for these batches, once they are there; `None` if they are not being drawn.

        Raises:
            Exception: what drawing them raised.
        """
        if self._drawn is None:
            return None
        own, future = self._drawn
        self._drawn = None
        samples = future.result()
        same = len(own) == len(batches) and all(a is b for a, b in zip(own, batches, strict=True))
        return samples if same else None

    def close(self) -> None:
        """Waits for what is being drawn."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._drawn = None

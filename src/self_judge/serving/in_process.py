"""InProcess: a backend that samples and judges with Transformers models in this process.

One thread runs the models. It takes the waiting rows and games of all requests together, so that
concurrent requests share forward passes. It does not depend on HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from self_judge.datatypes import Verdict
from self_judge.errors import in_a_line
from self_judge.inference.decoding import why_not_shared
from self_judge.inference.sampling import (
    TransformersSampler,
    cache_tokens,
    rows_to_sample,
    stop_tokens,
)
from self_judge.judging.judge import Judge
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.runtime import halve_or_raise, keep_freed_memory
from self_judge.serving.rows import Row, decode_rows
from self_judge.serving.work import Game, Sampling

logger = logging.getLogger(__name__)

# A batch starts once no more work has arrived for this time, so that requests that arrive together
# are sampled together; but it does not wait longer than the second limit.
_QUIET, _LONGEST_WAIT = 0.004, 0.04  # seconds


class InProcess:
    """Samples from `model` and judges with `judge`, in batches over all requests.

    Rows wait in order of arrival. A batch takes as many as `batch_size` and the memory for keys and
    values allow. It pauses for rows and games that arrive later (see `rows.py`). Between two
    batches, the games of all requests are played in lockstep, each round in one call to the judge.
    Their shared prefixes stay in memory until the last of them ends.

    Args:
        judge: a judge with a Transformers model.
        model: the policy; may be the judge's own model.
        encoder: the policy's encoder.
        batch_size: the maximum number of responses in a batch.
        on_batch: called with the number of rows of each batch, and of comparisons of each round.
    """

    def __init__(
        self,
        judge: Judge,
        model: Any,
        encoder: ChatEncoder,
        batch_size: int = 64,
        on_batch: Callable[[str, int], object] = lambda kind, size: None,
    ) -> None:
        self.judge, self.model, self.encoder = judge, model, encoder
        self.batch_size = batch_size
        self.on_batch = on_batch
        self.stop_ids = stop_tokens(encoder)
        self.max_length: int | None = getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        self._rows: deque[Row] = deque()
        self._games: deque[tuple[Game, Callable[[Any], None], Callable[[BaseException], None]]]
        self._games = deque()
        self._ends: dict[Sampling, tuple[Callable[[], None], Callable[[BaseException], None]]] = {}
        self._left: dict[Sampling, int] = {}
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)

    async def start(self) -> None:
        """See `Backend.start`."""
        keep_freed_memory(next(self.model.parameters()).device)
        # Try out how to sample and judge now, instead of during the first request.
        self._shares = await asyncio.to_thread(lambda: why_not_shared(self.model) is None)
        self._most_tokens = await asyncio.to_thread(cache_tokens, self.model)  # of a batch
        await asyncio.to_thread(lambda: self.judge.packing.decision)
        self._thread.start()

    async def stop(self) -> None:
        """See `Backend.stop`."""
        with self._work:
            self._stopping = True
            self._work.notify_all()
        await asyncio.to_thread(self._thread.join)

    def problem(self) -> str | None:
        """See `Backend.problem`."""
        return None if self._thread.is_alive() else "the thread of the models has ended"

    async def sample(self, work: Sampling) -> None:
        """See `Backend.sample`."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        seeds = [seed for _, seed in rows_to_sample([work.prompt], work.n, [work.seed])]
        with self._work:
            self._left[work] = work.n
            self._ends[work] = (_resolver(loop, future), _failer(loop, future))
            self._rows.extend(Row(work, k, seed) for k, seed in enumerate(seeds))
            self._work.notify_all()
        try:
            await future
        finally:
            work.abandoned = True  # unless all rows are over, nobody waits for them any more

    async def play(self, game: Game) -> Any:
        """See `Backend.play`."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        with self._work:
            self._games.append((game, _resolver(loop, future), _failer(loop, future)))
            self._work.notify_all()
        try:
            return await future
        finally:
            game.abandoned = True

    # -- in the thread of the models ---------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._rows or self._games or self._stopping):
                    self._work.wait()
                if self._stopping:
                    return
                if not any(row.tokens for row in self._rows):  # rows that paused do not wait
                    self._gather()
            if self._games:
                self._play()
            if self._rows:
                self._sample()

    def _gather(self) -> None:
        latest = time.monotonic() + _LONGEST_WAIT
        while self._work.wait(_QUIET) and time.monotonic() < latest:
            pass

    def _sample(self) -> None:
        rows = self._batch()
        if not rows:
            return
        self.on_batch("rows", len(rows))
        try:
            if self._shares:
                args = (self.model, self.encoder, self.stop_ids, rows)
                left = decode_rows(*args, self._over, self._has_waiting)
            else:
                left = self._generate(rows)
        except Exception as error:
            left = [row for row in rows if not row.over]
            try:
                self.batch_size = halve_or_raise("sampling", len(rows), "responses", error)
            except Exception as reason:
                logger.error("sampling failed: %s", in_a_line(reason))
                for work in {row.work for row in left}:
                    self._fail(work, reason)
                return
        with self._work:
            self._rows.extendleft(reversed(left))

    def _has_waiting(self, remaining: int) -> bool:
        """Returns whether work waits that a batch of `remaining` rows should pause for."""
        return bool(self._games) or (bool(self._rows) and remaining < self.batch_size)

    def _batch(self) -> list[Row]:
        """Takes the rows of the next batch, and drops those that were given up."""
        rows: list[Row] = []
        longest = most = 0
        while len(rows) < self.batch_size:
            with self._work:
                row = self._rows.popleft() if self._rows else None
            if row is None:
                break
            if row.work.given_up():
                row.over = True
                self._over(row)
                continue
            longest, most = max(longest, len(row.prompt)), max(most, row.left)
            if rows and (len(rows) + 1) * (longest + most) > self._most_tokens:
                with self._work:
                    self._rows.appendleft(row)
                break
            rows.append(row)
        return rows

    def _generate(self, rows: Sequence[Row]) -> list[Row]:
        """Samples with the model's own `generate`, one request after the other."""
        for work in dict.fromkeys(row.work for row in rows):
            own = [row for row in rows if row.work is work]
            sampler = TransformersSampler(self.model, self.encoder, work.settings, self.batch_size)
            sampled = sampler.sample([work.prompt], work.n, [work.seed])[0]
            for row in own:
                row.over = True
                work.sampled_tokens += len(sampled[row.k].ids)
                work.complete(row.k, sampled[row.k])
                self._over(row)
        return []

    def _over(self, row: Row) -> None:
        work = row.work
        if work not in self._left:
            return
        self._left[work] -= 1
        if not self._left[work]:
            del self._left[work]
            self._ends.pop(work)[0]()

    def _fail(self, work: Sampling, error: BaseException) -> None:
        work.abandoned = True
        if work in self._left:
            del self._left[work]
            self._ends.pop(work)[1](error)

    def _play(self) -> None:
        """Plays the waiting games in lockstep; others join until the first ones have ended."""
        received: dict[Game, list[Verdict] | None] = {}
        ends: dict[Game, tuple[Callable[[Any], None], Callable[[BaseException], None]]] = {}
        first: set[Game] = set()
        with self.judge.prefix_cache():
            while True:
                if not ends or first & ends.keys():
                    with self._work:
                        joining = list(self._games)
                        self._games.clear()
                    for game, done, failed in joining:
                        ends[game], received[game] = (done, failed), None
                    first = first or {game for game, _, _ in joining}
                asked: dict[Game, list[Any]] = {}
                for game in list(ends):
                    if game.abandoned:
                        game.steps.close()
                        del ends[game]
                        continue
                    try:
                        asked[game] = game.ask(received[game])
                    except StopIteration as over:
                        ends.pop(game)[0](over.value)
                    except Exception as error:
                        ends.pop(game)[1](error)
                if not ends:
                    return
                received = self._judged(asked, ends)

    def _judged(self, asked: dict[Game, list[Any]], ends: dict[Game, Any]) -> dict[Game, Any]:
        late = {game for game in asked if game.late()}
        comparisons = [c for game, own in asked.items() if game not in late for c in own]
        try:
            self.on_batch("comparisons", len(comparisons))
            judged = iter(self.judge.compare(comparisons))
        except Exception as error:
            logger.error("judging failed: %s", in_a_line(error))
            for game in set(asked) - late:
                ends.pop(game)[1](error)
            return {game: game.too_late(asked[game]) for game in late}
        return {
            game: game.too_late(own) if game in late else [next(judged) for _ in own]
            for game, own in asked.items()
        }


def _resolver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> Callable[..., None]:
    def resolve(value: Any = None) -> None:
        if not future.done():
            future.set_result(value)

    return lambda value=None: _in_loop(loop, resolve, value)


def _failer(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]
) -> Callable[[BaseException], None]:
    def fail(error: BaseException) -> None:
        if not future.done():
            future.set_exception(error)

    return lambda error: _in_loop(loop, fail, error)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[Any], None], value: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
        loop.call_soon_threadsafe(call, value)

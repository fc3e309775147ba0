"""Replicas: a backend that asks `vllm serve` processes, which batch requests and cache prefixes.

This module sends requests and reads answers in the event loop, so that the request of a client that
leaves is aborted on the replica. It does not depend on what prompts mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import httpx

from self_judge.console import neutral
from self_judge.datatypes import Verdict
from self_judge.errors import EngineError, in_a_line
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.remote.server import (
    BUSY,
    TRIES,
    UnusableError,
    choices_of,
    error_message,
    say_waiting,
    shown_url,
)
from self_judge.inference.sampling import rows_to_sample, sampled_response, stop_tokens
from self_judge.inference.vllm.answers import base_model, letter_logprobs, sampled_ids
from self_judge.inference.vllm.protocol import request_parameters, scoring_parameters
from self_judge.judging.judge import Judge
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.serving.work import Game, Sampling, TokenLogprob

logger = logging.getLogger(__name__)

_LARGEST = 1 << 28  # bytes in an answer
_PROMPTS_PER_REQUEST = 32  # prompts in one request can share prefixes


class Replica:
    """One `vllm serve` process and its state.

    Attributes:
        down: why it gets no requests, or `None` if it does.
        busy: the number of requests that it has not answered.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.shown = shown_url(self.url)
        self.down: str | None = None
        self.busy = 0
        self.model = ""

    def leave_out(self, why: str) -> None:
        if self.down is None:
            self.down = why
            logger.warning("vLLM server %s gets no requests: %s", self.shown, neutral(why))


class VLLMReplicas:
    """`vllm serve` replicas of one model, as an engine for `VLLMScorer`.

    A replica that does not answer gets no more requests until it answers again; the others take
    over its work.

    Args:
        urls: the URLs of the replicas.
        adapter: the folder of a LoRA adapter to sample with, which every replica loads.
        adapter_name: the name of this adapter on the replicas.
        key: the key that the replicas require, if they do.
        start_timeout: the number of seconds in which the first replica must answer.
        request_timeout: the number of seconds in which a request must be answered.
        probe_every: the number of seconds between two attempts to reach a replica that is down.
        retry_wait: the number of seconds before a busy replica is asked again.

    Raises:
        EngineError: no replica answers in time, or they serve different models.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        adapter: Path | None = None,
        adapter_name: str | None = None,
        key: str | None = None,
        start_timeout: float = 240.0,
        request_timeout: float = 600.0,
        probe_every: float = 2.0,
        retry_wait: float = 0.25,
    ) -> None:
        self.replicas = [Replica(url) for url in urls]
        self.adapter, self.adapter_name = adapter, adapter_name
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.request_timeout, self.probe_every = request_timeout, probe_every
        self.retry_wait = retry_wait
        self.root = ""
        self.max_model_length = 0
        self._preferred: ContextVar[Replica | None] = ContextVar("replica", default=None)
        asyncio.run(self._first_contact(time.monotonic() + start_timeout))

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self.request_timeout, connect=5.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy for local servers
        )

    async def _first_contact(self, deadline: float) -> None:
        async with self._client() as client:
            self.client, told = client, False
            while True:
                reasons = await asyncio.gather(*(self._greet(r) for r in self.replicas))
                if None in reasons:
                    break
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no vLLM server answers at {self.replicas[0].shown} ({reasons[0]}): start "
                        "`vllm serve` there, or correct --vllm-server"
                    )
                if not told:
                    told = True
                    say_waiting(self.replicas[0].shown, str(reasons[0]), deadline)
                await asyncio.sleep(1.0)
        for replica, reason in zip(self.replicas, reasons, strict=True):
            if reason is not None:
                replica.leave_out(reason)

    async def _greet(self, replica: Replica) -> str | None:
        """Reads a replica's model and hands it the adapter; returns why that failed, or `None`."""
        try:
            status, content = await self._ask(replica, "GET", "/v1/models", None, 10.0)
        except (httpx.HTTPError, UnusableError) as error:
            return in_a_line(error)
        if status != 200:
            return f"HTTP {status}: {error_message(content)}"
        replica.model, root, length = base_model(content, replica.shown)
        if self.root and root != self.root:
            raise EngineError(f"the servers serve different models: {self.root}, {root}")
        self.root = root
        self.max_model_length = min(length, self.max_model_length or length)
        if self.adapter is None:
            return None
        body = {"lora_name": self.adapter_name, "lora_path": str(self.adapter.resolve())}
        status, content = await self._ask(replica, "POST", "/v1/load_lora_adapter", body, 120.0)
        if status == 200 or "already been loaded" in error_message(content):
            return None
        raise EngineError(
            f"{replica.shown} does not load the adapter {self.adapter} (HTTP {status}: "
            f"{error_message(content)}): start it with --enable-lora, and set "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        )

    async def _ask(
        self, replica: Replica, verb: str, path: str, body: Any, seconds: float
    ) -> tuple[int, bytes]:
        content = bytearray()
        options: dict[str, Any] = {"json": body, "timeout": seconds}
        async with self.client.stream(verb, f"{replica.url}{path}", **options) as answer:
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _LARGEST:
                    raise UnusableError(f"more than {_LARGEST:,} bytes")
        return answer.status_code, bytes(content)

    # -- in the event loop of the server -----------------------------------------------------------

    async def start(self) -> None:
        """Opens the connections, and begins to look for replicas that have come back."""
        self.loop = asyncio.get_running_loop()
        self.client = self._client()
        self._prober = asyncio.create_task(self._probe())

    async def stop(self) -> None:
        """Closes the connections."""
        self._prober.cancel()
        await asyncio.gather(self._prober, return_exceptions=True)
        await self.client.aclose()

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(self.probe_every)
            for replica in self.replicas:
                if replica.down is None:
                    continue
                with contextlib.suppress(EngineError, httpx.HTTPError):
                    if await self._greet(replica) is None:
                        replica.down = None
                        logger.warning("vLLM server %s answers again", replica.shown)

    def least_busy(self) -> Replica:
        """Returns the replica with the fewest open requests.

        Raises:
            EngineError: all replicas are down.
        """
        up = [replica for replica in self.replicas if replica.down is None]
        if not up:
            reasons = "; ".join(f"{r.shown}: {r.down}" for r in self.replicas)
            raise EngineError(f"no vLLM server answers: {reasons}")
        return min(up, key=lambda replica: replica.busy)

    async def complete(
        self,
        body: dict[str, Any],
        adapter: str | None,
        count: int,
        read: Callable[[Mapping[str, Any], str], Any],
        preferred: Replica | None,
    ) -> list[Any]:
        """Returns `read` for each of the `count` choices of a completion.

        Args:
            preferred: the replica to ask if it is up, because it has the prefix in its cache.

        Raises:
            EngineError: the request was rejected, or no replica answers.
        """
        why = ""
        failed: set[Replica] = set()
        for attempt in range(TRIES * len(self.replicas)):
            up = preferred is not None and preferred.down is None
            replica = preferred if up and preferred is not None else self.least_busy()
            replica.busy += 1
            try:
                sent = {**body, "model": adapter or replica.model}
                status, content = await self._ask(
                    replica, "POST", "/v1/completions", sent, self.request_timeout
                )
                if status == 200:
                    return choices_of(content, count, read, replica.shown)
            except (httpx.HTTPError, UnusableError) as error:
                # A server may close an idle connection just when it is used again.
                if replica in failed or isinstance(error, httpx.ConnectError | httpx.ReadTimeout):
                    replica.leave_out(in_a_line(error))
                failed.add(replica)
                continue
            finally:
                replica.busy -= 1
            why = f"HTTP {status}: {error_message(content)}"
            if status not in BUSY and status < 500:
                raise EngineError(f"{replica.shown} rejected a request: {why}")
            if status not in BUSY:  # vLLM answers so while its engine dies
                replica.leave_out(why)
                continue
            preferred = None
            await asyncio.sleep(self.retry_wait * 2 ** min(attempt, 4))
        raise EngineError(f"the vLLM servers are too busy: {why}")

    # -- `Engine`, as far as `VLLMScorer` uses it, in the thread of a game -------------------------

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """See `Engine.next_token_logprobs`."""
        preferred = self._preferred.get()
        common = {**scoring_parameters(token_ids), "return_tokens_as_token_ids": True}
        chunks = [
            [list(prompt) for prompt in prompts[start : start + _PROMPTS_PER_REQUEST]]
            for start in range(0, len(prompts), _PROMPTS_PER_REQUEST)
        ]

        def read(choice: Mapping[str, Any], url: str) -> list[float]:
            return letter_logprobs(choice, token_ids, url)

        async def all_chunks() -> list[list[float]]:
            parts = await asyncio.gather(
                *(
                    self.complete({**common, "prompt": chunk}, adapter, len(chunk), read, preferred)
                    for chunk in chunks
                )
            )
            return [row for rows in parts for row in rows]

        return asyncio.run_coroutine_threadsafe(all_chunks(), self.loop).result()

    def prefer(self, replica: Replica) -> None:
        """Makes this thread's requests go to one replica, whose cache then has their prefixes."""
        self._preferred.set(replica)


class Replicas:
    """A backend on `vllm serve` replicas.

    All responses of a request, and all matches of a tournament, go to one replica, so that they
    share its prefix cache.

    Args:
        judge: a judge whose scorer uses `engine`.
        encoder: the policy's encoder.
        games: the number of games that are played at the same time.
    """

    def __init__(
        self, engine: VLLMReplicas, judge: Judge, encoder: ChatEncoder, games: int = 64
    ) -> None:
        self.engine, self.judge, self.encoder = engine, judge, encoder
        self.max_length: int | None = engine.max_model_length
        self.stop_ids = stop_tokens(encoder)
        self._threads = ThreadPoolExecutor(games, thread_name_prefix="game")

    async def start(self) -> None:
        """See `Backend.start`."""
        await self.engine.start()

    async def stop(self) -> None:
        """See `Backend.stop`."""
        await asyncio.to_thread(self._threads.shutdown)
        await self.engine.stop()

    def problem(self) -> str | None:
        """See `Backend.problem`."""
        try:
            self.engine.least_busy()
        except EngineError as error:
            return str(error)
        return None

    async def sample(self, work: Sampling) -> None:
        """See `Backend.sample`."""
        replica = self.engine.least_busy()
        seeds = [seed for _, seed in rows_to_sample([work.prompt], work.n, [work.seed])]
        rows = [self._row(work, k, seed, replica) for k, seed in enumerate(seeds)]
        tasks = [asyncio.ensure_future(row) for row in rows]
        try:
            left = max(0.0, work.until - time.monotonic())
            timeout = None if left == float("inf") else left
            done, _ = await asyncio.wait(
                tasks, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
        finally:
            for task in tasks:  # closes the connection, and vLLM then aborts the request
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _row(self, work: Sampling, k: int, seed: int, replica: Replica) -> None:
        body = {
            **request_parameters(work.settings, self.stop_ids),
            "return_token_ids": True,
            "prompt": list(work.prompt),
            "seed": seed,
        }
        if work.stop:
            body["stop"] = list(work.stop)
        if work.top_logprobs is not None:
            body |= {"logprobs": work.top_logprobs, "return_tokens_as_token_ids": True}

        def read(choice: Mapping[str, Any], url: str) -> tuple[list[int], Any]:
            ids = sampled_ids(choice, url, work.settings.max_new_tokens)
            top = work.top_logprobs
            return ids, None if top is None else _logprobs(choice, ids, top)

        adapter = self.engine.adapter_name
        ((ids, logprobs),) = await self.engine.complete(body, adapter, 1, read, replica)
        work.sampled_tokens += len(ids)
        response = sampled_response(ids, self.encoder, work.prompt)
        cut = None if logprobs is None else logprobs[: len(response.ids)]
        work.complete(k, response, cut)

    async def play(self, game: Game) -> Any:
        """See `Backend.play`."""
        context = copy_context()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, context.run, self._played, game
            )
        finally:
            game.abandoned = True

    def _played(self, game: Game) -> Any:
        self.engine.prefer(self.engine.least_busy())
        received: list[Verdict] | None = None
        while not game.abandoned:
            try:
                asked = game.ask(received)
            except StopIteration as over:
                return over.value
            late = game.late()
            received = game.too_late(asked) if late else self.judge.compare(asked)
        return None  # nobody waits for the result


def _logprobs(choice: Mapping[str, Any], ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Returns the log-probabilities of a sampled choice."""
    given = choice["logprobs"]
    listed = given["top_logprobs"] or [{}] * len(ids)
    found = []
    for token, logprob, likely in zip(ids, given["token_logprobs"], listed, strict=True):
        pairs = [(int(name.removeprefix("token_id:")), float(p)) for name, p in likely.items()]
        pairs.sort(key=lambda pair: -pair[1])  # vLLM adds the sampled token to the likeliest
        found.append(TokenLogprob(token, float(logprob), tuple(pairs[:top])))
    return found

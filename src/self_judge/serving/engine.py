"""ServingEngine: answers requests by one sample or by a tournament, within its limits.

This module admits requests, keeps their deadlines, builds the answers and counts. It does not
depend on HTTP, or on whether the backend runs the model or asks servers.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Comparison, Verdict, stable_seed
from self_judge.errors import EncodingError
from self_judge.judging.tournament import Bracket, Steps, knockout_steps
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.serving.requests import ChatRequest, JudgeRequest, RequestError
from self_judge.serving.work import TOO_LATE, Backend, Game, Sample, Sampling

# The share of a deadline that sampling may use; the rest is for the judge.
_SAMPLING_SHARE = 0.8
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_n: the maximum number of responses per request.
        max_concurrency: the number of requests that are worked on at the same time.
        queue: the number of requests that wait; further ones are refused.
        deadline: the maximum number of seconds per request.
    """

    max_n: int = 16
    max_concurrency: int = 64
    queue: int = 256
    deadline: float = 600.0


@dataclass(frozen=True)
class Prepared:
    """A request with its encoded prompt, its settings and the time at which it is due."""

    request: ChatRequest
    prompt: tuple[int, ...]
    sampling: SamplingSettings
    until: float


@dataclass(frozen=True)
class Answer:
    """The answer to a chat request.

    Attributes:
        prepared: the request.
        choices: the returned responses, best first.
        sampled: all complete responses, in the order in which they were asked for.
        sampled_tokens: the number of tokens in all responses, complete or not.
        deadline_passed: whether responses are missing or matches were drawn by lot because of it.
        game: the tournament, or `None` for a plain answer.
        bracket: its bracket, by places in `sampled`.
    """

    prepared: Prepared
    choices: list[Sample]
    sampled: list[Sample]
    sampled_tokens: int
    deadline_passed: bool
    game: Game | None = None
    bracket: Bracket | None = None


class ServingEngine:
    """Answers requests with a backend."""

    def __init__(self, backend: Backend, limits: Limits, metrics: Metrics) -> None:
        self.backend, self.limits, self.metrics = backend, limits, metrics
        self._free = limits.max_concurrency
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._present = 0
        self._mean_seconds = 1.0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Counts a request in the queue and as present.

        Raises:
            RequestError: the queue is full.
        """
        waiting = self._present - self.limits.max_concurrency
        if waiting >= self.limits.queue:
            self.metrics.refused.inc()
            seconds = self._mean_seconds * (1 + waiting / self.limits.max_concurrency)
            raise RequestError(
                f"{self._present} requests are being answered or wait, which is the limit: "
                "try again later",
                status=429,
                code="rate_limit_exceeded",
                kind="rate_limit_error",
                headers={"Retry-After": str(min(60, max(1, math.ceil(seconds))))},
            )
        self._present += 1
        self.metrics.present.set(self._present)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._present -= 1
            self.metrics.present.set(self._present)
            self._mean_seconds += 0.1 * (time.monotonic() - begun - self._mean_seconds)

    @asynccontextmanager
    async def _turn(self, until: float) -> AsyncIterator[None]:
        """Waits for a free place, in order of arrival; the deadline also applies to the wait."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await asyncio.wait([turn], timeout=_left(until))
            except asyncio.CancelledError:
                self._leave(turn)
                raise
            if not turn.done():
                self._leave(turn)
                raise _late("the request waited until its deadline")
        self.metrics.running.inc()
        try:
            yield
        finally:
            self.metrics.running.dec()
            self._next()

    def _next(self) -> None:
        """Gives a free place to the request that has waited longest."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._free += 1

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            self._next()
        else:
            self._waiting.remove(turn)

    def _until(self, deadline: float | None) -> float:
        return time.monotonic() + min(self.limits.deadline, deadline or math.inf)

    async def prepared(self, request: ChatRequest) -> Prepared:
        """Encodes a request.

        Raises:
            RequestError: the messages cannot be encoded, or are too long.
        """
        until = self._until(request.deadline)
        try:
            prompt = await asyncio.to_thread(self.backend.encoder.encode_prompt, request.messages)
        except EncodingError as error:
            raise RequestError(str(error), "messages", code="invalid_value") from None
        sampling, limit = request.sampling, self.backend.max_length
        if limit is not None and len(prompt) + sampling.max_new_tokens > limit:
            if request.max_tokens is not None or len(prompt) >= limit:
                raise RequestError(
                    f"the model's context is {limit} tokens: the messages have {len(prompt)}, and "
                    f"max_tokens is {sampling.max_new_tokens}",
                    "messages" if len(prompt) >= limit else "max_tokens",
                    code="context_length_exceeded",
                )
            sampling = replace(sampling, max_new_tokens=limit - len(prompt))
        return Prepared(request, tuple(prompt), sampling, until)

    async def answer(self, prepared: Prepared) -> Answer:
        """Samples the responses to a request and, for a tournament, plays it.

        Raises:
            RequestError: no response was complete in time.
        """
        request, until = prepared.request, prepared.until
        plain = request.candidates is None
        async with self._turn(until):
            # The responses of `sampler.sample([prompt], n, seed)` ...
            work = Sampling(
                prepared.prompt,
                request.candidates or request.choices,
                stable_seed(request.seed, 0),
                prepared.sampling,
                request.stop,
                request.top_logprobs,
                until if plain else until - (1 - _SAMPLING_SHARE) * _left(until),
            )
            await self.backend.sample(work)
            sampled = [work.samples[k] for k in sorted(work.samples)]
            self.metrics.sampled(sampled, work.sampled_tokens)
            if not sampled:
                raise _late("no response was complete before the deadline")
            late = len(sampled) < work.n
            if plain:
                return Answer(prepared, sampled, sampled, work.sampled_tokens, late)
            # ... and the bracket of `tournament_rejection_sampling(..., seed=seed)`.
            texts = [sample.judged for sample in sampled]
            context = dialogue_text(request.messages)
            game = Game(knockout_steps(context, texts, stable_seed(request.seed, 0)), until)
            bracket: Bracket = await self.backend.play(game)
        self.metrics.judged(game)
        late = late or any(v.undecidable_because == TOO_LATE for v in game.verdicts)
        best = [sampled[k] for k in ranked(bracket, len(sampled))[: request.choices]]
        return Answer(prepared, best, sampled, work.sampled_tokens, late, game, bracket)

    async def judge(self, request: JudgeRequest) -> tuple[list[tuple[int, int, Verdict]], Game]:
        """Judges all pairs of a request's responses.

        Returns:
            (a, b, verdict) of each pair, and the game.
        """
        until = self._until(request.deadline)
        context = request.context or dialogue_text(request.messages or [])
        pairs = list(itertools.combinations(range(len(request.responses)), 2))
        async with self._turn(until):
            game = Game(_all_pairs(context, request.responses, pairs), until)
            verdicts: list[Verdict] = await self.backend.play(game)
        self.metrics.judged(game)
        return [(a, b, v) for (a, b), v in zip(pairs, verdicts, strict=True)], game


def ranked(bracket: Bracket, count: int) -> list[int]:
    """Returns all responses, best first: by the round in which they lost, then by index.

    Responses that did not take part are last.
    """
    survived = dict.fromkeys(range(count), -1)
    for number, matches in enumerate(bracket.rounds):
        for match in matches:
            for entrant in (match.a, match.b):
                if entrant is not None:
                    survived[entrant] = number
    survived[bracket.winner] = len(bracket.rounds)
    return sorted(survived, key=lambda k: (-survived[k], k))


def _all_pairs(
    context: str, responses: Sequence[str], pairs: Sequence[tuple[int, int]]
) -> Steps[list[Verdict]]:
    verdicts = yield [Comparison(context, responses[a], responses[b]) for a, b in pairs]
    return list(verdicts)


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _late(message: str) -> RequestError:
    return RequestError(
        f"{message}: allow more time, or ask for fewer or shorter responses",
        status=504,
        code="deadline_exceeded",
        kind="timeout_error",
        headers={"x-should-retry": "false"},  # OpenAI's clients would try again
    )


class Metrics:
    """All counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "self_judge_requests", "Answered requests.", ["path", "status"], registry=own
        )
        self.refused = Counter(
            "self_judge_requests_refused", "Requests refused with a full queue.", registry=own
        )
        self.gone = Counter(
            "self_judge_clients_gone", "Requests whose client left first.", registry=own
        )
        self.present = Gauge(
            "self_judge_requests_present", "Requests in work or in the queue.", registry=own
        )
        self.running = Gauge("self_judge_requests_running", "Requests in work.", registry=own)
        self.seconds = Histogram(
            "self_judge_request_seconds", "Seconds to a complete answer.", ["path"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            "self_judge_time_to_first_token_seconds", "Seconds to the first text of an answer.",
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.batch = Histogram(
            "self_judge_batch", "Rows sampled, or comparisons judged, together.", ["kind"],
            buckets=_SIZES, registry=own,
        )  # fmt: skip
        self.tokens = Counter("self_judge_sampled_tokens", "Sampled tokens.", registry=own)
        self.responses = Counter("self_judge_sampled_responses", "Responses.", registry=own)
        self.rounds = Counter("self_judge_rounds", "Rounds of tournaments.", registry=own)
        self.comparisons = Counter("self_judge_comparisons", "Judged pairs.", registry=own)
        self.agree = Counter(
            "self_judge_comparisons_orders_agree", "Judged pairs whose orders agree.", registry=own
        )
        self.undecidable = Counter(
            "self_judge_comparisons_undecidable", "Undecidable pairs.", registry=own
        )

    def sampled(self, samples: Sequence[Sample], tokens: int) -> None:
        """Counts the responses of a request, and all its sampled tokens."""
        self.responses.inc(len(samples))
        self.tokens.inc(tokens)

    def judged(self, game: Game) -> None:
        """Counts the rounds and verdicts of a game."""
        self.rounds.inc(game.rounds)
        self.comparisons.inc(len(game.verdicts))
        self.agree.inc(sum(verdict.orders_agree for verdict in game.verdicts))
        self.undecidable.inc(sum(verdict.preferred is None for verdict in game.verdicts))

    def page(self) -> bytes:
        """Returns all counters in Prometheus' text format."""
        return generate_latest(self.registry)

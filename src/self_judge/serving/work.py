"""The two kinds of work that a request gives to a backend: responses to sample, and a game to play.

This module does not depend on HTTP, or on whether a backend runs the model or asks servers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Comparison, Response, Verdict
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import Steps
from self_judge.judging.voting import undecidable
from self_judge.prompting.chat_encoder import ChatEncoder

TOO_LATE = "the deadline passed"  # the reason why a match of a late game is drawn by lot


class TokenLogprob(NamedTuple):
    """The log-probability of a sampled token, and those of the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sample(NamedTuple):
    """One complete response.

    Attributes:
        response: the response.
        text: the text of the response, up to the first stop text.
        ended: whether the model or a stop text ended the response.
        logprobs: the log-probabilities of all sampled tokens, or `None` unless asked for.
    """

    response: Response
    text: str
    ended: bool
    logprobs: list[TokenLogprob] | None = None

    @property
    def judged(self) -> str:
        """The text for the judge; see `Response.judged`."""
        return self.text if self.response.answered else self.response.judged


@dataclass(eq=False)
class Sampling:
    """Responses to sample for one request.

    Attributes:
        prompt: the token ids of the prompt.
        n, seed: the number of responses and the prompt's seed; see `sampling.rows_to_sample`.
        settings: the sampling settings.
        stop: texts that end a response.
        top_logprobs: the number of likeliest tokens to list, or `None` without log-probabilities.
        until: the time, as from `time.monotonic`, at which sampling stops.
        abandoned: whether nobody waits for the responses any more.
        samples: the complete responses by index. Those that took too long are missing.
        sampled_tokens: the number of tokens sampled so far, in all responses.
    """

    prompt: tuple[int, ...]
    n: int
    seed: int
    settings: SamplingSettings
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    until: float = float("inf")
    abandoned: bool = False
    samples: dict[int, Sample] = field(default_factory=dict)
    sampled_tokens: int = 0

    def given_up(self) -> bool:
        return self.abandoned or time.monotonic() > self.until

    def complete(
        self, k: int, response: Response, logprobs: list[TokenLogprob] | None = None
    ) -> None:
        """Stores response `k`, cut at the first stop text."""
        found = [at for at in map(response.text.find, self.stop) if at >= 0]
        text = response.text[: min(found, default=len(response.text))]
        ended = response.finished or bool(found)
        self.samples[k] = Sample(response, text, ended, logprobs)


@dataclass(eq=False)
class Game:
    """A tournament, or any other game in steps, whose comparisons a backend judges.

    Attributes:
        steps: the game.
        until: the time at which judging stops. Later matches are undecidable.
        abandoned: whether nobody waits for the result any more.
        verdicts: all verdicts so far.
        rounds: the number of steps so far.
    """

    steps: Steps[Any]
    until: float = float("inf")
    abandoned: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    rounds: int = 0

    def late(self) -> bool:
        return time.monotonic() > self.until

    def too_late(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [undecidable((), TOO_LATE) for _ in comparisons]

    def ask(self, received: Sequence[Verdict] | None) -> list[Comparison]:
        """Returns the next comparisons; `received` are the verdicts on the last ones.

        Raises:
            StopIteration: the game is over; its value is the result.
        """
        if received is None:
            return next(self.steps)
        self.verdicts += received
        self.rounds += 1
        return self.steps.send(received)


class Backend(Protocol):
    """Samples and judges for all requests.

    Attributes:
        judge: the judge.
        encoder: the policy's encoder.
        max_length: the maximum number of tokens of a prompt and its response, or `None`.
    """

    judge: Judge
    encoder: ChatEncoder
    max_length: int | None

    async def start(self) -> None:
        """Starts the backend in the running event loop."""
        ...

    async def stop(self) -> None:
        """Stops the backend. No work may be left."""
        ...

    def problem(self) -> str | None:
        """Returns why the backend cannot work at present, or `None`."""
        ...

    async def sample(self, work: Sampling) -> None:
        """Samples until all responses are complete or `until` passes. Cancelling gives up."""
        ...

    async def play(self, game: Game) -> Any:
        """Plays a game to its end and returns the result. Cancelling gives up."""
        ...

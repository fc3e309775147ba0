"""EndpointScorer: letter probabilities from an OpenAI-compatible endpoint with `top_logprobs`.

Prompts are chats, which the endpoint encodes itself. The letters are looked for among the most
likely next tokens. This module does not depend on the meaning of the letters.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from self_judge.console import masked, neutral
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.remote.replicas import Replicas
from self_judge.inference.remote.server import RejectedError, Server, ServerDownError
from self_judge.storage.atomic import loads

logger = logging.getLogger(__name__)

_PATH = "/chat/completions"
_LIKELIEST = (20, 5)  # OpenAI and vLLM give 20 tokens, and some others 5
# What vLLM, SGLang and others need to continue the last message, which is the lead-in.
_CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
_ASKED = "Answer with the letter A or B alone, which completes this sentence: {lead_in}"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_SPACES = " \u2581\u0120\n"  # as in tokenizers' own spellings, "▁A" and "ĠA"

Chat = Sequence[tuple[str, str]]  # (role, text)


class EndpointScorer:
    """A `LetterScorer` that asks an OpenAI-compatible endpoint.

    The probability of a letter is that of its token with a space, which follows the lead-in. If
    neither letter has a token with a space, those without a space count. An endpoint that cannot
    continue the lead-in is asked to complete it, and then the order is the other way round. A
    letter that is not among the most likely tokens has the probability 0.

    Args:
        url: the endpoint, such as `https://host/v1`.
        model: the model's name there; default: the only one that the endpoint lists.
        api_key_env: the environment variable with the key, if the endpoint requires one.
        timeout: the maximum number of seconds until an answer is complete, with all retries.
        concurrency: the number of concurrent requests.
        thought_tokens: see `Judge`.
        retry_wait: see `Server`.

    Attributes:
        continues: whether the endpoint continues the lead-in.
        sampled_tokens: the number of tokens in all thoughts so far.

    Raises:
        EngineError: the endpoint or the key is missing, or it returns no `top_logprobs`.
    """

    max_length: int | None = None  # the endpoint encodes the prompts and knows its limit

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        concurrency: int = 16,
        thought_tokens: int | None = None,
        retry_wait: float = 1.0,
    ) -> None:
        self.thought_tokens = thought_tokens
        self.sampled_tokens = 0
        self._lock = threading.Lock()
        local = (urlsplit(url).hostname or "") in _LOCAL
        key = None if api_key_env is None else _key(api_key_env)
        self.server = Server(
            url.rstrip("/"), concurrency, timeout, retry_wait, key=key, proxies=not local
        )
        self._replicas = Replicas([self.server], concurrency)
        self.model = model or self._only_model()
        self._agree()
        if not self.continues:
            logger.warning(
                "%s does not continue an unfinished answer, so it is asked to complete the lead-in",
                neutral(self.server.shown),
            )

    def letter_probabilities(
        self, prompts: Prompts, letter_ids: tuple[int, int], done: Done
    ) -> torch.Tensor:
        """See `LetterScorer.letter_probabilities`.

        Raises:
            EngineError: none of the prompts has a letter among its most likely next tokens.
        """
        if not prompts:
            return torch.empty(0, 2)
        rows = self._replicas.shared_out(
            lambda server, chat: self._letters(server, chat), list(prompts), lambda _: done(1)
        )
        if not any(map(any, rows)):
            raise EngineError(
                f"{self.server.shown}: neither A nor B is among the {self._body['top_logprobs']} "
                f"most likely tokens after any of {len(rows)} prompts: end the lead-in of the "
                "templates so that a letter follows, or choose another model"
            )
        return torch.tensor(rows, dtype=torch.float64).float()

    def _letters(self, server: Server, chat: Chat) -> tuple[float, float]:
        if self.thought_tokens is None:
            turns = self._open(chat)
        else:
            *asked, (role, lead_in) = chat
            thought = self._thought(server, asked, self.thought_tokens)
            turns = self._open([*asked, (role, f"{thought}\n\n{lead_in}")], thought, lead_in)
        return self._scored(server, turns)

    def _scored(self, server: Server, turns: Chat) -> tuple[float, float]:
        def read(choice: Mapping[str, Any], url: str) -> tuple[float, float]:
            given = choice["logprobs"]
            positions = given.get("content") if isinstance(given, dict) else given
            if given is None or positions is None or (positions and _top(positions) is None):
                raise EngineError(
                    f"{url} returns no top_logprobs for {neutral(self.model)}, so its letters have "
                    "no probabilities: choose an endpoint or a model that returns them"
                )
            return _letters_of(positions[0]["top_logprobs"], self.continues)

        body = {**self._body, "messages": _messages(turns)}
        return server.choices(_PATH, body, 1, read, _ABSENT)[0]

    def _open(
        self, chat: Chat, thought: str | None = None, lead_in: str | None = None
    ) -> list[tuple[str, str]]:
        """Returns the chat whose next token is the letter."""
        *asked, (role, text) = chat
        if self.continues:
            return [*asked, (role, text)]
        question = _ASKED.format(lead_in=lead_in or text)
        if thought is not None:
            return [*asked, (role, thought), ("user", question)]
        return [*asked[:-1], ("user", f"{asked[-1][1]}\n\n{question}")]

    def _thought(self, server: Server, asked: Chat, tokens: int) -> str:
        def read(choice: Mapping[str, Any], url: str) -> str:
            message = choice["message"]
            parts = (message.get("reasoning_content"), message.get("content"))
            texts = [text for text in parts if text is not None]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"a thought of type {type(texts[0]).__name__}")
            logprobs = (choice.get("logprobs") or {}).get("content")
            with self._lock:
                self.sampled_tokens += len(logprobs or "\n".join(texts).split())
            return "\n".join(texts).strip()

        body = {"model": self.model, "messages": _messages(asked), "logprobs": True}
        body |= {"max_tokens": tokens, "temperature": 0.0}
        return server.choices(_PATH, body, 1, read, _ABSENT)[0]

    # -- what the endpoint can do ---------------------------------------------------------------

    def _agree(self) -> None:
        """Finds the parameters of requests that the endpoint accepts, with a short chat."""
        chat = [("user", "Which letter comes first, A or B?"), ("assistant", "The letter is")]
        # The raw distribution: some endpoints return the one after temperature and top_p.
        common = {"model": self.model, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        refused: RejectedError | None = None
        for continues in (True, False):
            for count in _LIKELIEST:
                self.continues = continues
                self._body = {**common, "logprobs": True, "top_logprobs": count}
                self._body |= _CONTINUED if continues else {}
                try:
                    self._scored(self.server, self._open(chat))
                except RejectedError as error:
                    if error.status not in (400, 422):
                        raise EngineError(f"{error}{_hint(error.status)}") from None
                    refused = refused or error
                    last = error
                except ServerDownError as error:
                    raise EngineError(f"{self.server.shown}: {error}") from None
                else:
                    return
        raise EngineError(f"{last}: letters need logprobs and top_logprobs") from refused

    def _only_model(self) -> str:
        status, content, why = self.server.get("/models", min(30.0, self.server.timeout))
        if status != 200:
            raise EngineError(
                f"no endpoint answers at {self.server.shown} ({why}): correct the URL, which "
                f"usually ends in /v1, or name the model{_hint(status)}"
            )
        try:
            names = [str(card["id"]) for card in loads(content)["data"] if not card.get("parent")]
        except (AttributeError, LookupError, TypeError, ValueError):
            names = []
        if len(names) != 1:
            shown = neutral(", ".join(names[:10]))
            raise EngineError(
                f"{self.server.shown} lists {len(names)} models{': ' if names else ''}{shown}: set "
                "model to one of its models"
            )
        return names[0]


_ABSENT = "end the URL as the OpenAI client does, usually in /v1"


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EngineError(f"the environment variable {variable} has no key: set it, or correct "
                          "api_key_env")  # fmt: skip
    if not (key.isascii() and key.isprintable()):
        raise EngineError(f"the environment variable {variable} has a key with characters that no "
                          "header may have, such as a line break: correct it")  # fmt: skip
    masked(key, secret=True)  # from here on, it is masked in all output
    return key


def _hint(status: int) -> str:
    return ": set api_key_env to the variable with the key" if status in (401, 403) else ""


def _messages(turns: Chat) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _top(positions: Sequence[Any]) -> Any:
    return positions[0].get("top_logprobs") or None


def _letters_of(tops: Sequence[Mapping[str, Any]], spaced: bool) -> tuple[float, float]:
    """Returns the probabilities of A and B among the most likely tokens; 0 if one is missing.

    Args:
        spaced: whether the letter follows a text, so that its token begins with a space.
    """
    # With a space, " A" .6, "B" .1, "A" .1 gives (.6, 0): "A" and "B" spell no separate word there.
    found: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for text, logprob in _checked(tops):
        letter = text.lstrip(_SPACES)
        if letter in ("A", "B"):
            found[letter != text]["AB".index(letter)] += math.exp(logprob)
    first, other = found[spaced], found[not spaced]
    a, b = first if any(first) else other
    return a, b


def _checked(tops: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    total = 0.0
    for top in tops:
        text, logprob = top["token"], top["logprob"]
        if not isinstance(text, str):
            raise ValueError(f"a token of type {type(text).__name__}")
        if isinstance(logprob, bool) or not -math.inf < logprob <= 1e-4:
            raise ValueError(f"{logprob!r:.60} is not a log-probability")
        total += math.exp(logprob)
        yield text, logprob
    if total > 1.01:
        raise ValueError(f"the probabilities of the most likely tokens add up to {total:.3f}")

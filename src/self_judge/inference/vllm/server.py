"""One `vllm serve` process: its requests, its answers and its state.

This module does not depend on the meaning of prompts or choices.
"""

from __future__ import annotations

import logging
import math
import operator
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from self_judge.console import masked, neutral
from self_judge.errors import EngineError, in_a_line
from self_judge.storage.atomic import loads

logger = logging.getLogger(__name__)

_TRIES = 4
_BUSY = (429, 502, 503, 504)  # temporary failures; all others are permanent
_LARGEST = 1 << 30  # bytes in an answer

ChoicesT = TypeVar("ChoicesT")


class ServerDownError(EngineError):
    """Raised when a server does not answer, or its answers cannot be used."""


class UnusableError(Exception):
    """Raised when a server's answer cannot be used."""


class Server:
    """A `vllm serve` process: its address, its model and its state."""

    def __init__(self, url: str, connections: int, timeout: float, retry_wait: float) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self.shown = str(masked(url))
        if not re.match(r"https?://[^/]", url):
            raise EngineError(f"{self.shown} is not the URL of a server (http://host:port)")
        self.timeout = timeout
        self.retry_wait = retry_wait
        self.down: str | None = None
        self._lock = threading.Lock()
        self.model = self.root = ""
        self.max_model_length = 0
        self._session = requests.Session()
        self._session.trust_env = False  # do not use a proxy for local servers
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def wait_until_up(self, deadline: float) -> None:
        """Waits until the server answers, and reads the name of its model."""
        import requests

        while True:
            left = deadline - time.monotonic()
            try:
                status, content = self._ask("GET", "/v1/models", min(10.0, max(0.1, left)))
                if status == 200:
                    break
                why = f"HTTP {status}: {error_message(content)}"
                if 300 <= status < 400:
                    raise EngineError(f"{self.shown} cannot be used: {why}")
            except (requests.RequestException, TimeoutError) as error:
                why = _reason(error)
            if time.monotonic() >= deadline:
                raise ServerDownError(
                    f"no vLLM server answers at {self.shown} ({why}): start `vllm serve` there, or "
                    "correct vllm_server_base_url"
                )
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        self.model, self.root, self.max_model_length = base_model(content, self.shown)

    def complete(
        self,
        body: dict[str, Any],
        adapter: str | None,
        count: int,
        read: Callable[[Mapping[str, Any], str], ChoicesT],
    ) -> list[ChoicesT]:
        """Returns the result of `read` for each of the `count` choices in the answer, in order.

        Raises:
            ServerDownError, EngineError: as for `post`. An answer that cannot be read is an answer
                that failed.
        """

        def parsed(content: bytes) -> list[ChoicesT]:
            return choices_of(content, count, read, self.shown)

        return self.post("/v1/completions", {**body, "model": adapter or self.model}, read=parsed)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        absent: str | None = None,
        read: Callable[[bytes], Any] = bytes,
    ) -> Any:
        """Sends a POST request and returns the result of `read` for the content of the answer.

        It tries again if the server is busy, the connection breaks or the answer cannot be read.

        Raises:
            ServerDownError: there was no usable answer after several attempts.
            EngineError: the server rejected the request. `absent` tells how to enable a missing
                endpoint.
        """
        import requests

        why = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.retry_wait * 2 ** (attempt - 1))
            try:
                status, content = self._ask("POST", path, self.timeout, body)
                if status == 200:
                    return read(content)
            except (requests.RequestException, TimeoutError, UnusableError) as error:
                why = _reason(error)
                continue
            why = f"HTTP {status}: {error_message(content)}"
            if status not in _BUSY:
                break
        else:
            raise ServerDownError(f"{path} failed {_TRIES} times; last error: {why}")
        if status in (404, 405) and absent and "does not exist" not in why:
            raise EngineError(f"{self.shown} has no {path}: {absent}")
        raise EngineError(f"{self.shown} rejected a request to {path}: {why}")

    def _ask(
        self, verb: str, path: str, seconds: float, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Returns the status and the content of an answer. Redirects are not followed.

        Raises:
            TimeoutError: the answer is not complete after `seconds`. The time limits of `requests`
                apply to each read, so a server that sends a byte a minute never exceeds them.
        """
        import requests

        answers: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                with self._session.request(
                    verb,
                    f"{self.url}{path}",
                    json=body,
                    timeout=(min(10.0, seconds), seconds),
                    allow_redirects=False,
                    stream=True,
                ) as answer:
                    content = bytearray()
                    for part in answer.iter_content(1 << 16):
                        content += part
                        if len(content) > _LARGEST:
                            raise requests.RequestException(f"more than {_LARGEST:,} bytes")
                    if 300 <= answer.status_code < 400:
                        target = answer.headers.get("Location")
                        content[:] = f"redirects to {target}: use the final URL".encode()
                    answers.put((answer.status_code, bytes(content)))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no complete answer within {seconds:g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave_out(self, error: Exception) -> None:
        """Stops sending requests to this server."""
        with self._lock:
            if self.down is None:
                self.down = str(error)
                told = neutral(f"{self.shown} gets no more requests: {error}")
                logger.warning("vLLM server %s", told)


def base_model(content: bytes, shown: str) -> tuple[str, str, int]:
    """Returns the name, the source and the maximum length of the model in `/v1/models`.

    Raises:
        EngineError: there is no such model.
    """
    try:
        base = next(card for card in loads(content)["data"] if not card.get("parent"))
        root = str(base.get("root") or base["id"])
        return str(base["id"]), root, operator.index(base["max_model_len"])
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise EngineError(
            f"{shown} lists no base model at /v1/models: is it a vLLM server?"
        ) from error


def choices_of(
    content: bytes, count: int, read: Callable[[Mapping[str, Any], str], ChoicesT], shown: str
) -> list[ChoicesT]:
    """Returns the result of `read` for each of the `count` choices in a completion, in order.

    Raises:
        UnusableError: the completion cannot be read.
        EngineError: as `read`.
    """
    try:
        choices = sorted(loads(content)["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(count)):
            raise ValueError(f"{len(choices)} choices for {count} prompts")
        return [read(choice, shown) for choice in choices]
    except EngineError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnusableError(f"the answer cannot be used ({in_a_line(error)})") from None


def sampled_ids(
    choice: Mapping[str, Any], url: str, longest: int, vocabulary: int | None = None
) -> list[int]:
    """Returns the token ids of a sampled choice.

    Raises:
        EngineError: the server is too old.
        ValueError: these are no token ids, or more than `longest`.
    """
    if choice.get("token_ids") is None:
        raise EngineError(f"{url} returns no token ids: it needs vLLM 0.28 or newer")
    ids = list(choice["token_ids"])
    most = vocabulary or 1 << 31
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < most]
    if wrong:
        raise ValueError(f"{wrong[0]!r:.60} is not a token id of the model")
    if len(ids) > longest:
        raise ValueError(f"a response has {len(ids)} of {longest} tokens")
    return ids


def letter_logprobs(choice: Mapping[str, Any], token_ids: Sequence[int], url: str) -> list[float]:
    """Returns the log-probabilities of the given tokens at the first position in a choice.

    Raises:
        EngineError: the server is too old.
        ValueError: these are no log-probabilities.
    """
    top = choice["logprobs"]["top_logprobs"][0]
    missing = next((t for t in token_ids if f"token_id:{t}" not in top), None)
    if missing is not None:
        raise EngineError(
            f"{url} does not return the log-probability of token {missing}: it needs vLLM 0.28 or "
            "newer (logprob_token_ids)"
        )
    found = [float(top[f"token_id:{token}"]) for token in token_ids]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"log-probabilities {found}")
    return found


def error_message(content: bytes) -> str:
    """Returns vLLM's reason for an error: its `error.message`, or the text of the answer."""
    try:
        body = loads(content)
    except ValueError:
        return " ".join(content[:300].decode("utf-8", "replace").split())
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _reason(error: Exception) -> str:
    """Returns the innermost cause of a failed request, on one line."""
    inner: BaseException = error
    while cause := inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__):
        inner = cause
    if isinstance(inner, UnusableError):
        return str(inner)
    return f"{type(inner).__name__}: {str(inner).splitlines()[0] if str(inner) else 'no details'}"

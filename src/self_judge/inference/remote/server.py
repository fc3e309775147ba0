"""One server behind a URL: its requests, its answers and its state.

This module does not depend on the meaning of prompts or choices.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NoReturn, TypeVar

from self_judge.console import masked, neutral
from self_judge.errors import EngineError, in_a_line
from self_judge.storage.atomic import loads

logger = logging.getLogger(__name__)

TRIES = 4
BUSY = (429, 502, 503, 504)  # temporary failures; all others are permanent
_LARGEST = 1 << 30  # bytes in an answer

ChoicesT = TypeVar("ChoicesT")


class ServerDownError(EngineError):
    """Raised when a server does not answer, or its answers cannot be used."""


class RejectedError(EngineError):
    """Raised when a server rejects a request.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnusableError(Exception):
    """Raised when a server's answer cannot be used."""


class _BusyError(UnusableError):
    """Raised when a server is busy. `seconds` is the time in its `Retry-After`, or 0."""

    def __init__(self, message: str, after: str | None) -> None:
        super().__init__(message)
        self.seconds = _seconds(after)


def _seconds(after: str | None) -> float:
    """Returns the number of seconds in the header `Retry-After`, or 0."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return float(Retry().parse_retry_after(after)) if after else 0.0
    except (InvalidHeader, ValueError, OverflowError):  # no time, or not one that a clock has
        return 0.0


class Server:
    """A server and its state.

    Args:
        url: the address, to which the paths of requests are appended.
        connections: the number of concurrent requests.
        timeout: the maximum number of seconds for a request, with its retries, until its answer is
            complete.
        retry_wait: the number of seconds before the first retry. The wait doubles with each retry.
        key: a secret for the `Authorization` header.
        proxies: whether to use the proxies in the environment. Local servers need none.

    Raises:
        EngineError: a package is missing, or the URL is not that of a server.
    """

    def __init__(
        self,
        url: str,
        connections: int,
        timeout: float,
        retry_wait: float,
        *,
        key: str | None = None,
        proxies: bool = False,
    ) -> None:
        if not all(map(find_spec, ("requests", "tenacity"))):
            raise EngineError("servers require packages: pip install 'self-judge[vllm-client]'")

        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self.shown = shown_url(url)
        self.timeout = timeout
        self.retry_wait = retry_wait
        self.down: str | None = None
        self._lock = threading.Lock()
        self._session = requests.Session()
        # `requests` would also send passwords from a .netrc file, in place of the key.
        self._session.trust_env = False
        if proxies:
            self._session.proxies.update(requests.utils.get_environ_proxies(url))
            self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        if key is not None:
            self._session.headers["Authorization"] = f"Bearer {key}"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def get(self, path: str, seconds: float) -> tuple[int, bytes, str]:
        """Returns the status and the content of an answer, and why it cannot be used, if so.

        Raises:
            RejectedError: the server redirects.
        """
        import requests

        try:
            status, content, _ = self._ask("GET", path, seconds)
        except (requests.RequestException, TimeoutError) as error:
            return 0, b"", _reason(error)
        why = "" if status == 200 else f"HTTP {status}: {error_message(content)}"
        if 300 <= status < 400:
            raise RejectedError(f"{self.shown} cannot be used: {why}", status)
        return status, content, why

    def choices(
        self,
        path: str,
        body: dict[str, Any],
        count: int,
        read: Callable[[Mapping[str, Any], str], ChoicesT],
        absent: str | None = None,
    ) -> list[ChoicesT]:
        """Returns the result of `read` for each of the `count` choices in the answer, in order.

        Raises:
            ServerDownError, EngineError: as for `post`. An answer that cannot be read is an answer
                that failed.
        """

        def parsed(content: bytes) -> list[ChoicesT]:
            return choices_of(content, count, read, self.shown)

        return self.post(path, body, absent, parsed)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        absent: str | None = None,
        read: Callable[[bytes], Any] = bytes,
    ) -> Any:
        """Sends a POST request and returns the result of `read` for the content of the answer.

        It tries again if the server is busy, the connection breaks or the answer cannot be read. A
        server that names a time (`Retry-After`, as for a rate limit) is asked again at that time.

        Raises:
            ServerDownError: there was no usable answer after several attempts or by the deadline.
            RejectedError: the server rejected the request. `absent` tells how to enable a missing
                endpoint.
        """
        import requests
        import tenacity as t

        deadline = time.monotonic() + self.timeout
        failed = 0  # attempts after which the server named no time

        def named(state: t.RetryCallState) -> float:
            return getattr(state.outcome and state.outcome.exception(), "seconds", 0.0)

        def ask() -> Any:
            status, content, after = self._ask("POST", path, deadline - time.monotonic(), body)
            if status == 200:
                return read(content)
            why = f"HTTP {status}: {error_message(content)}"
            if status not in BUSY:
                self._reject(path, status, why, absent)
            raise _BusyError(why, after)

        def stop(state: t.RetryCallState) -> bool:
            nonlocal failed
            failed += not named(state)
            return failed >= TRIES or t.stop_before_delay(self.timeout)(state)

        doubled = t.wait_exponential(self.retry_wait)
        passing = (UnusableError, requests.RequestException, TimeoutError)
        attempts = t.Retrying(
            retry=t.retry_if_exception_type(passing),
            wait=lambda state: max(doubled(state), named(state)),
            stop=stop,
            reraise=True,
        )
        try:
            return attempts(ask)
        except passing as error:
            often = f"{TRIES} times" if failed >= TRIES else f"within {self.timeout:g} s"
            told = f"{path} failed {often}; last error: {_reason(error)}"
            raise ServerDownError(told) from None

    def _reject(self, path: str, status: int, why: str, absent: str | None) -> NoReturn:
        if status in (404, 405) and absent and "does not exist" not in why:
            raise RejectedError(f"{self.shown} has no {path}: {absent}", status)
        raise RejectedError(f"{self.shown} rejected a request to {path}: {why}", status)

    def _ask(
        self, verb: str, path: str, seconds: float, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes, str | None]:
        """Returns the status, the content and `Retry-After`. Redirects are not followed.

        Raises:
            TimeoutError: the answer is not complete after `seconds`. The time limits of `requests`
                apply to each read, so a server that sends a byte a minute never exceeds them.
        """
        import requests

        answers: queue.SimpleQueue[tuple[int, bytes, str | None] | Exception] = queue.SimpleQueue()
        seconds = max(seconds, 0.001)

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
                    after = answer.headers.get("Retry-After")
                    answers.put((answer.status_code, bytes(content), after))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no complete answer within {seconds:.3g} s") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave_out(self, error: Exception) -> None:
        """Stops sending requests to this server."""
        with self._lock:
            if self.down is None:
                self.down = str(error)
                told = neutral(f"{self.shown} gets no more requests: {error}")
                logger.warning("server %s", told)


def say_waiting(shown: str, why: str, deadline: float) -> None:
    """Says that a vLLM server does not answer yet, and how long it is waited for."""
    left = deadline - time.monotonic()
    logger.warning(
        "no vLLM server answers at %s yet (%s): waiting for up to %.0f s", shown, neutral(why), left
    )


def shown_url(url: str) -> str:
    """Returns the URL of a server without its secrets, for messages.

    Raises:
        EngineError: it is not the URL of a server.
    """
    shown = str(masked(url))
    if not re.match(r"https?://[^/]", url):
        raise EngineError(f"{shown} is not the URL of a server (http://host:port)")
    return shown


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


def error_message(content: bytes) -> str:
    """Returns the server's reason for an error: its `error.message`, or the text of the answer."""
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

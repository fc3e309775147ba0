"""The HTTP of the server: routes, keys, limits on bodies, streams and errors.

This module translates between HTTP and `ServingEngine`. It does not sample or judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from self_judge.console import neutral
from self_judge.errors import EngineError, in_a_line
from self_judge.serving.answers import Completion, judgment, model_cards
from self_judge.serving.engine import ServingEngine
from self_judge.serving.requests import (
    ChatRequest,
    RequestError,
    chat_request,
    judge_request,
    no_model,
)

logger = logging.getLogger(__name__)

_LARGEST_BODY = 4 << 20  # bytes
KEEP_ALIVE = 5.0  # seconds between comments in a stream, so that no proxy closes it
_UNREAD = (401, 403, 413, 415)  # errors for which the body is not read
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

Endpoint = Callable[[Request], Awaitable[Response]]


class ClientGoneError(Exception):
    """Raised when the client has left before its answer."""


class App:
    """The routes of a server.

    Args:
        engine: answers the requests.
        name: the name of the served model.
        keys: requests must have one of these keys, if there are any.
        keep_alive: the number of seconds between comments in a stream.
    """

    def __init__(
        self,
        engine: ServingEngine,
        name: str,
        keys: Sequence[str] = (),
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        self.engine, self.name, self.keep_alive = engine, name, keep_alive
        self._keys = [_digest(key.encode()) for key in keys]
        self.started = int(time.time())

    def starlette(self) -> Starlette:
        """Returns the ASGI application, which also starts and stops the backend."""

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            await self.engine.backend.start()
            yield
            await self.engine.backend.stop()

        routes = [
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/judge", self._guarded(self.judge), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models), methods=["GET"]),
            Route("/v1/models/{model:path}", self._guarded(self.model), methods=["GET"]),
            Route("/metrics", self._guarded(self.metrics), methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]
        handlers: Any = {HTTPException: _http_error}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    # -- endpoints ---------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Answers `/v1/chat/completions`."""
        arrived = time.monotonic()
        asked = chat_request(await _body(request), self.name, self.engine.limits.max_n)
        principles = self.engine.backend.judge.templates.principles
        completion = Completion(asked.model, self.engine.backend.encoder, principles)
        if asked.stream:
            return _Stream(self, asked, completion, arrived)

        async def answered() -> Response:
            async with self.engine.admitted():
                answer = await self.engine.answer(await self.engine.prepared(asked))
                self.engine.metrics.first_token.observe(time.monotonic() - arrived)
                return _json(completion.whole(answer))

        return await _while_connected(request.receive, answered())

    async def judge(self, request: Request) -> Response:
        """Answers `/v1/judge`."""
        asked = judge_request(await _body(request), self.name, self.engine.limits.max_n)
        principles = self.engine.backend.judge.templates.principles

        async def answered() -> Response:
            async with self.engine.admitted():
                judged, game = await self.engine.judge(asked)
                count = len(asked.responses)
                model = asked.model or self.name
                return _json(judgment(model, judged, game, count, principles))

        return await _while_connected(request.receive, answered())

    async def models(self, request: Request) -> Response:
        """Answers `/v1/models`."""
        cards = model_cards(self.name, self.engine.limits.max_n, self.started)
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """Answers `/v1/models/NAME`."""
        model = request.path_params["model"]
        cards = model_cards(self.name, self.engine.limits.max_n, self.started)
        found = [card for card in cards if card["id"] == model]
        if not found:
            raise no_model(model, self.name)
        return _json(found[0])

    async def metrics(self, request: Request) -> Response:
        """Answers `/metrics`."""
        return Response(self.engine.metrics.page(), media_type="text/plain; version=0.0.4")

    async def health(self, request: Request) -> Response:
        """Answers `/health`, for which no key is needed."""
        problem = self.engine.backend.problem()
        status = {"status": "ok"} if problem is None else {"status": "down", "reason": problem}
        return _json(status, 200 if problem is None else 503)

    # -- what all endpoints share ------------------------------------------------------------------

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """Checks the key, counts the request and turns every error into OpenAI's body."""

        async def guarded(request: Request) -> Response:
            begun = time.monotonic()
            path = request.scope["route"].path if "route" in request.scope else request.url.path
            try:
                self._check_sender(request)
                response = await endpoint(request)
            except Exception as error:
                response = self.refusal(error)
            if not isinstance(response, _Stream):
                self.count(path, response.status_code, begun)
            return response

        return guarded

    def count(self, path: str, status: int, begun: float) -> None:
        """Counts an answered request."""
        self.engine.metrics.requests.labels(path, str(status)).inc()
        self.engine.metrics.seconds.labels(path).observe(time.monotonic() - begun)

    def refusal(self, error: BaseException) -> Response:
        """Returns the answer for an error. Only what a client may know is in it."""
        if isinstance(error, ClientGoneError | ClientDisconnect):
            self.engine.metrics.gone.inc()
            return Response(status_code=499)  # nobody reads it
        shown = error_shown(error)
        # The body may be unread, and another request cannot follow it.
        closes = {"Connection": "close"} if shown.status in _UNREAD else {}
        return _json(shown.body(), shown.status, {**shown.headers, **closes})

    def _check_sender(self, request: Request) -> None:
        if self._keys:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            # Digests have one length, so the time of the comparison does not tell that of the key.
            digest = _digest(given.strip().encode("latin-1"))  # the bytes as they were sent
            known = [hmac.compare_digest(digest, key) for key in self._keys]
            if not any(known) or scheme.lower() != "bearer":
                raise RequestError(
                    "the API key is missing or wrong: send Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            return
        # Without a key, a page in a browser must not reach the server: not under a name that its
        # own DNS server resolves to this machine, and not with a body that browsers send unasked.
        host = request.headers.get("Host", "")
        if host.rpartition(":")[0] not in _LOOPBACK and host not in _LOOPBACK:
            raise RequestError("without a key, the server is reached as localhost", status=403)
        if "Origin" in request.headers:
            raise RequestError("without a key, pages in browsers are refused", status=403)


class _Stream(Response):
    """An answer as server-sent events, which starts before it is known.

    The role comes at once, then comments while the answer is made, then its text in chunks.
    """

    def __init__(
        self, app: App, asked: ChatRequest, completion: Completion, arrived: float
    ) -> None:
        super().__init__()
        self.app, self.asked, self.completion, self.arrived = app, asked, completion, arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _Sent(send)
        status = 200
        try:
            await _while_connected(receive, self._events(sent))
        except Exception as error:
            refusal = self.app.refusal(error)
            status = refusal.status_code
            if status == 499:
                pass
            elif not sent.begun:
                await refusal(scope, receive, send)
            else:  # the status was sent long ago
                with contextlib.suppress(OSError):
                    await sent.event(bytes(refusal.body).decode())
                    await sent.end()
        self.app.count("/v1/chat/completions", status, self.arrived)

    async def _events(self, sent: _Sent) -> None:
        engine = self.app.engine
        async with engine.admitted():
            prepared = await engine.prepared(self.asked)
            await sent.begin()
            for chunk in self.completion.role_chunks(self.asked.choices):
                await sent.event(_dumps(chunk))
            task = asyncio.ensure_future(engine.answer(prepared))
            try:
                while not (await asyncio.wait([task], timeout=self.app.keep_alive))[0]:
                    await sent.comment("judging")
            finally:
                task.cancel()
            answer = task.result()
        engine.metrics.first_token.observe(time.monotonic() - self.arrived)
        for chunk in self.completion.chunks(answer, self.asked.include_usage):
            await sent.event(_dumps(chunk))
        await sent.event("[DONE]")
        await sent.end()


class _Sent:
    """Sends server-sent events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self) -> None:
        self.begun = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"),
                   (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # fmt: skip
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def event(self, data: str) -> None:
        await self._part(f"data: {data}\n\n")

    async def comment(self, text: str) -> None:
        await self._part(f": {text}\n\n")

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _part(self, text: str) -> None:
        body = text.encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Runs `work`, and cancels it if the client leaves.

    Raises:
        ClientGoneError: the client left first.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for own in (task, gone):
            own.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _body(request: Request) -> bytes:
    """Reads the body of a request, up to the limit."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the content type {kind!r:.80} is not application/json", status=415)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > _LARGEST_BODY:
            raise RequestError(f"the body has more than {_LARGEST_BODY:,} bytes", status=413)
    return bytes(content)


def error_shown(error: BaseException) -> RequestError:
    """Returns an error as the client may see it; unexpected ones are logged in a line."""
    if isinstance(error, RequestError):
        return error
    logger.error("a request failed: %s", neutral(in_a_line(error)))
    if isinstance(error, EngineError):
        message, status = "the servers that run the model cannot answer", 503
        return RequestError(message, status=status, kind="server_error", code="engine_error")
    return RequestError("the server had an error", status=500, kind="server_error")


async def _http_error(request: Request, error: HTTPException) -> Response:
    """Answers for unknown paths and methods."""
    message = f"{request.method} {request.url.path:.200}: {error.detail}"
    shown = RequestError(message, status=error.status_code, code="unknown_url")
    return _json(shown.body(), error.status_code, dict(error.headers or {}))


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    content = _dumps(body).encode()
    return Response(content, status, headers, media_type="application/json")


def _dumps(body: Any) -> str:
    return json.dumps(body, allow_nan=False)  # ASCII, so lone surrogates are no problem


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""Servers that lie, redirect, hang or drip: one line with their URL, by the deadline."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fake_vllm import FakeVLLM, serving
from self_judge.config.self_training import SamplingSettings
from self_judge.errors import EngineError
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import SamplingRequest

Change = Callable[[dict[str, Any]], Any]


def client(*urls: str, **changes: Any) -> VLLMServers:
    return VLLMServers(urls, **{"timeout": 2, "retry_wait": 0.001, "vocabulary": 600, **changes})


def draw(engine: VLLMServers) -> Any:
    settings = SamplingSettings(max_new_tokens=4, temperature=1.0, top_p=1.0)
    return engine.sample([SamplingRequest((1, 2), 0)], settings, [7], None, lambda n: None)


def score(engine: VLLMServers) -> Any:
    return engine.next_token_logprobs([[1, 2], [3]], (3, 1), None, lambda n: None)


def choice(**changes: Any) -> Change:
    """An answer whose first choice has other values."""
    return lambda answer: {"choices": [{**answer["choices"][0], **changes}, *answer["choices"][1:]]}


def scores(value: Any) -> Change:
    return choice(logprobs={"top_logprobs": [{"token_id:3": value, "token_id:1": -1.0}]})


NO_ANSWERS: dict[str, Change] = {
    "no choices": lambda answer: {"id": "x"},
    "null": lambda answer: None,
    "a list": lambda answer: [answer],
    "no list of choices": lambda answer: {"choices": 3},
    "no choice": lambda answer: {"choices": []},
    "too many choices": lambda answer: {"choices": answer["choices"] * 2},
    "a choice that is text": lambda answer: {"choices": ["x"] * len(answer["choices"])},
    "a choice without an index": lambda answer: {"choices": [{}] * len(answer["choices"])},
    "an index that is not a number": choice(index=[0]),
}
WRONG_IDS = [[600], [-1], [2**70], ["3"], [None], [1.5], [True], 3, [1, 2, 3, 4, 5], "12"]
WRONG_SCORES = [float("nan"), float("inf"), float("-inf"), None, "x", [1.0], {}]


@pytest.mark.parametrize("ask", [draw, score])
@pytest.mark.parametrize("change", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_an_answer_that_is_none_is_one_line_with_the_url(
    ask: Any, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(ask, change, monkeypatch)


@pytest.mark.parametrize("ids", WRONG_IDS, ids=repr)
def test_ids_that_the_model_does_not_have_are_not_used(
    ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(draw, choice(token_ids=ids), monkeypatch)


@pytest.mark.parametrize("value", WRONG_SCORES, ids=repr)
def test_scores_that_are_no_numbers_are_not_used(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(score, scores(value), monkeypatch)


@pytest.mark.parametrize("logprobs", [None, 3, {}, {"top_logprobs": []}, {"top_logprobs": [None]}])
def test_an_answer_without_scores_is_not_used(
    logprobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(score, choice(logprobs=logprobs), monkeypatch)


def refused(ask: Any, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = FakeVLLM.complete
    with serving(FakeVLLM()) as fake:
        engine = client(fake.url)
        monkeypatch.setattr(FakeVLLM, "complete", lambda *a: (200, change(complete(*a)[1])))
        with pytest.raises(EngineError) as error:
            ask(engine)
        assert fake.url in str(error.value)
        assert "\n" not in str(error.value)
        assert len(fake.requests) == 4  # it was asked again


def test_a_server_that_lies_is_left_out_and_the_others_do_its_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    complete = FakeVLLM.complete
    with serving(FakeVLLM()) as honest, serving(FakeVLLM()) as liar:
        monkeypatch.setattr(
            FakeVLLM,
            "complete",
            lambda s, body: (200, {"choices": []}) if s is liar else complete(s, body),
        )
        engine = client(liar.url, honest.url)
        assert [draw(engine) for _ in range(4)] == [[[3, 4, 7]]] * 4
    assert f"{liar.url} gets no more requests" in caplog.text


# -- servers that speak no proper HTTP -------------------------------------------------------------


@contextmanager
def speaking(*parts: bytes, pause: float = 0.0, first: bytes | None = None) -> Iterator[str]:
    """Answers every request with raw bytes, part after part; the first request with others."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()
    asked = 0

    def answer(connection: socket.socket, own: tuple[bytes, ...], wait: float) -> None:
        with connection:
            connection.recv(1 << 16)
            for part in own:
                try:
                    connection.sendall(part)
                except OSError:
                    return
                if stopped.wait(wait):
                    return

    def listen() -> None:
        nonlocal asked
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            asked += 1
            own, wait = ((first,), 0.0) if first and asked == 1 else (parts, pause)
            threading.Thread(target=answer, args=(connection, own, wait), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        listener.close()


def http(body: bytes, status: str = "200 OK", length: int | None = None, more: str = "") -> bytes:
    size = len(body) if length is None else length
    return (
        f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{more}Connection: close\r\n\r\n".encode()
        + body
    )


MODELS = http(json.dumps({"data": [{"id": "policy", "max_model_len": 512}]}).encode())
GOOD = json.dumps({"choices": [{"index": 0, "token_ids": [3, 7]}]}).encode()


@pytest.mark.parametrize(
    "said",
    [
        http(GOOD[:20]),
        http(GOOD[:20], length=len(GOOD)),
        http(b"<html>busy</html>"),
        http(b"[" * 100_000),
        http(b"\xff\xfe"),
        http(b'{"choices": ' + b"9" * 5000 + b"}"),
        http(GOOD, more="Content-Encoding: gzip\r\n"),
        b"no HTTP at all\r\n\r\n",
        b"",
        http(b"", "204 No Content"),
        *(
            http(b"", "503 Busy", more=f"Retry-After: {after}\r\n")
            for after in ("Fri, 31 Dec 99999 23:59:59 GMT", "9" * 400, "9" * 5000, "-5", "soon")
        ),
    ],
    ids=range(15),
)
def test_an_answer_that_is_cut_or_no_json_is_one_line_with_the_url(said: bytes) -> None:
    with speaking(said, first=MODELS) as url:
        engine = client(url)
        with pytest.raises(EngineError) as error:
            draw(engine)
    assert url in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "parts",
    [
        [bytes([c]) for c in http(GOOD)],  # a byte at a time, from the first
        [http(b"", length=len(GOOD)), *(bytes([c]) for c in GOOD)],
        [b"HTTP/1.1 200 OK\r\n", *[b"X-More: x\r\n"] * 500],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\n[\r\n"] * 500],
    ],
    ids=["drips", "drips the body", "endless headers", "endless body"],
)
def test_a_server_that_drips_ends_with_the_deadline(parts: list[bytes]) -> None:
    with speaking(*parts, pause=0.15, first=MODELS) as url:
        engine = client(url, request_timeout=0.2)
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"no complete answer within 0\.2 s") as error:
            draw(engine)
        assert time.monotonic() - started < 5
    assert url in str(error.value)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_redirect_is_not_followed_and_named(status: str, when: str) -> None:
    with serving(FakeVLLM()) as target:
        moved = http(b"", status, more=f"Location: {target.url}/v1/completions\r\n")
        with speaking(moved, first=MODELS if when == "later" else None) as url:
            with pytest.raises(EngineError, match="redirects to") as error:
                draw(client(url))
            assert url in str(error.value)
            assert target.url in str(error.value)
        assert not target.requests


@pytest.mark.parametrize(
    "said",
    [b"[]", b"{}", b'{"data": 3}', b'{"data": [3]}', b'{"data": []}', b"x", b"[" * 100_000,
     b'{"data": [{"id": "x", "max_model_len": "y"}]}', b'{"data": [{"max_model_len": 9}]}'],
)  # fmt: skip
def test_a_server_of_something_else_is_named(said: bytes) -> None:
    with speaking(http(said)) as url, pytest.raises(EngineError, match="is it a vLLM server") as e:
        client(url)
    assert url in str(e.value)


def test_a_server_that_never_speaks_ends_with_the_deadline() -> None:
    with speaking(*[b""] * 100, pause=0.2) as url:
        started = time.monotonic()
        with pytest.raises(EngineError, match="no vLLM server answers") as error:
            client(url, timeout=0.3)
        assert time.monotonic() - started < 5
    assert url in str(error.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "file:///etc/passwd"])
def test_what_is_no_url_of_a_server_is_said_at_once(url: str) -> None:
    with pytest.raises(EngineError, match="is not the URL of a server"):
        client(url, timeout=60)

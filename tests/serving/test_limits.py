"""What a server takes on: the queue, deadlines, clients that leave, keys, and large bodies."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from conftest import saved_as_judge
from self_judge import Judge
from self_judge.inference.decoding import decode
from self_judge.serving.app import App
from self_judge.serving.engine import Limits, Metrics, ServingEngine
from self_judge.serving.in_process import InProcess
from served import MESSAGES, running, served, streamed


def eventually(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


class Gate:
    """Holds the model at every token while it is closed, and counts the tokens."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()
        self.slow = 0.0
        self.passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.opened.wait(60)
        time.sleep(self.slow)
        self.passes += 1


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Judge.from_pretrained(saved_as_judge(tmp_path_factory.mktemp("judge")))


@contextmanager
def gated(judge: Any, limits: Limits, **app: Any) -> Iterator[SimpleNamespace]:
    """A server whose model waits at a gate."""
    gate, metrics = Gate(), Metrics()
    batches: list[tuple[str, int]] = []
    hook = judge.model.register_forward_pre_hook(gate)
    backend = InProcess(
        judge, judge.model, judge.encoder, on_batch=lambda *batch: batches.append(batch)
    )
    engine = ServingEngine(backend, limits, metrics)
    try:
        with running(App(engine, "name", **app).starlette()) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120)
            with client:
                yield SimpleNamespace(
                    url=url, gate=gate, engine=engine, batches=batches, client=client
                )
    finally:
        gate.opened.set()
        hook.remove()


def body(n: int | None = None, seed: int = 0, **more: Any) -> dict[str, Any]:
    own = {} if n is None else {"self_judge": {"n": n}}
    given = {"model": "name", "messages": MESSAGES, "seed": seed, "max_tokens": 6}
    return {**given, **own, **more}


def post(url: str, content: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=content, timeout=60, **options)


def test_a_full_queue_answers_429_with_the_time_to_wait(judge: Any) -> None:
    with gated(judge, Limits(max_concurrency=2, queue=3)) as here, ThreadPoolExecutor(9) as pool:
        post(here.url, body())
        here.gate.opened.clear()
        waiting = [pool.submit(post, here.url, body(2, seed)) for seed in range(5)]
        eventually(lambda: here.engine.metrics.present._value.get() == 5)
        for stream in (False, True):
            refused = post(here.url, body(stream=stream))
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        with pytest.raises(openai.RateLimitError):
            here.client.chat.completions.create(model="name", messages=MESSAGES)
        assert httpx.get(f"{here.url}/health").status_code == 200
        here.gate.opened.set()
        answers = [future.result() for future in waiting]
        assert [answer.status_code for answer in answers] == [200] * 5
        alone = [post(here.url, body(2, seed)).json() for seed in range(5)]
        assert [a.json()["choices"] for a in answers] == [a["choices"] for a in alone]


def test_concurrent_requests_share_passes_and_get_the_answers_they_get_alone(judge: Any) -> None:
    with gated(judge, Limits()) as here, ThreadPoolExecutor(16) as pool:
        alone = [post(here.url, body(4, seed, temperature=1 + seed % 3)) for seed in range(12)]
        before, here.gate.passes = here.gate.passes, 0
        here.batches.clear()
        here.gate.opened.clear()
        first = pool.submit(post, here.url, body())  # occupies the model
        eventually(lambda: here.batches)
        here.batches.clear()
        together = [
            pool.submit(post, here.url, body(4, seed, temperature=1 + seed % 3))
            for seed in range(12)
        ]
        eventually(lambda: here.engine.metrics.present._value.get() == 13)
        time.sleep(0.2)
        here.gate.opened.set()
        answers = [future.result() for future in together]
        assert first.result().status_code == 200
        assert [a.json()["choices"] for a in answers] == [a.json()["choices"] for a in alone]
        # 12 × 4 rows in one batch; 12 × 2 and 12 × 1 matches in two rounds, less equal responses.
        assert here.batches[0] == ("rows", 48)
        assert [kind for kind, _ in here.batches[1:]] == ["comparisons", "comparisons"]
        assert here.batches[1][1] > 12
        assert here.gate.passes < before / 4


def test_a_stream_says_its_role_at_once_and_comments_while_it_works(judge: Any) -> None:
    with gated(judge, Limits(), keep_alive=0.05) as here:
        here.gate.opened.clear()
        request = {"json": body(4, stream=True), "timeout": 30}
        with httpx.stream("POST", f"{here.url}/v1/chat/completions", **request) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()
            first = json.loads(next(lines).removeprefix("data: "))
            assert first["choices"][0]["delta"]["role"] == "assistant"
            comments = [line for _, line in zip(range(7), lines, strict=False)]
            assert comments.count(": judging") == 3
            here.gate.opened.set()
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model(judge: Any, stream: bool) -> None:
    with gated(judge, Limits(max_concurrency=1)) as here:
        here.gate.slow = 0.02
        long = body(8, max_tokens=400, stream=stream)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{here.url}/v1/chat/completions", json=long, timeout=0.4)
        assert post(here.url, body()).status_code == 200  # waits for the place of the other
        assert here.gate.passes < 300
        page = httpx.get(f"{here.url}/metrics").text
        assert "self_judge_clients_gone_total 1.0" in page
        eventually(lambda: here.engine.metrics.present._value.get() == 0)


def test_the_deadline_plays_the_bracket_over_what_is_complete(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        given = body(8, 5, max_tokens=400, stop=["!"])  # they end at different times
        given["self_judge"] |= {"brackets": True}
        whole = post(here.url, given).json()["self_judge"]
        here.gate.slow = 0.05
        given["self_judge"] |= {"deadline_ms": 1500}
        answer = post(here.url, given).json()
        beside = answer["self_judge"]
        assert beside["deadline_passed"]
        assert 0 < beside["complete"] < whole["complete"] == 8
        assert set(beside["responses"]) <= set(whole["responses"])
        best = beside["responses"][beside["winner"]]
        assert answer["choices"][0]["message"]["content"] == best


def test_a_deadline_without_a_response_is_an_error_that_clients_do_not_repeat(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        here.gate.slow = 0.05
        given = body(4, max_tokens=400)
        given["self_judge"]["deadline_ms"] = 200
        late = post(here.url, given)
        assert late.status_code == 504
        assert late.headers["x-should-retry"] == "false"
        assert late.json()["error"]["code"] == "deadline_exceeded"


def test_matches_after_the_deadline_are_drawn_by_lot(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        given = body(8, max_tokens=4)
        given["self_judge"] |= {"brackets": True, "deadline_ms": 1500}
        compare = judge.compare

        def slow(comparisons: Any) -> Any:
            time.sleep(2)
            return compare(comparisons)

        judge.compare = slow
        try:
            answer = post(here.url, given).json()["self_judge"]
        finally:
            del judge.compare
        assert answer["deadline_passed"]
        lots = [[match["by_lot"] for match in played] for played in answer["bracket"]]
        assert not any(lots[0])
        assert all(lots[1] + lots[2])


def test_without_a_key_only_this_machine_and_no_page_in_a_browser_is_answered(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        port = here.url.rpartition(":")[2]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost"):
            assert post(here.url, body(), headers={"Host": host}).status_code == 200
        for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "https://evil.example"}):
            assert post(here.url, body(), headers=headers).status_code == 403
        plain = httpx.post(f"{here.url}/v1/chat/completions", content=json.dumps(body()))
        assert plain.status_code == 415


def test_a_key_is_needed_where_there_is_one_and_never_logged(
    judge: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("DEBUG")
    key = "sk-" + "7" * 20 + "é"
    with gated(judge, Limits(), keys=[key]) as here:
        sent = {"Authorization": f"Bearer {key}".encode()}
        assert post(here.url, body(), headers=sent).status_code == 200
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {key[:-1]}"},
                      {"Authorization": f"Basic {key[:-1]}"}):  # fmt: skip
            refused = post(here.url, body(), headers=wrong)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert key[:-1] not in refused.text
        with pytest.raises(openai.AuthenticationError):
            here.client.models.list()
        assert httpx.get(f"{here.url}/metrics").status_code == 401
        assert httpx.get(f"{here.url}/health").status_code == 200
    shown = caplog.text + "".join(capfd.readouterr())
    assert key[:-1] not in shown


def test_a_large_body_is_refused_before_it_is_read(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        large = [{"role": "user", "content": "x" * (5 << 20)}]
        refused = post(here.url, body(messages=large))
        assert refused.status_code == 413
        assert "4,194,304 bytes" in refused.json()["error"]["message"]
        host, port = here.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:  # a body that never ends
            head = "POST /v1/judge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            client.sendall(f"{head}\r\nContent-Length: 99999999999\r\n\r\n".encode())
            client.settimeout(60)
            with pytest.raises(OSError):
                client.sendall(b" " * (1 << 28))
        assert post(here.url, body()).status_code == 200


def test_an_error_of_the_model_is_a_500_without_its_text(
    judge: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("secret of the model")

    with gated(judge, Limits()) as here:
        monkeypatch.setattr("self_judge.serving.rows.decode", fails)
        failed = post(here.url, body(4))
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        assert "secret" not in failed.text
        assert "secret of the model" in caplog.text
        with pytest.raises(openai.APIError, match="the server had an error"):
            streamed(
                here.client.chat.completions.create(model="name", messages=MESSAGES, stream=True)
            )
        monkeypatch.setattr("self_judge.serving.rows.decode", decode)
        assert post(here.url, body(4)).status_code == 200


def test_memory_shortage_halves_the_batch_and_changes_no_answer(
    judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(model: Any, prompts: Any, copies: Any, *args: Any, **kwargs: Any) -> Any:
        if sum(copies) > 3:
            raise RuntimeError("CUDA out of memory.")
        return decode(model, prompts, copies, *args, **kwargs)

    with gated(judge, Limits()) as here:
        before = post(here.url, body(8)).json()
        monkeypatch.setattr("self_judge.serving.rows.decode", small)
        assert post(here.url, body(8)).json()["choices"] == before["choices"]


def test_judging_gives_every_verdict_and_the_ranking(judge: Any) -> None:
    texts = ["Paris, I think.", "no", "yes", "Paris, I think."]
    with gated(judge, Limits()) as here:
        given: dict[str, Any] = {"context": "what is it?", "responses": texts}
        answer = httpx.post(f"{here.url}/v1/judge", json=given).json()
        chat = {"messages": MESSAGES, "responses": texts, "model": "name"}
        assert httpx.post(f"{here.url}/v1/judge", json=chat).json()["scores"] == answer["scores"]
        from self_judge import Comparison

        pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
        assert [(v["a"], v["b"]) for v in answer["verdicts"]] == pairs
        expected = judge.compare([Comparison("what is it?", texts[a], texts[b]) for a, b in pairs])
        for verdict, same in zip(answer["verdicts"], expected, strict=True):
            assert verdict["preferred"] == same.preferred
        assert sorted(answer["ranking"]) == [0, 1, 2, 3]
        ranked = [answer["scores"][k] for k in answer["ranking"]]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(answer["scores"]) == pytest.approx(2)
        for changes, param in (
            ({"responses": ["x"]}, "responses"), ({"responses": ["x", 3]}, "responses[1]"),
            ({"context": " "}, "context"), ({"messages": MESSAGES}, "context"),
            ({"rubric": "x"}, "rubric"), ({"model": "y"}, "model"),
        ):  # fmt: skip
            refused = httpx.post(f"{here.url}/v1/judge", json={**given, **changes})
            assert refused.status_code in (400, 404)
            assert refused.json()["error"]["param"] == param


def test_metrics_count_what_was_done(judge: Any) -> None:
    with gated(judge, Limits()) as here:
        post(here.url, body(4))
        post(here.url, body(temperature=-1))
        page = httpx.get(f"{here.url}/metrics").text
        chat = 'path="/v1/chat/completions"'
        assert f'self_judge_requests_total{{{chat},status="200"}} 1.0' in page
        assert f'self_judge_requests_total{{{chat},status="400"}} 1.0' in page
        assert "self_judge_sampled_responses_total 4.0" in page
        assert "self_judge_rounds_total 2.0" in page
        assert "self_judge_time_to_first_token_seconds_count 1.0" in page
        counts = dict(re.findall(r"^(self_judge_comparisons\w*_total) (\S+)$", page, re.MULTILINE))
        assert float(counts["self_judge_comparisons_total"]) == 3


def test_a_separate_policy_samples_and_the_judge_judges(saved_judge: Path, base: Path) -> None:
    with served(saved_judge, policy=str(base)) as here:
        answer = here.client.chat.completions.create(
            model=f"{base}:best-of-3", messages=MESSAGES, max_tokens=5, seed=1
        )
        assert answer.self_judge["judged"]["comparisons"] == 2


def test_a_short_request_does_not_wait_for_the_end_of_a_long_one(judge: Any) -> None:
    with gated(judge, Limits()) as here, ThreadPoolExecutor(2) as pool:
        long = body(4, 5, max_tokens=300, temperature=1.5, repetition_penalty=1.1, logprobs=True)
        alone = post(here.url, long).json()
        here.gate.slow = 0.005
        here.batches.clear()
        waiting = pool.submit(post, here.url, long)
        eventually(lambda: here.batches)
        begun = here.gate.passes
        short = [post(here.url, body(2, seed)) for seed in range(3)]
        assert [answer.status_code for answer in short] == [200] * 3
        assert not waiting.done()
        assert here.gate.passes - begun < 300
        # The long one was paused for the samples and the matches of each short one, ...
        assert len(here.batches) > 6
        here.gate.slow = 0
        assert waiting.result().json()["choices"][0]["message"] == alone["choices"][0]["message"]
        # ... and continued where it was.
        tokens = [
            [(entry["token"], round(entry["logprob"], 2)) for entry in given["content"]]
            for given in (a["choices"][0]["logprobs"] for a in (waiting.result().json(), alone))
        ]
        assert tokens[0] == tokens[1]

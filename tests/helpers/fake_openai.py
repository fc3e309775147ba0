"""A stand-in for an OpenAI-compatible endpoint, over a real model and its chat template."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import torch

from local_server import local_server
from self_judge import ChatEncoder


class FakeOpenAI:
    """Answers `/v1/chat/completions` as the API's reference describes it.

    Attributes:
        requests: the bodies of all requests, as they came.
        headers: the headers of all requests.
        failures: (status, headers) to answer next instead of doing what is asked.
        continues: whether an unfinished last message is continued, as by vLLM; else the parameters
            for it are refused, as by OpenAI.
        most: the largest `top_logprobs`.
        spell: how a token is spelled in an answer.
        change: changes an answer before it is sent.
    """

    def __init__(self, model: Any, encoder: ChatEncoder, name: str = "served") -> None:
        self.model, self.encoder, self.name = model, encoder, name
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.continues, self.most = True, 20
        self.names = [name]
        self.spell: Callable[[str], str] = str
        self.change: Callable[[Any], Any] = lambda answer: answer
        self.pause = 0.0
        self.url = ""
        self._lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        def refused(why: str) -> tuple[int, Any]:
            return 400, {"error": {"message": why, "type": "invalid_request_error"}}

        if body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist"}}
        known = {"model", "messages", "max_tokens", "temperature", "top_p", "logprobs"}
        flags = {"continue_final_message", "add_generation_prompt"}
        known |= {"top_logprobs"} | (flags if self.continues else set())
        if set(body) - known:
            return refused(f"Unrecognized request argument: {', '.join(set(body) - known)}")
        if body.get("top_logprobs", 0) > self.most:
            return refused(f"top_logprobs must be at most {self.most}")
        messages = body["messages"]
        if body.get("continue_final_message"):
            ids = self.encoder.encode_open(messages)
        else:
            ids = self.encoder.encode_prompt(messages)
        sampled: list[int] = []
        positions = []
        with self._lock, torch.no_grad():  # one model, and a thread per request
            while len(sampled) < body["max_tokens"]:
                row = self.model(torch.tensor([ids + sampled])).logits[0, -1].float()
                logprobs = row.log_softmax(-1)
                best = logprobs.topk(max(1, body.get("top_logprobs", 1)))
                tops = [
                    {"token": self.spell(self.encoder.tokenizer.decode([i])), "logprob": p}
                    for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ]
                positions.append({**tops[0], "top_logprobs": tops})
                sampled.append(int(best.indices[0]))
                if sampled[-1] in self.encoder.stop_token_ids:
                    break
        message = {"role": "assistant", "content": self.encoder.decode(sampled)}
        given = {"content": positions} if body.get("logprobs") else None
        choice = {"index": 0, "message": message, "logprobs": given}
        return 200, {"choices": [choice], "usage": {"completion_tokens": len(sampled)}}


def _handler(fake: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            with suppress(BrokenPipeError):  # the client did not wait
                self.end_headers()
                self.wfile.write(payload)

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            cards = {"object": "list", "data": [{"id": name} for name in fake.names]}
            self.reply(*((200, cards) if found else (404, {"detail": "Not Found"})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append(body)
            fake.headers.append(dict(self.headers))
            time.sleep(fake.pause)
            if fake.failures:
                status, headers = fake.failures.pop(0)
                return self.reply(status, {"error": {"message": "told to fail"}}, headers)
            if self.path != "/v1/chat/completions":
                return self.reply(404, {"detail": "Not Found"})
            status, answer = fake.complete(body)
            return self.reply(status, fake.change(answer) if status == 200 else answer)

    return Handler


@contextmanager
def serving(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    # The interpreter does not end within a forward pass.
    with local_server(_handler(fake), daemon=False) as url:
        fake.url = f"{url}/v1"
        yield fake

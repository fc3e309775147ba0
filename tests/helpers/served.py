"""A server of `self-judge serve` in a thread, on the loopback, and the client of OpenAI for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import uvicorn

from self_judge.judging.choice import JudgeChoice
from self_judge.serving.command import ServeJob, application

MESSAGES: list[Any] = [{"role": "user", "content": "what is it?"}]


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Runs an ASGI application and gives its URL."""
    options: Any = {"log_level": "critical", "lifespan": "on", "timeout_keep_alive": 300}
    config = uvicorn.Config(app, port=0, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def served(
    folder: Path, *, servers: Any = (), templates: str | None = None, **job: Any
) -> Iterator[SimpleNamespace]:
    """Serves a judge: `url`, `name`, and `client`, which validates strictly and never retries."""
    asked = ServeJob(**job)
    app = application(JudgeChoice(str(folder), templates, list(servers)), asked, asked.keys)
    with running(app.starlette()) as url:
        client = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key=job.get("api_key", "none"),
            max_retries=0,
            timeout=120,
            _strict_response_validation=True,
        )
        with client:
            name = job.get("policy") or str(folder)
            yield SimpleNamespace(url=url, name=name, client=client)


def streamed(chunks: Any) -> tuple[dict[int, str], list[Any]]:
    """The text of every choice of a stream, and the chunks."""
    texts: dict[int, str] = {}
    kept = list(chunks)
    for chunk in kept:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, kept

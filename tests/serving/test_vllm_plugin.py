"""The routes of `self-judge serve` inside `vllm serve`; a stand-in plays vLLM."""

from __future__ import annotations

import asyncio
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from starlette.applications import Starlette

from fake_vllm import FakeVLLM, serving
from self_judge.errors import ConfigError
from self_judge.serving.vllm_plugin import VARIABLE, SelfJudgePlugin
from served import MESSAGES, running, served


def arguments(folder: Path, url: str = "http://127.0.0.1:8000", **own: Any) -> SimpleNamespace:
    """What vLLM passes: its own arguments, as its command line fills them in."""
    at = urlsplit(url)
    usual = {"model": str(folder), "host": None, "port": at.port, "root_path": None}
    return SimpleNamespace(**{**usual, "uds": None, "ssl_keyfile": None, "api_key": None, **own})


def started(given: SimpleNamespace) -> Starlette:
    """An application with the plugin, as vLLM starts one."""
    (found,) = entry_points(group="vllm.endpoint_plugins", name="self_judge")
    plugin = found.load()()
    assert isinstance(plugin, SelfJudgePlugin)
    app = Starlette()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, given))
    return app


def test_vllm_answers_as_the_gateway_in_front_of_it(saved_judge: Path) -> None:
    asked: dict[str, Any] = {"messages": MESSAGES, "seed": 3, "max_tokens": 5}
    with serving(FakeVLLM()) as fake:
        with served(saved_judge, servers=[fake.url]) as gateway:
            asked["model"] = f"{gateway.name}:best-of-4"
            expected = gateway.client.chat.completions.create(**asked)
        with running(started(arguments(saved_judge, fake.url))) as url:
            client = openai.OpenAI(base_url=f"{url}/self_judge/v1", api_key="none", max_retries=0)
            with client:
                answer = client.chat.completions.create(**asked)
            assert httpx.get(f"{url}/self_judge/health").json() == {"status": "ok"}
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.usage == expected.usage


def test_every_key_of_vllm_opens_the_routes_and_no_other(saved_judge: Path) -> None:
    own = FakeVLLM()
    own.key = "one"
    with (
        serving(own) as fake,
        running(started(arguments(saved_judge, fake.url, api_key=["one", "two"]))) as url,
    ):
        models = f"{url}/self_judge/v1/models"
        statuses = [
            httpx.get(models, headers={"Authorization": f"Bearer {key}"}).status_code
            for key in ("one", "two", "three")
        ]
        assert statuses == [200, 200, 401]
        assert httpx.get(models).status_code == 401
        asked = {"model": str(saved_judge), "messages": MESSAGES, "max_tokens": 5}
        chat = f"{url}/self_judge/v1/chat/completions"
        for key, status in (("two", 200), ("three", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.post(chat, json=asked, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("options", "own", "told"),
    [
        ("--port 9000", {}, "SELF_JUDGE_SERVE: leave out --port, which is vLLM's own"),
        ("--vllm-server http://x:1", {}, "leave out --vllm-server"),
        ("--max-n 0", {}, "--max-n must be at least 1"),
        ("", {"ssl_keyfile": "key.pem"}, "leave out --uds and --ssl-keyfile"),
        ("", {"uds": "/run/vllm.sock"}, "leave out --uds and --ssl-keyfile"),
    ],
)
def test_options_that_cannot_be_used_end_the_start(
    options: str, own: dict[str, Any], told: str, saved_judge: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv(VARIABLE, options)
    with pytest.raises(ConfigError, match=told):
        started(arguments(saved_judge, **own))

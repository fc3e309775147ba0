"""`self-judge serve` as a process: where it listens, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from conftest import saved_as_judge
from self_judge.cli import main
from self_judge.serving.command import ServeJob
from served import MESSAGES, served


@contextmanager
def process(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "self_judge", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, **variables}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        said = ""
        assert server.stderr is not None
        for line in server.stderr:
            said += line
            if found := re.search(r"at (http://\S+)/v1", line):
                yield server, found[1]
                return
        raise AssertionError(said)
    finally:
        server.kill()
        server.communicate()


def test_sigterm_answers_what_has_begun_and_takes_nothing_new(tmp_path: Path) -> None:
    folder = saved_as_judge(tmp_path / "judge")
    key = "a-long-key-of-this-test"
    with process(str(folder), "--max-concurrency", "2", SELF_JUDGE_API_KEY=key) as (server, url):
        header = {"Authorization": f"Bearer {key}"}
        long = {"model": f"{folder}:best-of-16", "messages": MESSAGES, "max_tokens": 450, "seed": 1}

        def post(stream: bool) -> httpx.Response:
            content = {**long, "stream": stream}
            return httpx.post(
                f"{url}/v1/chat/completions", json=content, headers=header, timeout=120
            )

        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(post, stream) for stream in (False, True, False, True)]
            while "present 4.0" not in httpx.get(f"{url}/metrics", headers=header).text:
                pass
            server.send_signal(signal.SIGTERM)
            whole = [future.result() for future in answers]
        assert [answer.status_code for answer in whole] == [200] * 4
        assert len(whole[0].json()["choices"][0]["message"]["content"]) > 100
        assert whole[1].text.endswith("data: [DONE]\n\n")
        assert server.wait(60) == 0
        assert server.stderr is not None
        assert key not in server.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_server_for_other_machines_needs_a_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved_judge: Path
) -> None:
    monkeypatch.delenv("SELF_JUDGE_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        assert main(["serve", str(saved_judge), "--host", host]) == 2
        assert "give a key in the environment variable" in capsys.readouterr().err
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert not ServeJob(host=host).keys
    assert ServeJob(host="0.0.0.0", api_key="k").keys == ["k"]
    monkeypatch.setenv("SELF_JUDGE_API_KEY", "from the environment")
    assert ServeJob(host="0.0.0.0").keys == ["from the environment"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-n", "0"], "--max-n must be at least 1"),
        (["--queue", "-1"], "--queue must be at least 0"),
        (["--deadline", "nan"], "--deadline must be a number of seconds"),
        (["--deadline", "0"], "--deadline must be a number of seconds"),
        (["--policy", "nowhere/at/all"], "nowhere/at/all: there is no such folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, saved_judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(saved_judge), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_a_missing_extra_is_named(
    saved_judge: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = "self_judge.serving.command.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "starlette" else True)
    assert main(["serve", str(saved_judge)]) == 2
    message = "serve requires starlette: run pip install 'self-judge[serve]'"
    assert message in capsys.readouterr().err


def test_another_client_is_answered_as_well(
    saved_judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client, which does not use OpenAI's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with served(saved_judge) as here:
        client: Any = InferenceClient(base_url=f"{here.url}/v1")
        given: Any = {"model": f"{here.name}:best-of-4", "max_tokens": 8, "seed": 3}
        answer = client.chat_completion(MESSAGES, **given)
        text = answer.choices[0].message.content
        expected = here.client.chat.completions.create(messages=MESSAGES, **given)
        assert text == expected.choices[0].message.content
        chunks = client.chat_completion(MESSAGES, **given, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
        with pytest.raises(Exception, match="temperature must be 0 or a positive number") as error:
            client.chat_completion(MESSAGES, **given, temperature=-1)
        assert json.loads(error.value.response.text)["error"]["param"] == "temperature"


def test_a_judge_that_is_not_one_model_is_refused_by_name(
    tmp_path: Path, saved_judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member = {"model": str(saved_judge)}
    judges = [
        {"panel": [member, member]},
        {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "templates": "instructions"},
    ]
    for number, judge in enumerate(judges):
        file = tmp_path / f"judge-{number}.yaml"
        file.write_text(json.dumps(judge))
        capsys.readouterr()
        assert main(["serve", str(file)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{file}: is a file; give a model's folder" in line

"""Bodies that no client sends: each is answered, and none with a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import saved_as_judge
from served import MESSAGES, served

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**40, -(10**400), 1e308, -0.0, 0.5, float("nan")),
    *(float("inf"), "", "x", "\0", "\ud800", "‮", "😀" * 50, "<|im_end|>", "<think>", "x" * 9999),
    *([], [None], [[]], [1, "x"], {}, {"n": 2}, {"role": "user"}, {"": {}}, [{}] * 50),
    *([{"type": "text", "text": "x"}], [{"type": "image_url"}], ["x"] * 30, MESSAGES * 40),
]
CHAT: dict[str, Any] = {
    "model": "NAME",
    "messages": [{"role": "system", "content": "x"}, *MESSAGES],
    "n": 2,
    "seed": 1,
    "max_tokens": 2,
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 5,
    "stop": ["z"],
    "logprobs": True,
    "top_logprobs": 2,
    "stream": False,
    "self_judge": {"n": 3, "brackets": True, "deadline_ms": 60000},
}
JUDGE: dict[str, Any] = {"model": "NAME", "context": "x", "responses": ["y", "z", "y"]}


def changed(random: random.Random, given: Any) -> Any:
    """The value with something odd somewhere in it."""
    value = copy.deepcopy(given)
    if not isinstance(value, dict | list) or not value or random.random() < 0.25:
        return random.choice(ODD)
    place = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if random.random() < 0.15:
        del value[place]
    else:
        value[place] = changed(random, value[place])
    if isinstance(value, dict) and random.random() < 0.1:
        value[random.choice(["x", "tools", "response_format", "stream_options", "user"])] = (
            random.choice(ODD)
        )
    return value


def bodies(count: int, name: str) -> Iterator[tuple[str, bytes]]:
    draw = random.Random(7)
    for i in range(count):
        path, given = draw.choice([("chat/completions", CHAT), ("judge", JUDGE)])
        given = json.loads(json.dumps(given).replace("NAME", name))
        for _ in range(draw.randint(1, 3)):
            given = changed(draw, given)
        content = json.dumps(given).encode()
        if i % 10 == 0:  # bytes that are not JSON
            at = draw.randrange(len(content) + 1)
            content = content[:at] + draw.randbytes(draw.randint(0, 3)) + content[at + 2 :]
        if i % 50 == 1:
            content = draw.choice(
                [b"", b"[" * 5000, b'{"a":1,"a":2}', b"\xff\xfe", b"nul", b"1" * 9999]
            )
        yield path, content


def test_a_thousand_odd_bodies_are_answered_with_json_and_no_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_as_judge(tmp_path / "judge")
    statuses: dict[int, int] = {}
    with served(folder, max_n=4) as here, httpx.Client(timeout=60) as client:
        for path, content in bodies(1000, here.name):
            answer = client.post(
                f"{here.url}/v1/{path}",
                content=content,
                headers={"Content-Type": "application/json"},
            )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404, 504), (content[:300], answer.text[:300])
            if answer.headers["Content-Type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n")
                continue
            body = answer.json()
            assert ("error" in body) == (answer.status_code != 200)
            if "error" in body:
                assert set(body["error"]) == {"message", "type", "param", "code"}
                assert body["error"]["message"]
            assert "Traceback" not in answer.text
            assert 'File "' not in answer.text
    assert min(statuses[200], statuses[400]) > 50
    assert not caplog.records

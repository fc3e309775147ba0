"""Many clients at once: every request is answered, with its own answer, in constant memory."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import saved_as_judge
from served import served

KINDS = 24  # different requests


def request(name: str, kind: int) -> dict[str, Any]:
    """One of the requests: plain or by tournament, streamed or not, of different lengths."""
    return {
        "model": name if kind % 4 == 0 else f"{name}:best-of-{2 + kind % 3}",
        "messages": [{"role": "user", "content": f"what is {kind}?" + " and" * (kind % 7)}],
        "seed": kind,
        "max_tokens": 2 + kind % 6,
        "temperature": 1 + kind % 2,
        "stream": kind % 5 == 0,
    }


def text(answer: httpx.Response) -> str:
    import json

    if not answer.headers["Content-Type"].startswith("text/event-stream"):
        return str(answer.json()["choices"][0]["message"]["content"])
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def resident() -> int:
    """The bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("count", [240, pytest.param(2000, marks=pytest.mark.slow)])
def test_64_clients_lose_and_mix_nothing_through_a_bounded_queue(
    count: int, tmp_path: Path
) -> None:
    folder = saved_as_judge(tmp_path / "judge")
    refused = 0
    memory: list[int] = []
    with (
        served(folder, max_concurrency=24, queue=24) as here,
        httpx.Client(timeout=300, limits=httpx.Limits(max_connections=64)) as client,
    ):

        def ask(kind: int) -> str:
            nonlocal refused
            while True:
                answer = client.post(
                    f"{here.url}/v1/chat/completions", json=request(here.name, kind)
                )
                if answer.status_code == 200:
                    return text(answer)
                assert answer.status_code == 429, answer.text
                assert int(answer.headers["Retry-After"]) >= 1
                refused += 1
                time.sleep(0.1)  # sooner than it was told to

        alone = [ask(kind) for kind in range(KINDS)]
        assert len(set(alone)) > KINDS / 2
        with ThreadPoolExecutor(64) as pool:
            for part in range(4):  # in four parts, to see whether the memory grows
                numbers = range(part * count // 4, (part + 1) * count // 4)
                answers = list(pool.map(lambda i: ask(i % KINDS), numbers))
                assert answers == [alone[i % KINDS] for i in numbers]
                memory.append(resident())
        page = client.get(f"{here.url}/metrics").text
    assert refused
    assert f'status="200"}} {float(count + KINDS)}' in page
    assert f"self_judge_requests_refused_total {float(refused)}" in page
    assert "self_judge_requests_present 0.0" in page
    assert memory[3] - memory[1] < 48 << 20, memory

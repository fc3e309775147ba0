"""Best of N over HTTP: against the tournament command, and against one request at a time.

All sides answer the same prompts with one model in this process, by turns: the function of the
command `tournament` on all prompts at once; `serve` for concurrent clients; and `serve` with
`--max-concurrency 1` for the same clients. Clients and server share the process, so its processor
time includes that of the clients; on a busy machine, only this time can be compared.

    python benchmarks/serve.py [--model DIR] [--prompts 48] [--n 4] [--tokens 24] [--clients 16]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
import uvicorn

from self_judge.commands.tournament import Entry, TournamentJob
from self_judge.config.self_training import SamplingSettings
from self_judge.data.sources import load_preferences
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.judge import Judge
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.serving.app import App
from self_judge.serving.engine import Limits, Metrics, ServingEngine
from self_judge.serving.in_process import InProcess

ROOT = Path(__file__).parents[1]


@contextmanager
def serving(judge: Judge, limits: Limits) -> Iterator[str]:
    """A server of the judge on the loopback; gives its URL."""
    model: Any = judge.model
    engine = ServingEngine(InProcess(judge, model, judge.encoder), limits, Metrics())
    app = App(engine, "model").starlette()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def main() -> None:
    """Times all sides by turns, after one turn to warm up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "outputs/real/smollm2"), help="a folder")
    parser.add_argument("--templates", help="as of the commands; needed without judge.json")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hh-rlhf")
    for name, value in (("prompts", 48), ("n", 4), ("tokens", 24), ("clients", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    path = str(given.data / "base_test_1000.jsonl.gz")
    records = load_preferences(path, max_records=20 * given.prompts).records
    short = [r for r in records if len(dialogue_text(r.prompt)) < 300][: given.prompts]
    asked = [[dict(message) for message in record.prompt] for record in short]
    choice = JudgeChoice(given.model, given.templates)
    job = TournamentJob(choice, SamplingSettings(given.tokens, top_p=0.9), n=given.n)
    judge: Any = choice.load()
    play = job.load()
    entries = [
        Entry({}, number + 1, dialogue_text(prompt), None, prompt)  # type: ignore[arg-type]
        for number, prompt in enumerate(asked)
    ]
    with ExitStack() as stack:
        together = stack.enter_context(serving(judge, Limits()))
        singly = stack.enter_context(serving(judge, Limits(max_concurrency=1)))
        client = stack.enter_context(httpx.Client(timeout=3600))
        pool = stack.enter_context(ThreadPoolExecutor(given.clients))

        def ask(url: str) -> None:
            def one(numbered: tuple[int, Any]) -> None:
                number, prompt = numbered
                body = {"model": f"model:best-of-{given.n}", "messages": prompt, "top_p": 0.9,
                        "max_tokens": given.tokens, "seed": number}  # fmt: skip
                client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()

            list(pool.map(one, enumerate(asked)))

        sides: dict[str, Callable[[], Any]] = {
            "tournament command": lambda: play(entries),
            f"serve, {given.clients} clients": lambda: ask(together),
            "serve, one request at a time": lambda: ask(singly),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for turn in range(given.rounds + 1):
            for name, work in sides.items():
                begun = time.perf_counter(), time.process_time()
                work()
                spent = time.perf_counter() - begun[0], time.process_time() - begun[1]
                seconds[name] += [spent] if turn else []
    print(f"{len(asked)} prompts, best of {given.n}, {given.tokens} tokens: {given.model}, "
          f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    for place, clock in enumerate(("wall clock", "processor")):
        medians = [statistics.median(own[place] for own in s) for s in seconds.values()]
        for name, own in seconds.items():
            times = [both[place] for both in own]
            rate = len(asked) / statistics.median(times)
            print(
                f"  {name:<28} {rate:7.2f} prompts/s ({min(times):.2f}–{max(times):.2f} s, {clock})"
            )
        command, served, single = medians
        print(f"  serve / command {command / served:.2f}; "
              f"serve / one at a time {single / served:.2f} ({clock})")  # fmt: skip


if __name__ == "__main__":
    main()

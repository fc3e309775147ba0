"""`self-judge serve` answers HTTP requests by one sample or by a tournament.

This module loads the models, checks who may reach the server, and runs it until it is told to stop.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from self_judge.adapters import adapter_config, fingerprint
from self_judge.commands.policies import encoder_of
from self_judge.console import Terminal, say
from self_judge.errors import ConfigError
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.judge import Judge
from self_judge.models import load_model

if TYPE_CHECKING:
    from self_judge.serving.app import App
    from self_judge.serving.work import Backend

_PACKAGES = ("starlette", "uvicorn", "httpx", "prometheus_client")
KEY_VARIABLE = "SELF_JUDGE_API_KEY"


@dataclass(frozen=True)
class ServeJob:
    """What a server samples from, where it listens and what it takes on.

    Args:
        policy: the model to sample from; default: the judge. With servers, a LoRA adapter of the
            judge, which they load.
        host, port: where the server listens. Port 0 is any free port.
        api_key: the key that requests must have; default: the environment's SELF_JUDGE_API_KEY.
        server_key: the key that the servers of the judge require, if they do.
        max_n, max_concurrency, queue, deadline: see `engine.Limits`.

    Raises:
        ConfigError: a number is too small, or the server would be open to other machines without a
            key.
    """

    policy: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    server_key: str | None = None
    max_n: int = 16
    max_concurrency: int = 64
    queue: int = 256
    deadline: float = 600.0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("--port", self.port, 0),
            ("--max-n", self.max_n, 1),
            ("--max-concurrency", self.max_concurrency, 1),
            ("--queue", self.queue, 0),
        ):
            if value < least:
                raise ConfigError(f"{option} must be at least {least}, got {value}")
        if not 0 < self.deadline < float("inf"):
            raise ConfigError(f"--deadline must be a number of seconds, got {self.deadline}")
        if not is_loopback(self.host) and not self.keys:
            raise ConfigError(
                f"--host {self.host} opens the server to other machines: give a key in the "
                f"environment variable {KEY_VARIABLE} (or --api-key), or leave --host out"
            )

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.api_key or os.environ.get(KEY_VARIABLE),) if key]


def run_serve(choice: JudgeChoice, job: ServeJob, console: Console | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that have begun are answered first.

    Raises:
        ConfigError: a package is missing.
        ValueError: a model cannot be used.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve requires {', '.join(missing)}: run pip install 'self-judge[serve]'"
        )
    import uvicorn

    config = uvicorn.Config(
        application(choice, job, job.keys).starlette(),
        host=job.host,
        port=job.port,
        log_level="warning",
        lifespan="on",
        server_header=False,
        timeout_keep_alive=75,  # longer than that of proxies, so that they close first
    )
    shown = console or Terminal(stderr=True)

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                at = self.servers[0].sockets[0].getsockname()
                host = f"[{at[0]}]" if ":" in at[0] else at[0]
                say(shown, f"serving {served_name(choice, job)} at http://{host}:{at[1]}/v1")

    # uvicorn drains on SIGTERM and then raises it again; the process ends normally instead.
    signal.signal(signal.SIGTERM, lambda *_: None)
    logging.getLogger("self_judge").setLevel(logging.INFO)
    Server(config).run()


def application(choice: JudgeChoice, job: ServeJob, keys: Sequence[str]) -> App:
    """Loads the models and returns the routes. Requests must have one of the keys, if any."""
    from self_judge.serving.app import App
    from self_judge.serving.engine import Limits, Metrics, ServingEngine

    metrics = Metrics()
    limits = Limits(job.max_n, job.max_concurrency, job.queue, job.deadline)

    def on_batch(kind: str, size: int) -> None:
        metrics.batch.labels(kind).observe(size)

    engine = ServingEngine(_backend(choice, job, on_batch), limits, metrics)
    return App(engine, served_name(choice, job), keys)


def served_name(choice: JudgeChoice, job: ServeJob) -> str:
    """Returns the name that requests give as `model`: the policy's, as given."""
    return (job.policy or str(choice.model)).rstrip("/")


def _backend(choice: JudgeChoice, job: ServeJob, on_batch: Callable[[str, int], object]) -> Backend:
    if choice.servers:
        return _replicas(choice, job)
    from self_judge.serving.in_process import InProcess

    judge = _judge(choice)
    if job.policy is None:
        return InProcess(judge, judge.model, judge.encoder, on_batch=on_batch)
    policy = load_model(job.policy, device="auto", dtype=choice.dtype)
    return InProcess(judge, policy, encoder_of(job.policy), on_batch=on_batch)


def _replicas(choice: JudgeChoice, job: ServeJob) -> Backend:
    from self_judge.serving.replicas import Replicas, VLLMReplicas

    adapter: dict[str, Any] = {}
    if job.policy is not None:
        if adapter_config(job.policy) is None:
            raise ConfigError(
                f"--policy {job.policy} is not a LoRA adapter: with --vllm-server, the replicas "
                "load the policy as an adapter of MODEL. Serve a whole model as MODEL itself"
            )
        name = f"self-judge-{fingerprint(job.policy)}"  # other weights have another name
        adapter = {"adapter": Path(job.policy), "adapter_name": name}
    timeout, key = job.deadline, job.server_key
    engine: Any = VLLMReplicas(choice.servers, request_timeout=timeout, key=key, **adapter)
    judge = _judge(choice, engine)
    encoder = judge.encoder if job.policy is None else encoder_of(job.policy)
    return Replicas(engine, judge, encoder, job.max_concurrency)


def _judge(choice: JudgeChoice, engine: Any = None) -> Judge:
    judge = choice.load(engine)
    assert isinstance(judge, Judge), "the command takes one MODEL, and neither panels nor endpoints"
    return judge


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

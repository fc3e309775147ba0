"""VLLMServers: one or more replicas of `vllm serve`, used as one engine (TRL's `server` mode).

This module uses vLLM's HTTP endpoints and does not need vLLM in its own process. It does not depend
on the meaning of the prompts.
"""

from __future__ import annotations

import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from self_judge.config.self_training import SamplingSettings
from self_judge.console import neutral
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.vllm.protocol import (
    SamplingRequest,
    request_parameters,
    scoring_parameters,
)

logger = logging.getLogger(__name__)

WorkT = TypeVar("WorkT")

_SHARD_BYTES = 4 << 30
_TRIES = 4
_BUSY = (429, 502, 503, 504)  # temporary failures; all others are permanent


class ServerDownError(EngineError):
    """Raised when a server does not answer."""


class VLLMServers:
    """Uses one or more `vllm serve` replicas of a model as a single engine.

    Requests go to any replica with free capacity. If a replica stops answering, a warning is
    logged, it receives no more requests, and the other replicas take over its work. If no replica
    is left, an error is raised.

    Args:
        urls: the URLs of the servers, `http://host:port`.
        timeout: the maximum number of seconds to wait for the servers to start.
        request_timeout: the maximum number of seconds for a request.
        concurrency: the number of concurrent requests per server.
        prompts_per_request: the number of judge prompts in a request. Prompts in the same request
            can share prefixes on the server.
        sync_dir: a folder for weights that this process and the servers can access under the same
            path.
        retry_wait: the number of seconds before the first retry of a failed request. The wait
            doubles with each retry.

    Raises:
        EngineError: the requests package is missing, no URL is given, a server does not answer in
            time, or the servers serve different models.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float = 240.0,
        request_timeout: float = 3600.0,
        concurrency: int = 64,
        prompts_per_request: int = 32,
        sync_dir: str | Path | None = None,
        retry_wait: float = 1.0,
    ) -> None:
        if find_spec("requests") is None:
            raise EngineError(
                "vllm_mode=server requires the requests package: pip install requests"
            )
        if not urls:
            raise EngineError("vllm_mode=server needs vllm_server_base_url: a URL or a list")
        self.concurrency = concurrency
        self.prompts_per_request = prompts_per_request
        self.sync_dir = sync_dir
        self.servers = [
            _Server(url.rstrip("/"), concurrency, request_timeout, retry_wait) for url in urls
        ]
        deadline = time.monotonic() + timeout
        for server in self.servers:
            server.wait_until_up(deadline)
        lengths = {server.max_model_length for server in self.servers}
        roots = {server.root for server in self.servers}
        if len(roots) > 1:
            raise EngineError(f"the servers serve different models: {', '.join(sorted(roots))}")
        self.max_model_length = min(lengths)

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        settings: SamplingSettings,
        stop: Sequence[int],
        adapter: str | None,
        done: Done,
    ) -> list[list[int]]:
        """See `Engine.sample`."""
        common = {**request_parameters(settings, stop), "return_token_ids": True}

        def one(server: _Server, request: SamplingRequest) -> list[int]:
            (choice,) = server.complete(
                {**common, "prompt": list(request.prompt), "seed": request.seed}, adapter
            )
            if choice.get("token_ids") is None:
                raise EngineError(f"{server.url} returns no token ids: it needs vLLM 0.28 or newer")
            return list(choice["token_ids"])

        return self._shared_out(one, list(requests), lambda _: done(1))

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """See `Engine.next_token_logprobs`."""
        common = {**scoring_parameters(token_ids), "return_tokens_as_token_ids": True}

        def some(server: _Server, chunk: Sequence[Sequence[int]]) -> list[list[float]]:
            choices = server.complete({**common, "prompt": [list(p) for p in chunk]}, adapter)
            if len(choices) != len(chunk):
                raise EngineError(
                    f"{server.url} answered {len(choices)} of the {len(chunk)} prompts in a request"
                )
            choices = sorted(choices, key=lambda choice: choice["index"])
            return [_logprobs(choice, token_ids, server.url) for choice in choices]

        size = self.prompts_per_request
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        answers = self._shared_out(some, chunks, lambda chunk: done(len(chunk)))
        return [row for rows in answers for row in rows]

    def load_adapter(self, name: str, folder: Path) -> None:
        """See `Engine.load_adapter`. Every server must have access to the folder."""
        self._everywhere(
            lambda server: server.post(
                "/v1/load_lora_adapter",
                {"lora_name": name, "lora_path": str(folder)},
                absent="start the server with --enable-lora, and set "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
            )
        )

    def remove_adapter(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        self._everywhere(lambda s: s.post("/v1/unload_lora_adapter", {"lora_name": name}))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`. Writes temporary files with the weights to `sync_dir`."""
        folder = Path(tempfile.mkdtemp(prefix="self-judge-weights-", dir=self.sync_dir))
        try:
            _save_shards(weights, folder)
            self._everywhere(
                lambda server: server.post(
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
                    absent="set VLLM_SERVER_DEV_MODE=1 in the server's environment, so that it "
                    "accepts new weights",
                )
            )
            self._everywhere(lambda server: server.post("/reset_prefix_cache", {}))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sleep(self) -> None:
        """Does nothing, because a server does not share its accelerator with training."""

    def wake_up(self) -> None:
        """Does nothing, because a server never sleeps."""

    def _alive(self) -> list[_Server]:
        alive = [server for server in self.servers if server.down is None]
        if not alive:
            raise ServerDownError(
                "all vLLM servers have stopped answering: "
                + "; ".join(f"{s.url}: {s.down}" for s in self.servers)
                + ". Start them again and resume from the last checkpoint"
            )
        return alive

    def _everywhere(self, call: Callable[[_Server], object]) -> None:
        """Calls every server that is up. A server that does not answer gets no more requests."""
        for server in self._alive():
            try:
                call(server)
            except ServerDownError as error:
                server.leave_out(error)
        self._alive()

    def _shared_out(
        self,
        call: Callable[[_Server, WorkT], Any],
        work: Sequence[WorkT],
        done: Callable[[WorkT], object],
    ) -> list[Any]:
        """Runs `call` for each item of work on any free server; returns the answers in order."""
        answers: list[Any] = [None] * len(work)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(work)):
            todo.put(place)
        left = len(work)
        failures: list[BaseException] = []
        lock = threading.Lock()

        def serve(server: _Server) -> None:
            nonlocal left
            while server.down is None and not failures:
                try:
                    place = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers[place] = call(server, work[place])
                except ServerDownError as error:
                    todo.put(place)
                    server.leave_out(error)
                    return
                except BaseException as error:
                    failures.append(error)
                    return
                with lock:
                    left -= 1
                    done(work[place])

        # If a server stops answering, its work returns to the queue, possibly after all other
        # workers have finished. Therefore, start new workers until no work is left.
        while left and not failures:
            alive = self._alive()
            # Each server gets the same number of workers. Otherwise, the first server would get all
            # the work of a small job.
            each = min(self.concurrency, -(-left // len(alive)))
            workers = [
                threading.Thread(target=serve, args=(server,), daemon=True)
                for _ in range(each)
                for server in alive
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        if failures:
            raise failures[0]
        return answers


class _Server:
    """A `vllm serve` process: its address, its model and its state."""

    def __init__(self, url: str, connections: int, timeout: float, retry_wait: float) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        self.url = url
        self.timeout = timeout
        self.retry_wait = retry_wait
        self.down: str | None = None
        self._lock = threading.Lock()
        self.model = self.root = ""
        self.max_model_length = 0
        self._session = requests.Session()
        self._session.trust_env = False  # do not use a proxy for local servers
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def wait_until_up(self, deadline: float) -> None:
        """Waits until the server answers, and reads the name of its model."""
        import requests

        while True:
            try:
                response = self._session.get(f"{self.url}/v1/models", timeout=10)
                if response.status_code == 200:
                    break
                why = f"HTTP {response.status_code}"
            except requests.RequestException as error:
                why = _reason(error)
            if time.monotonic() >= deadline:
                raise ServerDownError(
                    f"no vLLM server answers at {self.url} ({why}): start `vllm serve` there, or "
                    "correct vllm_server_base_url"
                )
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        cards = response.json()["data"]
        base = next((card for card in cards if not card.get("parent")), None)
        if base is None or not base.get("max_model_len"):
            raise EngineError(f"{self.url} lists no base model at /v1/models: is it a vLLM server?")
        self.model, self.root = base["id"], base.get("root") or base["id"]
        self.max_model_length = int(base["max_model_len"])

    def complete(self, body: dict[str, Any], adapter: str | None) -> list[dict[str, Any]]:
        """Returns the choices from a completion request."""
        response = self.post("/v1/completions", {**body, "model": adapter or self.model})
        return list(response.json()["choices"])

    def post(self, path: str, body: dict[str, Any], absent: str | None = None) -> Any:
        """Sends a POST request, and retries if the server is busy or the connection breaks.

        Raises:
            ServerDownError: the server did not answer after several attempts.
            EngineError: the server rejected the request. `absent` tells how to enable a missing
                endpoint.
        """
        import requests

        why = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.retry_wait * 2 ** (attempt - 1))
            try:
                response = self._session.post(
                    f"{self.url}{path}", json=body, timeout=(10, self.timeout)
                )
            except requests.RequestException as error:
                why = _reason(error)
                continue
            if response.status_code == 200:
                return response
            why = f"HTTP {response.status_code}: {_message(response)}"
            if response.status_code not in _BUSY:
                break
        else:
            raise ServerDownError(f"{path} failed {_TRIES} times; last error: {why}")
        if response.status_code in (404, 405) and absent and "does not exist" not in why:
            raise EngineError(f"{self.url} has no {path}: {absent}")
        raise EngineError(f"{self.url} rejected a request to {path}: {why}")

    def leave_out(self, error: Exception) -> None:
        """Stops sending requests to this server."""
        with self._lock:
            if self.down is None:
                self.down = str(error)
                told = neutral(f"{self.url} gets no more requests: {error}")
                logger.warning("vLLM server %s", told)


def _logprobs(choice: dict[str, Any], token_ids: Sequence[int], url: str) -> list[float]:
    """Returns the log-probabilities of the given tokens at the first position in a choice."""
    top = choice["logprobs"]["top_logprobs"][0]
    try:
        return [float(top[f"token_id:{token}"]) for token in token_ids]
    except KeyError as error:
        raise EngineError(
            f"{url} does not return the log-probability of {error}: it needs vLLM 0.28 or newer "
            "(logprob_token_ids)"
        ) from error


def _save_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    for number, shard in enumerate(_shards(weights)):
        save_file(shard, folder / f"model-{number:05d}.safetensors")


def _shards(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _message(response: Any) -> str:
    """Returns vLLM's reason for an error: its `error.message`, or the text of the response."""
    try:
        body = response.json()
    except ValueError:
        return str(response.text)[:300].strip()
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _reason(error: Exception) -> str:
    """Returns the innermost cause of a failed request, on one line."""
    inner: BaseException = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__  # type: ignore[assignment]
    return f"{type(inner).__name__}: {str(inner).splitlines()[0] if str(inner) else 'no details'}"

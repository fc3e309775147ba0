"""VLLMServers: one or more replicas of `vllm serve`, used as one engine (TRL's `server` mode).

This module uses vLLM's HTTP endpoints and does not need vLLM in its own process. It does not depend
on the meaning of the prompts.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from self_judge.config.self_training import SamplingSettings
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.vllm.protocol import (
    SamplingRequest,
    request_parameters,
    scoring_parameters,
)
from self_judge.inference.vllm.server import (
    Server,
    ServerDownError,
    letter_logprobs,
    sampled_ids,
)

WorkT = TypeVar("WorkT")

_SHARD_BYTES = 4 << 30


class VLLMServers:
    """Uses one or more `vllm serve` replicas of a model as a single engine.

    Requests go to any replica with free capacity. If a replica stops answering, a warning is
    logged, it receives no more requests, and the other replicas take over its work. If no replica
    is left, an error is raised.

    Args:
        urls: the URLs of the servers, `http://host:port`.
        timeout: the maximum number of seconds to wait for the servers to start.
        request_timeout: the maximum number of seconds for a request, until its answer is complete.
        concurrency: the number of concurrent requests per server.
        prompts_per_request: the number of judge prompts in a request. Prompts in the same request
            can share prefixes on the server.
        vocabulary: the number of token ids of the model, if known. Other ids are rejected.
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
        vocabulary: int | None = None,
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
        self.vocabulary = vocabulary
        self.sync_dir = sync_dir
        self.servers = [
            Server(url.rstrip("/"), concurrency, request_timeout, retry_wait) for url in urls
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

        def one(server: Server, request: SamplingRequest) -> list[int]:
            body = {**common, "prompt": list(request.prompt), "seed": request.seed}
            return server.complete(body, adapter, 1, read)[0]

        def read(choice: Mapping[str, Any], url: str) -> list[int]:
            return sampled_ids(choice, url, settings.max_new_tokens, self.vocabulary)

        return self._shared_out(one, list(requests), lambda _: done(1))

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """See `Engine.next_token_logprobs`."""
        common = {**scoring_parameters(token_ids), "return_tokens_as_token_ids": True}

        def some(server: Server, chunk: Sequence[Sequence[int]]) -> list[list[float]]:
            body = {**common, "prompt": [list(p) for p in chunk]}
            return server.complete(body, adapter, len(chunk), read)

        def read(choice: Mapping[str, Any], url: str) -> list[float]:
            return letter_logprobs(choice, token_ids, url)

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

    def _alive(self) -> list[Server]:
        alive = [server for server in self.servers if server.down is None]
        if not alive:
            raise ServerDownError(
                "all vLLM servers have stopped answering: "
                + "; ".join(f"{s.shown}: {s.down}" for s in self.servers)
                + ". Start them again and resume from the last checkpoint"
            )
        return alive

    def _everywhere(self, call: Callable[[Server], object]) -> None:
        """Calls every server that is up. A server that does not answer gets no more requests."""
        for server in self._alive():
            try:
                call(server)
            except ServerDownError as error:
                server.leave_out(error)
        self._alive()

    def _shared_out(
        self,
        call: Callable[[Server, WorkT], Any],
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

        def serve(server: Server) -> None:
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

"""VLLMServers: one or more replicas of `vllm serve`, used as one engine (TRL's `server` mode).

This module uses vLLM's HTTP endpoints and does not need vLLM in its own process. It does not depend
on the meaning of the prompts.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from self_judge.config.self_training import SamplingSettings
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.remote.replicas import Replicas
from self_judge.inference.remote.server import Server, ServerDownError, say_waiting
from self_judge.inference.vllm.answers import base_model, letter_logprobs, sampled_ids
from self_judge.inference.vllm.protocol import (
    SamplingRequest,
    request_parameters,
    scoring_parameters,
)

_PATH = "/v1/completions"
_SHARD_BYTES = 4 << 30


class VLLMServer(Server):
    """A `vllm serve` process: its address, its model and its state."""

    model = root = ""
    max_model_length = 0

    def wait_until_up(self, deadline: float) -> None:
        """Waits until the server answers, and reads the name of its model."""
        told = False
        while True:
            left = deadline - time.monotonic()
            status, content, why = self.get("/v1/models", min(10.0, max(0.1, left)))
            if status == 200:
                break
            if time.monotonic() >= deadline:
                raise ServerDownError(
                    f"no vLLM server answers at {self.shown} ({why}): start `vllm serve` there, or "
                    "correct vllm_server_base_url"
                )
            if not told:
                told = True
                say_waiting(self.shown, why, deadline)
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
        self.model, self.root, self.max_model_length = base_model(content, self.shown)


class VLLMServers(Replicas[VLLMServer]):
    """Uses one or more `vllm serve` replicas of a model as a single engine.

    If no replica is left, an error is raised (see `Replicas`).

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
        EngineError: a package is missing, no URL is given, a server does not answer in time, or the
            servers serve different models.
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
        if not urls:
            raise EngineError("vllm_mode=server needs vllm_server_base_url: a URL or a list")
        servers = [
            VLLMServer(url.rstrip("/"), concurrency, request_timeout, retry_wait) for url in urls
        ]
        super().__init__(servers, concurrency)
        self.prompts_per_request = prompts_per_request
        self.vocabulary = vocabulary
        self.sync_dir = sync_dir
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

        def one(server: VLLMServer, request: SamplingRequest) -> list[int]:
            body = {**common, "prompt": list(request.prompt), "seed": request.seed}
            return server.choices(_PATH, {**body, "model": adapter or server.model}, 1, read)[0]

        def read(choice: Mapping[str, Any], url: str) -> list[int]:
            return sampled_ids(choice, url, settings.max_new_tokens, self.vocabulary)

        return self.shared_out(one, list(requests), lambda _: done(1))

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """See `Engine.next_token_logprobs`."""
        common = {**scoring_parameters(token_ids), "return_tokens_as_token_ids": True}

        def some(server: VLLMServer, chunk: Sequence[Sequence[int]]) -> list[list[float]]:
            body = {**common, "prompt": [list(p) for p in chunk]}
            body["model"] = adapter or server.model
            return server.choices(_PATH, body, len(chunk), read)

        def read(choice: Mapping[str, Any], url: str) -> list[float]:
            return letter_logprobs(choice, token_ids, url)

        size = self.prompts_per_request
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        answers = self.shared_out(some, chunks, lambda chunk: done(len(chunk)))
        return [row for rows in answers for row in rows]

    def load_adapter(self, name: str, folder: Path) -> None:
        """See `Engine.load_adapter`. Every server must have access to the folder."""
        self.everywhere(
            lambda server: server.post(
                "/v1/load_lora_adapter",
                {"lora_name": name, "lora_path": str(folder)},
                absent="start the server with --enable-lora, and set "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
            )
        )

    def remove_adapter(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        self.everywhere(lambda s: s.post("/v1/unload_lora_adapter", {"lora_name": name}))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`. Writes temporary files with the weights to `sync_dir`."""
        folder = Path(tempfile.mkdtemp(prefix="self-judge-weights-", dir=self.sync_dir))
        try:
            _save_shards(weights, folder)
            self.everywhere(
                lambda server: server.post(
                    "/collective_rpc",
                    {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
                    absent="set VLLM_SERVER_DEV_MODE=1 in the server's environment, so that it "
                    "accepts new weights",
                )
            )
            self.everywhere(lambda server: server.post("/reset_prefix_cache", {}))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sleep(self) -> None:
        """Does nothing, because a server does not share its accelerator with training."""

    def wake_up(self) -> None:
        """Does nothing, because a server never sleeps."""


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

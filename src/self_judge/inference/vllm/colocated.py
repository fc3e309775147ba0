"""VLLMEngine: vLLM inside the training process (TRL's `colocate` mode).

The engine receives the weights of the model in training from memory, not from disk. This module
does not depend on the meaning of the prompts.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import patch_environment
from transformers import PretrainedConfig

from self_judge.config.self_training import SamplingSettings
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.vllm.protocol import (
    SamplingRequest,
    request_parameters,
    scoring_parameters,
)

_CPU_CACHE_BYTES = 1 << 30


class VLLMEngine:
    """A vLLM engine in this process, which uses its GPU, or the CPU if vLLM was built for CPUs.

    Args:
        config: the model's configuration. vLLM builds the model from it, without weights.
        weights: pairs of a weight's name in a checkpoint and the weight.
        dtype: the dtype of the weights and the computation.
        max_model_length: the maximum number of tokens in a prompt and its response together.
        max_num_seqs: the maximum number of sequences in a batch.
        max_lora_rank: the largest rank of an adapter, or 0 if no adapter will be loaded.
        max_loras: the number of adapters in use at the same time.
        gpu_memory_utilization: the share of the GPU's total memory (not only of its free memory)
            for weights, activations and cache. On a CPU, the cache takes 1 GiB, or the size set in
            VLLM_CPU_KVCACHE_SPACE.
        sleep_level: the effect of `sleep` on GPUs. At 0, `sleep` has no effect. At 1, the weights
            move to CPU memory. At 2, the weights are dropped, and `load_weights` must be called
            after `wake_up`.
        trust_remote_code: passed to vLLM.

    Raises:
        EngineError: vLLM is not installed, does not support the model, or has too little memory.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype,
        max_model_length: int,
        max_num_seqs: int = 64,
        max_lora_rank: int = 0,
        max_loras: int = 1,
        gpu_memory_utilization: float = 0.3,
        sleep_level: Literal[0, 1, 2] = 0,
        trust_remote_code: bool = False,
    ) -> None:
        require_vllm()
        self.max_model_length = max_model_length
        self.dtype = dtype
        self.sleep_level = sleep_level
        self._dropped = False  # whether `sleep` has dropped the weights
        self._adapters: dict[str, Any] = {}
        self._next_id = 1
        self._began_group = not torch.distributed.is_initialized()
        settings: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_length,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": sleep_level > 0,
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # ignore the model's own sampling settings
            "logprobs_mode": "raw_logprobs",
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "trust_remote_code": trust_remote_code,
            "seed": 0,
        }
        if max_lora_rank:
            settings.update(
                enable_lora=True,
                max_lora_rank=_rank_class(max_lora_rank),
                max_loras=max_loras,
                # The next adapter is loaded before the previous one is removed.
                max_cpu_loras=max_loras + 1,
            )
        if not torch.cuda.is_available():
            settings["enforce_eager"] = True
            if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
                settings["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # As in TRL, every training process has its own engine.
            settings["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory() as folder, _in_this_process(), _random_state_kept():
            config.save_pretrained(folder)
            _name_the_architecture(config, Path(folder))
            from vllm import LLM

            memory = _prefix_cache(gpu_memory_utilization)
            try:
                self.llm = LLM(model=folder, **settings)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                why = " ".join(str(error).split())
                raise EngineError(f"vLLM cannot start with this model: {why}{memory}") from error
        self.load_weights(weights)

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        settings: SamplingSettings,
        stop: Sequence[int],
        adapter: str | None,
        done: Done,
    ) -> list[list[int]]:
        """See `Engine.sample`."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                **request_parameters(settings, stop), seed=request.seed, detokenize=False
            )
            for request in requests
        ]
        outputs = self._generate([r.prompt for r in requests], params, adapter, done)
        return [list(output.token_ids) for output in outputs]

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """See `Engine.next_token_logprobs`."""
        from vllm import SamplingParams

        params = SamplingParams(**scoring_parameters(token_ids), detokenize=False)
        outputs = self._generate(prompts, [params] * len(prompts), adapter, done)
        return [[output.logprobs[0][t].logprob for t in token_ids] for output in outputs]

    def _generate(
        self, prompts: Prompts, params: Sequence[Any], adapter: str | None, done: Done
    ) -> list[Any]:
        if self._dropped:
            raise EngineError("vLLM dropped its weights (sleep level 2): call load_weights")
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            list(params),
            use_tqdm=False,
            lora_request=None if adapter is None else self._adapters[adapter],
        )
        done(len(prompts))
        return [output.outputs[0] for output in outputs]

    def load_adapter(self, name: str, folder: Path) -> None:
        """See `Engine.load_adapter`."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, self._next_id, str(folder))
        self._next_id += 1
        try:
            self.llm.llm_engine.add_lora(request)
        except (ValueError, RuntimeError) as error:
            raise EngineError(f"vLLM cannot load the adapter: {error}") from error
        self._adapters[name] = request

    def remove_adapter(self, name: str) -> None:
        """See `Engine.remove_adapter`."""
        self.llm.llm_engine.remove_lora(self._adapters.pop(name).lora_int_id)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """See `Engine.load_weights`."""
        # Every process has the whole model here, so the iterator can be passed directly.
        cast = ((name, tensor.detach().to(self.dtype)) for name, tensor in weights)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
        if not torch.cuda.is_available():
            self.llm.apply_model(_repack_head)
        self.llm.reset_prefix_cache()
        self._dropped = False

    def sleep(self) -> None:
        """See `Engine.sleep`. Drops the KV cache if `sleep_level` is not 0."""
        if self.sleep_level:
            self.llm.sleep(level=self.sleep_level)
            self._dropped = self.sleep_level == 2

    def wake_up(self) -> None:
        """See `Engine.wake_up`."""
        if self.sleep_level:
            self.llm.wake_up()

    def close(self) -> None:
        """Shuts down the engine and frees its memory."""
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        destroy_model_parallel()
        if self._began_group:  # otherwise, the group belongs to training
            destroy_distributed_environment()
        gc.collect()


def _prefix_cache(utilization: float) -> str:
    """Describes the requested and the free GPU memory, for an error message."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    gib = 2**30
    return (
        f" (vllm_gpu_memory_utilization={utilization:g} reserves {utilization * total / gib:.1f} "
        f"of this GPU's {total / gib:.1f} GiB, and {free / gib:.1f} GiB were free before vLLM "
        "started: lower the value if less is free, or raise it if the weights do not fit)"
    )


def require_vllm() -> None:
    """Raises `EngineError` if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise EngineError(
            "use_vllm needs vLLM, which is not installed: pip install 'self-judge[vllm]', or set "
            "vllm_mode=server with the URL of a running server"
        )


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Runs vLLM's engine core in this process, so that weights are passed by reference."""
    # This also turns off vLLM's usage statistics, which are on by default.
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        ours["VLLM_LOGGING_LEVEL"] = "ERROR"
    with patch_environment(**ours):
        yield


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restores the random state, because vLLM seeds every generator in the process."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def _name_the_architecture(config: PretrainedConfig, folder: Path) -> None:
    """Adds `architectures`, which vLLM needs but a configuration created in memory may lack."""
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if not saved.get("architectures"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        saved["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        path.write_text(json.dumps(saved), encoding="utf-8")


def _rank_class(rank: int) -> int:
    """Returns the smallest rank that vLLM supports and that is at least `rank`."""
    classes = (8, 16, 32, 64, 128, 256, 320, 512)
    fitting = next((c for c in classes if c >= rank), None)
    if fitting is None:
        raise EngineError(f"the adapter has rank {rank}: vLLM supports at most {classes[-1]}")
    return fitting


def _repack_head(model: torch.nn.Module) -> None:
    """Repacks the LM head after vLLM 0.32 has reloaded tied weights on a CPU.

    vLLM keeps a packed copy of the head, but does not update this copy if the head is tied to the
    embeddings.
    """
    head: Any = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(head)

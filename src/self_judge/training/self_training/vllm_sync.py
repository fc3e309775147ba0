"""Sends the trained adapter, or all weights, to a vLLM engine that samples and judges.

This module does not depend on the texts that are sampled or judged. Sharded parameters (DeepSpeed
ZeRO-3, FSDP2) are gathered one at a time, and every process must take part.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers.integrations import is_deepspeed_zero3_enabled

from self_judge.console import masked
from self_judge.datatypes import Comparison
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import next_token_logits
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.colocated import VLLMEngine
from self_judge.inference.vllm.protocol import Engine, VLLMSampler, VLLMScorer
from self_judge.models import apply_umask
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_prompt import encode_orders
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.runtime import in_evaluation_mode
from self_judge.training.identity.shards import gathered
from self_judge.training.self_training.config import SelfJudgeConfig


class AdapterError(ValueError):
    """Raised when the engine cannot load an adapter on top of its base model."""


def lora_config(model: PeftModel, adapter: str) -> LoraConfig:
    """Returns an adapter's configuration, and checks that vLLM can load the adapter at run time.

    Raises:
        AdapterError: the adapter is not LoRA, or has parts that vLLM cannot load.
    """
    config: Any = model.peft_config[adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    reasons = {
        f"it is {kind}, not LoRA": not isinstance(config, LoraConfig) or kind != "LORA",
        f"modules_to_save={config.modules_to_save}": bool(config.modules_to_save),
        "use_dora=True": bool(getattr(config, "use_dora", False)),
        f"bias={getattr(config, 'bias', 'none')!r}": getattr(config, "bias", "none") != "none",
        "trainable_token_indices": bool(getattr(config, "trainable_token_indices", None)),
    }
    wrong = [reason for reason, holds in reasons.items() if holds]
    if wrong:
        raise AdapterError(
            "use_vllm: vLLM cannot load this adapter on top of its base model "
            f"({', '.join(wrong)}); use plain LoRA, or leave use_vllm unset"
        )
    return config


def lora_rank(model: PeftModel, adapter: str) -> int:
    """Returns the largest rank in an adapter."""
    config = lora_config(model, adapter)
    return max([config.r, *(config.rank_pattern or {}).values()])


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Returns an adapter's full tensors on the CPU, keyed by their names in the adapter's file."""
    own = (
        name for name, _ in model.named_parameters() if _is_lora(name) and f".{adapter}." in name
    )
    gathered = {name: tensor.cpu() for name, tensor in _whole(model, set(own))}
    return {
        name: tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(
            model, state_dict=gathered, adapter_name=adapter, save_embedding_layers=False
        ).items()
    }


def save_adapter(
    model: PeftModel, adapter: str, tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    """Writes the two files of an adapter, as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    model.peft_config[adapter].save_pretrained(str(folder))
    apply_umask(folder)  # a server may run as another user


def checkpoint_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the model (or a `PeftModel`'s base) with their names in checkpoints."""
    own = {name for name, _ in model.named_parameters() if not _is_lora(name)}
    for name, tensor in _whole(model, own):
        if isinstance(model, PeftModel):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        # Gradient checkpointing and FSDP insert the names of their wrappers into parameter names.
        # Names in checkpoints do not contain them.
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")
        yield name, tensor


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _whole(model: torch.nn.Module, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if name in names:
            with gathered(parameter) as whole:
                # ZeRO-3 frees the weight afterwards.
                yield name, whole.clone() if is_deepspeed_zero3_enabled() else whole


logger = logging.getLogger(__name__)

# TRL's adapter names: the trained adapter, and the frozen copy of an adapter passed by the user.
_POLICY, _REFERENCE = "default", "ref"
_CHECKS = 2  # check the first rollout, and the first rollout after an update


def probe_prompt(encoder: ChatEncoder, templates: JudgeTemplates | None) -> list[int]:
    """Returns a prompt whose logits show whether an engine has the trained weights."""
    if templates is None:
        return encoder.encode_prompt([{"role": "user", "content": "Where does the otter live?"}])
    asked = Comparison("Where does the otter live?", "In the river.", "In the sky.")
    orders = encode_orders(encoder, templates, templates.principles[0], asked, None)
    assert orders is not None  # without a limit, every prompt fits
    return orders[0]


class VLLMSync:
    """Keeps the engine's policy equal to the training model. With LoRA, the engine also judges.

    With LoRA, the engine holds one copy of the frozen base model. Sampling uses the current
    adapter, which is reloaded after every update. Judging uses the base model alone (or the frozen
    "ref" adapter of a given `PeftModel`). With full fine-tuning, the engine holds the policy,
    whose weights are replaced after every update, and the judge stays in the training process.

    `judges` is `True` if the engine also judges. In the first rollouts, the engine's probabilities
    are compared with those of the training model.

    Args:
        model: the model in training, before or after Accelerate prepares it.
        args: the settings, including `use_vllm` and the other vLLM settings.
        accelerator: the trainer's accelerator. In `server` mode, the main process sends the
            weights.
        encoder: the policy's encoder.
        probe: a prompt for checking the engine.
        separate_judge: whether the judge is a separate model in the training process.

    Raises:
        EngineError, AdapterError: the engine is unavailable or cannot load this model.
    """

    # The engine's contents in each step, and their use:
    #
    #                 LoRA                                  full fine-tuning
    #   weights       the frozen base, loaded once          the policy, replaced every step
    #   sample with   adapter self-judge-<run>-0, -1, ...   those weights
    #   judge with    the bare base, or adapter "ref"       (the judge is in the training process)
    #
    # A new adapter is loaded under a new name before the previous one is removed.

    def __init__(
        self,
        model: torch.nn.Module,
        args: SelfJudgeConfig,
        accelerator: Accelerator,
        encoder: ChatEncoder,
        probe: Sequence[int],
        separate_judge: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.encoder = encoder
        self.args = args
        self.model: Any = accelerator.unwrap_model(model)
        self.adapted = isinstance(self.model, PeftModel)
        self.judges = self.adapted and not separate_judge
        self.colocated = args.vllm_mode == "colocate"
        self._probe = [list(probe)]
        self._refreshes = 0
        self._policy: str | None = None
        self._reference: str | None = None
        self._run = uuid.uuid4().hex[:8]
        self._handover = _handover_folder(args.vllm_sync_dir)
        self._folder = Path(self._handover.name)
        self.engine = self._colocated() if self.colocated else self._servers()
        if self.judges and _REFERENCE in self.model.peft_config:
            self._reference = self._load_adapter(_REFERENCE, "reference")
        self.engine.sleep()

    def _colocated(self) -> Engine:
        config = self.model.config.get_text_config()
        if getattr(self.model, "is_quantized", False) or getattr(
            self.model.config, "quantization_config", None
        ):
            raise EngineError(
                "vllm_mode=colocate needs the full weights in memory, but this model is quantized: "
                "use vllm_mode=server, or no quantization"
            )
        limit = self.args.max_length
        loras = [a for a in (_POLICY, _REFERENCE) if self.adapted and a in self.model.peft_config]
        context = getattr(config, "max_position_embeddings", None)
        # A judge prompt has up to `max_length` tokens, and its letter is one more token.
        wanted = self.args.vllm_max_model_length or (limit + 1 if limit else context)
        if wanted is None:
            raise EngineError(
                "set vllm_max_model_length, because neither max_length nor the model sets a limit"
            )
        return VLLMEngine(
            self.model.config,
            checkpoint_weights(self.model),
            dtype=self._dtype(),
            max_model_length=min(wanted, context or wanted),
            max_num_seqs=self.args.generation_batch_size,
            max_lora_rank=max((lora_rank(self.model, a) for a in loras), default=0),
            max_loras=max(1, len(loras)),
            gpu_memory_utilization=self.args.vllm_gpu_memory_utilization,
            sleep_level=self._sleep_level(),
        )

    def _sleep_level(self) -> Literal[0, 1, 2]:
        """Returns 0 if sleep is disabled, 1 if the base never changes (LoRA), and 2 otherwise."""
        if not self.args.vllm_enable_sleep_mode:
            return 0
        return 1 if self.adapted else 2

    def _servers(self) -> Engine:
        if self.adapted:
            lora_config(self.model, _POLICY)
        servers = VLLMServers(
            self.args.vllm_server_base_url or [],
            timeout=self.args.vllm_server_timeout,
            concurrency=self.args.generation_batch_size,
            vocabulary=self.model.get_input_embeddings().num_embeddings,
            sync_dir=self._folder,
        )
        if servers.max_model_length < (self.args.max_length or 0):
            raise EngineError(
                f"the servers accept {servers.max_model_length} tokens, but max_length is "
                f"{self.args.max_length}: start them with --max-model-len "
                f"{(self.args.max_length or 0) + 1}, or lower max_length"
            )
        return servers

    def _dtype(self) -> torch.dtype:
        if self.args.bf16:
            return torch.bfloat16
        if self.args.fp16:
            return torch.float16
        own: torch.dtype = next(self.model.parameters()).dtype
        return own

    def scorer(self) -> VLLMScorer:
        """Returns the judge's letter scorer."""
        return VLLMScorer(self.engine, self._reference)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Wakes the engine for the `with` block, and then lets it sleep if sleep is enabled."""
        self.engine.wake_up()
        try:
            yield
        finally:
            self.engine.sleep()

    def sampler(self, reference: AbstractContextManager[Any]) -> VLLMSampler:
        """Updates the engine's policy and returns a sampler for it.

        Args:
            reference: a context manager that activates the judge's weights for the first check.
        """
        if self._refreshes == 0 and self.judges:
            self._check(reference, self._reference, "judge")
        self._refresh()
        self._refreshes += 1
        if self._refreshes <= _CHECKS:
            self._check(nullcontext(), self._policy, "policy")
        return VLLMSampler(self.engine, self.encoder, self.args.sampling(), self._policy)

    def _refresh(self) -> None:
        """Loads the current policy into the engine. Every process must call this method."""
        if self.adapted:
            last = self._policy
            self._policy = self._load_adapter(_POLICY, str(self._refreshes))
            if last is not None:
                self._hand_over(lambda: self.engine.remove_adapter(last))
                shutil.rmtree(self._folder / last, ignore_errors=True)
        else:
            weights = checkpoint_weights(self.model)
            if self.colocated or self.accelerator.is_main_process:
                self.engine.load_weights(weights)
            for _ in weights:  # every process must take part in gathering sharded weights
                pass
            self.accelerator.wait_for_everyone()

    def _load_adapter(self, adapter: str, version: str) -> str:
        # A server identifies the adapter by this name, so every process must use the same name.
        name = _from_main(f"self-judge-{self._run}-{version}", self.accelerator)
        tensors = adapter_tensors(self.model, adapter)
        folder = self._folder / name

        def load() -> None:
            save_adapter(self.model, adapter, tensors, folder)
            self.engine.load_adapter(name, folder)

        self._hand_over(load)
        return name

    def _hand_over(self, call: Any) -> None:
        """Runs a call to the engine. If servers are used, only the main process runs it."""
        if self.colocated or self.accelerator.is_main_process:
            call()
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _check(self, weights: AbstractContextManager[Any], adapter: str | None, role: str) -> None:
        """Compares the next-token probabilities of the engine and the model for one prompt."""
        with weights, in_evaluation_mode(self.model):
            logprobs_V = next_token_logits(self.model, self._probe)[0].float().log_softmax(-1)
        expected, tokens = (t.tolist() for t in logprobs_V.topk(4))
        (got,) = self.engine.next_token_logprobs(self._probe, tokens, adapter, lambda n: None)
        here, there = torch.tensor(expected).exp(), torch.tensor(got).exp()
        distance = (here - there).abs().max().item()
        # Rounding in half precision changes a probability by a few hundredths.
        if not distance <= (0.01 if self._dtype() == torch.float32 else 0.1):
            where, served = "in the engine", ""
            if not self.colocated:
                where = "at " + ", ".join(masked(self.args.vllm_server_base_url or []))
                served = "; serve the model that this run trains, with any earlier adapter merged"
            raise EngineError(
                f"the {role} differs between vLLM and training: after a prompt of "
                f"{len(self._probe[0])} tokens, the most likely next tokens have the probabilities "
                f"{_shown(there)} {where} and {_shown(here)} in training{served}"
            )


def _handover_folder(wanted: str | None) -> tempfile.TemporaryDirectory[str]:
    """Creates a temporary folder for this run: in `wanted`, or else in memory if possible."""
    shared = Path("/dev/shm")
    parent = wanted or (str(shared) if shared.is_dir() else None)
    if wanted is not None:
        Path(wanted).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="self-judge-", dir=parent)


def _from_main(text: str, accelerator: Accelerator) -> str:
    if accelerator.num_processes == 1:
        return text
    from accelerate.utils import broadcast_object_list

    (text,) = broadcast_object_list([text], from_process=0)
    return text


def _shown(probabilities: torch.Tensor) -> str:
    return "[" + ", ".join(f"{p:.3f}" for p in probabilities.tolist()) + "]"

"""What a model in training hands to an engine: its adapter as PEFT saves one, or all its weights.

Sharded parameters (DeepSpeed ZeRO-3, FSDP2) are gathered one at a time; then every process must go
through all of them. It does not know who takes the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from self_judge.models import apply_umask


class AdapterError(ValueError):
    """An adapter that an engine cannot hold beside its base."""


def lora_config(model: PeftModel, adapter: str) -> LoraConfig:
    """The configuration of an adapter that an engine can load at run time.

    Raises:
        AdapterError: it is no LoRA, or has parts that vLLM cannot load.
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
            f"use_vllm: vLLM cannot load this adapter beside its base ({', '.join(wrong)}); use a "
            "plain LoRA, or leave use_vllm out"
        )
    return config


def lora_rank(model: PeftModel, adapter: str) -> int:
    """The largest rank in an adapter."""
    config = lora_config(model, adapter)
    return max([config.r, *(config.rank_pattern or {}).values()])


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names of its file, whole, on the CPU."""
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
    """Writes an adapter's two files, as PEFT would."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    model.peft_config[adapter].save_pretrained(str(folder))
    apply_umask(folder)  # a server may run under another user


def checkpoint_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights by their names in a checkpoint, one at a time; of a `PeftModel` its base's."""
    own = {name for name, _ in model.named_parameters() if not _is_lora(name)}
    for name, tensor in _whole(model, own):
        if isinstance(model, PeftModel):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        # What checkpointing and FSDP put into names is in no checkpoint.
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "")
        yield name, tensor


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _whole(model: torch.nn.Module, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if name in names:
            with _gathered(parameter) as whole:
                yield name, whole


@contextmanager
def _gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor().detach()
    elif is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach().clone()
    else:
        yield parameter.detach()

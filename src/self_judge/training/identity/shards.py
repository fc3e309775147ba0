"""Reads and changes weights that FSDP or DeepSpeed shards across processes.

Whole weights (one process, DDP, ZeRO-1 and ZeRO-2) pass through unchanged. All processes call these
functions together. This module does not decide what is compared.
"""

# A weight W of two rows in two processes. The forward pass of its layer gathers W, and FSDP or
# ZeRO-3 may keep the copy for the next pass, such as FSDP for the root module:
#
#               process 0              process 1
#   shard       W[0]                   W[1]         `shard`: a change lasts
#   copy        W[0] W[1]              W[0] W[1]    `reshard` drops it, so that the next pass
#                                                   gathers what the shards hold by then

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME

PLAIN, DEEPSPEED = "one process or DDP", "DeepSpeed"
FSDP_WHOLE, FSDP_SHARDS = "FSDP with FULL_STATE_DICT", "FSDP with SHARDED_STATE_DICT"
SHARDS = f"{FSDP_MODEL_NAME}_0"  # the folder of a checkpoint with the shards of FSDP


def is_sharded(args: TrainingArguments) -> bool:
    """Returns whether FSDP or DeepSpeed shards the model across processes."""
    launched = (os.environ.get(f"ACCELERATE_USE_{kind}", "") for kind in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed or any(a.lower() in ("1", "true") for a in launched))


def is_fsdp(model: nn.Module) -> bool:
    """Returns whether FSDP wraps the model, so that only its own call gathers the weights."""
    return isinstance(model, FSDPModule)


def check_sharding(accelerator: Accelerator, *, adapter: bool) -> None:
    """Refuses ways of sharding that would not save whole weights, or would not compare them.

    Args:
        adapter: whether only an adapter is saved. DeepSpeed always gathers an adapter.

    Raises:
        ValueError: FSDP1, or ZeRO-3 that does not gather the weights on saving.
    """
    fsdp: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ValueError(
            "FSDP1 is deprecated in Transformers and not supported here: convert the accelerate "
            "file with `accelerate to-fsdp2`, or set fsdp_config.version to 2"
        )
    deepspeed: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    zero = deepspeed.deepspeed_config.get("zero_optimization", {}) if deepspeed else {}
    gathers = zero.get("stage3_gather_16bit_weights_on_model_save") is True  # "auto" means False
    if zero.get("stage") == 3 and not (gathers or adapter):
        raise ValueError(
            "ZeRO-3 would save shards instead of a model: set zero3_save_16bit_model: true in the "
            "accelerate file, or stage3_gather_16bit_weights_on_model_save: true in DeepSpeed's"
        )


def kind_of_launch(accelerator: Accelerator) -> str:
    """Returns what decides the files of a checkpoint."""
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        return DEEPSPEED
    fsdp: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        return PLAIN
    sharded = fsdp.state_dict_type == StateDictType.SHARDED_STATE_DICT
    return FSDP_SHARDS if sharded else FSDP_WHOLE


def saves_shards(accelerator: Accelerator) -> bool:
    """Returns whether FSDP writes shards instead of whole weights."""
    return kind_of_launch(accelerator) == FSDP_SHARDS


@contextmanager
def saving_whole_weights(accelerator: Accelerator) -> Iterator[None]:
    """Makes FSDP write whole weights within the `with` block."""
    if not saves_shards(accelerator):
        yield
        return
    fsdp: Any = accelerator.state.fsdp_plugin
    fsdp.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        fsdp.state_dict_type = StateDictType.SHARDED_STATE_DICT


def shard(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the values of a weight that this process holds. `reshard` comes first."""
    held = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3
    return held.to_local() if isinstance(held, DTensor) else held


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def reshard(model: nn.Module) -> None:
    """Drops gathered copies of a model's weights."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    with _gathered_by_zero([p for p in model.parameters() if p.numel()]):
        pass


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the whole weight."""
    if isinstance(parameter, DTensor):
        whole: Any = parameter.detach()
        yield whole.full_tensor()
        return
    with _gathered_by_zero([parameter]):
        yield parameter.detach()


@contextmanager
def _gathered_by_zero(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    parts = [p for p in parameters if getattr(p, "ds_tensor", None) is not None]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of a model, with weights for `gathered`."""
    return dict(model.state_dict(keep_vars=True))


def largest(value: float) -> float:
    """Returns the largest of the values of all processes."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    own = torch.tensor([value], dtype=torch.float32, device=state.device)
    every: Any = gather(own)
    return float(every.max())


def from_all(texts: Sequence[str]) -> list[str]:
    """Returns the distinct texts of all processes."""
    return list(dict.fromkeys(gather_object(list(texts))))

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
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FirstFSDP
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments


def is_sharded(args: TrainingArguments) -> bool:
    """Returns whether FSDP or DeepSpeed shards the model across processes."""
    launched = (os.environ.get(f"ACCELERATE_USE_{kind}", "") for kind in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed or any(a.lower() in ("1", "true") for a in launched))


def is_fsdp(model: nn.Module) -> bool:
    """Returns whether FSDP wraps the model, so that only its own call gathers the weights."""
    return isinstance(model, (FirstFSDP, FSDPModule))


def gathers_weights(model: nn.Module) -> bool:
    """Returns whether `gathered` works. FSDP1 flattens the weights of a layer into one tensor."""
    return not isinstance(model, FirstFSDP)


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
        elif isinstance(module, FirstFSDP):
            with FirstFSDP.summon_full_params(module, recurse=False, writeback=False):
                pass
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

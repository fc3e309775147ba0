"""LoRA layers in training with less memory moved, and the same numbers.

PEFT's layers, their parameters and files stay as they are; only how a plain one computes changes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners import lora
from torch import nn

_HALF = (torch.bfloat16, torch.float16)


def lighten(model: nn.Module) -> None:
    """Has the LoRA layers of a model compute without what changes no number, from now on.

    Every call decides for itself: outside autocast, with several adapters, dropout at work or a
    variant of LoRA, a layer computes as PEFT wrote it.
    """
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


def forward(layer: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`lora.Linear.forward`, its input left in half precision where autocast would undo the cast.

    PEFT casts the input to the float32 of the adapter, and autocast casts it back.
    """
    layer.cast_input_dtype_enabled = not _cast_is_undone(layer, x)
    return lora.Linear.forward(layer, x, *args, **kwargs)


def _cast_is_undone(layer: lora.Linear, x: torch.Tensor) -> bool:
    if not torch.is_autocast_enabled(x.device.type) or x.dtype not in _HALF:
        return False
    # Several adapters add up their input's gradients in float32.
    name, *others = [name for name in layer.active_adapters if name in layer.lora_A] or [None]
    if name is None or others or name in layer.lora_variant:
        return False
    # Dropout scales by a number of its input's type.
    dropout = layer.lora_dropout[name]
    dropping = not isinstance(dropout, nn.Identity) and dropout.training
    return not dropping and layer.lora_A[name].weight.dtype == torch.float32

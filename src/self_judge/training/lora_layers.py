"""LoRA layers in training with less memory moved, and numbers as near to exact ones.

PEFT's layers, their parameters and files stay as they are; only how a plain one computes changes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)


def lighten(model: nn.Module) -> None:
    """Has the plain LoRA layers of a model compute in fewer passes from now on.

    Every call decides for itself: with several adapters, dropout at work, a variant of LoRA, biases
    of the adapter, or weights that are merged, quantized or trained, a layer computes as PEFT wrote
    it.
    """
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


def forward(layer: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`lora.Linear.forward` in fewer passes over what it computes, where it is plain.

    Elsewhere its input is left in half precision where autocast would undo PEFT's cast to the
    adapter's float32.
    """
    name = None if args or kwargs else _sole_adapter(layer)
    computed = x.dtype
    if torch.is_autocast_enabled(x.device.type) and computed != torch.float64:
        computed = torch.get_autocast_dtype(x.device.type)
    if name is not None and _is_plain(layer, name, x, computed):
        up = layer.lora_B[name].weight
        scaling = layer.scaling[name]
        own = (layer.lora_A[name].weight, up if scaling == 1 else up * scaling)
        base = layer.get_base_layer()
        weights = (t if t is None else t.to(computed) for t in (base.weight, base.bias, *own))
        result: torch.Tensor = _LoRA.apply(x.to(computed), *weights)
        return result
    layer.cast_input_dtype_enabled = not (name is not None and _cast_is_undone(layer, name, x))
    return lora.Linear.forward(layer, x, *args, **kwargs)


def _sole_adapter(layer: lora.Linear) -> str | None:
    """The one adapter at work in a layer, if it is plain LoRA without dropout at work."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    dropout = layer.lora_dropout[names[0]]
    dropping = not isinstance(dropout, nn.Identity) and dropout.training
    return None if dropping else names[0]


def _cast_is_undone(layer: lora.Linear, name: str, x: torch.Tensor) -> bool:
    # Several adapters add up their input's gradients in float32, and dropout scales by a number of
    # its input's type: there the cast is felt.
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype in _HALF
    return autocast and layer.lora_A[name].weight.dtype == torch.float32


def _is_plain(layer: lora.Linear, name: str, x: torch.Tensor, computed: torch.dtype) -> bool:
    """Whether PEFT would compute the base and its one adapter in the same type, and no more."""
    base, down, up = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    weights = (base.weight, down.weight, up.weight)
    # Autocast casts weights; without it, PEFT computes each in its own type.
    allowed = (computed, torch.float32 if torch.is_autocast_enabled(x.device.type) else computed)
    return (
        not layer.disable_adapters
        and not layer.merged
        and all(type(m) is nn.Linear and not _hooked(m) for m in (base, down, up))
        and all(type(w) is nn.Parameter for w in weights)
        and not any(p.requires_grad for p in base.parameters())
        and down.bias is None
        and up.bias is None
        and all(w.dtype in allowed for w in weights)
    )


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says (sharding, offloading, casting)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _LoRA(torch.autograd.Function):
    """`x W' + b + x A' B'` as one node, what an adapter adds being added in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inside = flat @ down.T
        result = nn.functional.linear(flat, weight, bias).addmm_(inside, up.T)
        ctx.save_for_backward(x, inside, weight, down, up)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inside, weight, down, up = ctx.saved_tensors
        flat, pulls = x.reshape(-1, x.shape[-1]), pull.reshape(-1, pull.shape[-1])
        for_inside = pulls @ up
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = (pulls @ weight).addmm_(for_inside, down).view(x.shape)
        return for_x, None, None, for_inside.T @ flat, pulls.T @ inside

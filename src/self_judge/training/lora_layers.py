"""LoRA layers that need less memory traffic during training, with the same accuracy.

PEFT's layers, parameters and files are unchanged. Only the computation in plain layers differs.
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
    """Makes the plain LoRA layers in a model read and write less memory.

    A layer is checked at each call. It uses PEFT's own code if it has several adapters, active
    dropout, a variant of LoRA, adapter biases, or base weights that are merged, quantized or
    trained.
    """
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.forward = types.MethodType(forward, layer)  # type: ignore[method-assign]


def forward(layer: lora.Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Computes `lora.Linear.forward` with less memory traffic if the layer is plain.

    For other layers, the input is kept in half precision if autocast would undo PEFT's cast to
    float32, the adapter's dtype.
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
    """Returns the name of the only active adapter if it is plain LoRA without active dropout."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    dropout = layer.lora_dropout[names[0]]
    dropping = not isinstance(dropout, nn.Identity) and dropout.training
    return None if dropping else names[0]


def _cast_is_undone(layer: lora.Linear, name: str, x: torch.Tensor) -> bool:
    # The cast affects the result in two cases: the input gradients of several adapters are summed
    # in float32, and dropout scales its input in the input's dtype.
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype in _HALF
    return autocast and layer.lora_A[name].weight.dtype == torch.float32


def _is_plain(layer: lora.Linear, name: str, x: torch.Tensor, computed: torch.dtype) -> bool:
    """Returns whether PEFT would compute only the base layer and one adapter, in the same dtype."""
    base, down, up = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    weights = (base.weight, down.weight, up.weight)
    # Autocast casts the weights. Without autocast, PEFT computes in the dtype of each weight.
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
    """Returns whether a module has hooks (for sharding, offloading or casting)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _LoRA(torch.autograd.Function):
    """Computes `x W' + b + x A' B'` in one autograd node. The adapter's part is added in place."""

    # For x (N, in), W (out, in), A (r, in), B (out, r) and the gradient g (N, out) of the result:
    #
    #   inside = x A'                 (N, r)     gradient of A:  (g B)' x     (r, in)
    #   result = x W' + b, then       (N, out)   gradient of B:  g' inside    (out, r)
    #            += inside B'                    gradient of x:  g W, then += (g B) A
    #
    # W and b are frozen. Only x and the small `inside` are kept for the backward pass.

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

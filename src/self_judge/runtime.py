"""Controls a model's device, memory, precision and mode on this machine.

This module does not depend on how a model was loaded or what it computes.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import platform
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch import nn

logger = logging.getLogger(__name__)

# Newer versions of Transformers call gradient checkpointing activation checkpointing. TRL and PEFT
# still use the old names, and users cannot change that.
warnings.filterwarnings(
    "ignore",
    r"`(is_)?gradient_checkpointing\w*` is deprecated",
    FutureWarning,
    r"transformers\.(modeling_utils|training_args)",
)

# The names of a model's cache: since Transformers 5.24, in all other models, in recurrent models.
CACHES = ("cache", "past_key_values", "cache_params")

# The number of rows of the LM head's weight that are converted to float32 at a time. With a hidden
# size of 2,048, these rows take 0.25 GiB.
_HEAD_ROWS = 32_768


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the causal language model inside all wrappers (DDP, PEFT), including its adapters."""
    inner: Any = model
    while isinstance(inner, PeftModel) or isinstance(
        getattr(inner, "module", None), torch.nn.Module
    ):
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner.module
    return inner


def takes(module: nn.Module, argument: str) -> bool:
    """Returns whether a module's forward method has this argument."""
    return argument in inspect.signature(type(module).forward).parameters


def cache_name(inner: Any) -> str:
    """Returns the name of a causal language model's cache, as an argument and in its output."""
    return next((name for name in CACHES if takes(inner.base_model, name)), "past_key_values")


def own_device() -> torch.device:
    """Returns this process's device: its own GPU, or the CPU if there is no GPU.

    Each process in a launch has its own GPU. If Accelerate is already initialized (by a trainer, or
    by a command under `accelerate launch`), this function returns Accelerate's device. It does not
    initialize Accelerate.
    """
    if PartialState._shared_state:
        return PartialState().device
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if on_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    process = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", process % torch.cuda.device_count())


@contextmanager
def in_evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode and restores every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Disables the cuDNN backend of PyTorch's attention (CUDA only).

    On recent GPUs, PyTorch prefers cuDNN, which needs tens of milliseconds to build a plan for each
    new shape. Packed rows rarely have the same shape twice, and during decoding the keys grow with
    each token. Wrap the whole training run in this context, not only forward passes, because
    gradient checkpointing recomputes forward passes in the backward pass.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device) -> None:
    """Makes this process keep freed memory, which speeds up training and sampling on a CPU.

    By default, glibc returns large blocks to the kernel immediately. Each page of the next block
    then causes a page fault, in which the kernel clears the page. One training step of SmolLM2
    causes half a million page faults. The function has no effect with other C libraries or on other
    devices.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)


@contextmanager
def float32_logits(model: torch.nn.Module) -> Iterator[None]:
    """Makes the model's head compute float32 logits, even if the model uses another dtype.

    bfloat16 has eight bits of precision, so it rounds a logit of 20 to a multiple of 1/8. The
    logits of a judge's two letters often differ by no more than 1/8. Autocast is disabled inside
    the head, because Accelerate enables it in the `forward` of a trainer's model. The context
    manager changes every plain linear layer in the head, including adapter layers. The layers read
    their weights at call time, when sharded weights are gathered. A quantized head is unchanged.
    """
    head: Any = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for layer in head.modules() if head is not None else ():
        # If Accelerate has added a device hook to a layer, the layer's original `forward` is stored
        # as `_old_forward`.
        own = vars(layer)
        name = "_old_forward" if "_old_forward" in own else "forward"
        usual = own.get(name)
        forward = getattr(usual, "__func__", usual) or type(layer).forward
        if isinstance(layer, torch.nn.Linear) and forward is torch.nn.Linear.forward:
            replaced.append((own, name, usual))
            own[name] = types.MethodType(_linear_in_float32, layer)
    try:
        yield
    finally:
        for own, name, usual in replaced:
            if usual is None:
                del own[name]
            else:
                own[name] = usual


def _linear_in_float32(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    linear, weight = torch.nn.functional.linear, layer.weight
    if weight.dtype == torch.float64:
        return linear(states, weight, layer.bias)
    bias = None if layer.bias is None else layer.bias.float()
    with torch.autocast(states.device.type, enabled=False):
        states = states.float()
        if weight.dtype == torch.float32:
            return linear(states, weight, bias)
        rows = [linear(states, part.float()) for part in weight.split(_HEAD_ROWS)]
        logits = torch.cat(rows, dim=-1)
    return logits if bias is None else logits + bias


def halve_or_raise(stage: str, size: int, unit: str, error: BaseException) -> int:
    """Returns half of `size` after an out-of-memory error and re-raises any other error.

    Args:
        stage: the activity that the warning names, such as "judging".
        size: the number of units processed at a time.
        unit: the plural name of the units.
        error: the error that occurred.

    Raises:
        BaseException: `error` itself, if it is not an out-of-memory error or `size` is 1.
    """
    if not (isinstance(error, Exception) and should_reduce_batch_size(error)) or size <= 1:
        raise error
    # The traceback would keep the tensors of the failed pass alive.
    error.__traceback__ = None
    clear_device_cache(garbage_collection=True)
    half = size // 2
    logger.warning(
        "out of memory while %s %d %s at a time: continuing with %d at a time. This does not "
        "change the results. Set a smaller batch size to avoid the failed attempt",
        stage, size, unit, half,
    )  # fmt: skip
    return half


def device_of(inner: nn.Module) -> torch.device:
    return next(inner.parameters()).device


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor to a device without waiting for the device's pending work."""
    if device.type in ("cpu", "mps"):  # MPS would read the memory after it is freed
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def padded(
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    side: Literal["left", "right"] = "right",
    pad: int = 0,
) -> dict[str, torch.Tensor]:
    """Pads sequences and returns `input_ids` and `attention_mask`, each `(B, T)`.

    With a causal mask, right padding does not affect the sequences, regardless of the position
    encoding.
    """
    longest = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), longest), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids_BT[row, start : start + len(sequence)] = torch.tensor(list(sequence))
        mask_BT[row, start : start + len(sequence)] = 1
    return {"input_ids": to_device(ids_BT, device), "attention_mask": to_device(mask_BT, device)}

"""How a model runs on this machine: device, memory, precision and mode.

It knows torch and devices. It does not know where a model comes from or what it computes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel

logger = logging.getLogger(__name__)

# Rows of the head's matrix made float32 at a time: a quarter of a GiB at a width of 2,048.
_HEAD_ROWS = 32_768


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The causal language model under all wrappers (DDP, PEFT), with its adapters' layers in it."""
    inner: Any = model
    while isinstance(inner, PeftModel) or isinstance(
        getattr(inner, "module", None), torch.nn.Module
    ):
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner.module
    return inner


def own_device() -> torch.device:
    """The device that this process computes on: its own GPU, or the CPU where there is none.

    Several processes of one launch each have another GPU. Where Accelerate was set up already (by a
    training, or by a command under `accelerate launch`), it is the device that Accelerate uses;
    otherwise nothing is set up.
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
    """Puts the model into evaluation mode and every module of it back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keeps PyTorch's attention from cuDNN, which only CUDA devices have.

    On recent GPUs PyTorch prefers cuDNN, which builds a plan for every shape it has not met, in
    tens of milliseconds. Packed rows, and keys that grow with each decoded token, hardly ever have
    the same shape twice. The backward pass uses the kernel of its forward pass, but gradient
    checkpointing computes forward passes again in it: so a training stays within this as a whole.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory(device: torch.device) -> None:
    """Has this process keep the memory that it frees, for training on a CPU.

    glibc gives large blocks back at once, and the system clears every page of the next one: half a
    million page faults in a step of SmolLM2. Other C libraries and other devices are left alone.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)


@contextmanager
def float32_logits(model: torch.nn.Module) -> Iterator[None]:
    """Has the model's head compute float32 logits, whatever type the rest computes in.

    bfloat16 keeps eight bits: a logit of 20 is rounded to the next eighth, and what a judge says of
    two letters by as much as it often differs by. Autocast is off inside the head: a trainer's
    model has it in its own `forward`. Every plain linear layer of the head computes so, those of an
    adapter included, on the weights as they are at the call: gathered, where processes share them.
    A quantized head is left as it is.
    """
    head: Any = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for layer in head.modules() if head is not None else ():
        # Accelerate keeps the forward of a layer on a device of its own under this name.
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
    """Half of `size`, after an error that says that memory is full.

    Args:
        stage: what was being done, as the warning says it.
        size: how much was done at a time.
        unit: of what, in the plural.
        error: what was raised; anything else than full memory is raised again.

    Raises:
        BaseException: `error` itself, where it is another one, or where there is nothing to halve.
    """
    if not (isinstance(error, Exception) and should_reduce_batch_size(error)) or size <= 1:
        raise error
    # The traceback holds the tensors of what failed.
    error.__traceback__ = None
    clear_device_cache(garbage_collection=True)
    half = size // 2
    logger.warning(
        "out of memory while %s %d %s at a time: from here on %d, with the same result. A smaller "
        "setting from the start saves this attempt",
        stage, size, unit, half,
    )  # fmt: skip
    return half

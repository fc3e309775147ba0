"""Exactness: a small trial on the model itself shows whether another way to compute is right.

It compares logits and knows the precision they are computed in. It does not know the ways.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from torch import nn

from self_judge.packing.passes import device_of, padded
from self_judge.runtime import in_evaluation_mode, unwrapped

# Differences allowed, as shares of the largest logit. With SmolLM2 in bfloat16 another order of the
# same sums moves a logit by up to 2.8e-2; branches that see each other, or tokens at the wrong
# positions, move one by 4e-1 and more.
_IN_FLOAT32 = 1e-4
_IN_LESS = 6e-2
# What a model raises that cannot compute in some way. Subclasses of these come from elsewhere: full
# memory, a failed compilation, a lost device or process say nothing about the model.
_CANNOT = (
    RuntimeError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
)

Logits = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@functools.cache
def warn_once(logger: logging.Logger, text: str) -> None:
    """Warns of a model and of its frozen copy in one line."""
    logger.warning(text)


def as_called(model: nn.Module) -> Any:
    """The model as it is called: with its adapter, without the wrappers of processes."""
    called: Any = model
    while not isinstance(called, PeftModel) and isinstance(
        getattr(called, "module", None), nn.Module
    ):
        called = called.module
    return called


def trial_tokens(model: nn.Module, count: int) -> list[int]:
    """Random token ids, the same every time, from the middle half of the vocabulary."""
    size: int = unwrapped(model).get_input_embeddings().weight.shape[0]  # type: ignore
    first, stop = size // 4, max(size // 4 + 1, 3 * size // 4)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first, stop, (count,), generator=generator).tolist()


def padded_logits(called: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits `(T, V)` of each sequence, from one batch with padding on the right.

    What a trial is set beside: such a batch takes attention's kernels for a mask, as most ways do.
    A sequence by itself takes others, which differ in bfloat16 by more than a mistake may.

    Args:
        called: see `as_called`.
    """
    inputs = padded(sequences, device_of(called))
    logits_BTV = called(**inputs, use_cache=False).logits
    return [row[: len(s)] for row, s in zip(logits_BTV, sequences, strict=True)]


@torch.no_grad()
def why_inexact(model: nn.Module, trial: Logits) -> str | None:
    """Runs a trial and says why its way is not exact for the model; `None` if it is.

    The model runs as training and judging call it, in evaluation mode, under the autocast that is
    on and the model's own. The tolerance is that of the precision it computes in.

    Args:
        trial: gives the logits `(N, V)` found in that way and those expected.

    Raises:
        Exception: an error that says nothing about the model, such as full memory or a failed
            compilation; the trial can be run again.
    """
    device = next(model.parameters()).device
    # Accelerate's own autocast around a forward, entered again inside itself, would stay on for
    # good: a model that brings it does without the one around.
    brings_own = getattr(as_called(model), "_original_forward", None) is not None
    around = torch.autocast(device.type, enabled=False) if brings_own else nullcontext()
    try:
        with in_evaluation_mode(model), _watched(model) as computes_in, around:
            found, expected = trial()
    except _CANNOT as error:
        broken = should_reduce_batch_size(error) or "CUDA error" in str(error)
        if type(error) not in _CANNOT or broken:
            raise
        told = (str(error).splitlines() or [""])[0]
        return f"a trial failed with {type(error).__name__}: {told:.160}"
    finally:
        # Weights that autocast cast here have no gradient, and would be used again outside.
        torch.clear_autocast_cache()
    found, expected = found.float(), expected.float()
    off = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    tolerance = _IN_FLOAT32 if all(computes_in) else _IN_LESS
    if not off <= tolerance:
        return f"a trial was off by {off:.1e} of the largest logit"
    return None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[bool]]:
    """Gives, by call of the model, whether it computes in full float32 or better."""
    inner: Any = unwrapped(model)
    device = next(inner.parameters()).device
    full: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else inner.dtype
        full.append(
            dtype == torch.float64 or (dtype == torch.float32 and _multiplies_exactly(device))
        )

    # Inside every wrapper of the model's forward, where the autocast of all of them is on.
    hook = inner.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield full
    finally:
        hook.remove()


def _multiplies_exactly(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied in float32, not in TF32 or bfloat16.

    Measured: PyTorch has two generations of switches for it, and refuses to read one after the
    other was set.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    found, true = (a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double()
    return bool((found - true).norm() < 1e-5 * true.norm())

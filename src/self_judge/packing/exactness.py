"""Exactness: a small trial on the model itself shows whether another way of computing is right.

It compares logits and knows the precision they are computed in. It does not know the routes.
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

from self_judge.runtime import device_of, in_evaluation_mode, padded, unwrapped

# Allowed differences, as fractions of the largest logit. With SmolLM2 in bfloat16, another order of
# the same sums moves a logit by up to 2.8e-2; branches that see each other or tokens at wrong
# positions move one by 4e-1 and more.
_IN_FLOAT32 = 1e-4
_IN_LESS = 6e-2
# The errors that a model raises when it does not support a route. Their subclasses have other
# causes, such as full memory, a failed compilation or a lost device, and do not count.
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
    """Warns once for a model and its frozen copy."""
    logger.warning(text)


def as_called(model: nn.Module) -> Any:
    """The model as it is called: with its adapter, without the wrappers for several processes."""
    called: Any = model
    while not isinstance(called, PeftModel) and isinstance(
        getattr(called, "module", None), nn.Module
    ):
        called = called.module
    return called


def trial_tokens(model: nn.Module, count: int) -> list[int]:
    """Random token ids from the middle half of the vocabulary, the same each time."""
    size: int = unwrapped(model).get_input_embeddings().weight.shape[0]  # type: ignore
    first, stop = size // 4, max(size // 4 + 1, 3 * size // 4)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first, stop, (count,), generator=generator).tolist()


def padded_logits(called: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits `(T, V)` of each sequence, from one batch with right padding.

    A trial compares with these: such a batch uses the attention kernels for masks, as most routes
    do. A single sequence uses other kernels, whose bfloat16 results may differ by more than the
    tolerance.

    Args:
        called: see `as_called`.
    """
    inputs = padded(sequences, device_of(called))
    logits_BTV = called(**inputs, use_cache=False).logits
    return [row[: len(s)] for row, s in zip(logits_BTV, sequences, strict=True)]


@torch.no_grad()
def why_inexact(model: nn.Module, trial: Logits) -> str | None:
    """Runs a trial and returns why its route is not exact for the model; `None` if it is.

    The model runs as training and judging call it, in evaluation mode, under the current autocast
    and the model's own. The tolerance depends on the precision it computes in.

    Args:
        trial: returns the logits `(N, V)` of the route and the expected ones.

    Raises:
        Exception: an error with another cause than the model, such as full memory or a failed
            compilation. The trial can be run again.
    """
    device = next(model.parameters()).device
    # Entering Accelerate's autocast again inside itself would leave it on for good, so a model that
    # brings its own runs without an outer one.
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
        # Weights that autocast cast here have no gradient, and would be reused outside.
        torch.clear_autocast_cache()
    found, expected = found.float(), expected.float()
    off = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    tolerance = _IN_FLOAT32 if all(computes_in) else _IN_LESS
    if not off <= tolerance:
        return f"a trial differed by {off:.1e} of the largest logit"
    return None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[bool]]:
    """Yields a list that says for each call of the model if it computes in float32 or better."""
    inner: Any = unwrapped(model)
    device = next(inner.parameters()).device
    full: list[bool] = []

    def look(module: nn.Module, args: Any) -> None:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else inner.dtype
        full.append(
            dtype == torch.float64 or (dtype == torch.float32 and _multiplies_exactly(device))
        )

    # A hook inside every wrapper of the model's forward sees the autocast of all of them.
    hook = inner.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield full
    finally:
        hook.remove()


def _multiplies_exactly(device: torch.device) -> bool:
    """Whether float32 matrices are multiplied in float32, not in TF32 or bfloat16.

    It measures: PyTorch has two generations of switches for this, and refuses to read one after
    the other was set.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    found, true = (a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double()
    return bool((found - true).norm() < 1e-5 * true.norm())

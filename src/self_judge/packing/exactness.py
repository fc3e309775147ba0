"""Runs a small trial on the model itself to check whether a packing mode is exact.

This module compares logits with a tolerance that depends on their precision. It does not depend on
the packing modes.
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

from self_judge.runtime import (
    device_of,
    in_evaluation_mode,
    padded,
    unwrapped,
    without_cudnn_attention,
)

# The allowed differences, as fractions of the largest logit. For SmolLM2 in bfloat16, a different
# summation order changes a logit by up to 2.8e-2. Branches that attend to each other, or tokens at
# wrong positions, change a logit by 4e-1 or more.
_IN_FLOAT32 = 1e-4
IN_LESS = 6e-2
# The errors that a model raises if it does not support a packing mode. Subclasses of these errors
# do not count, because they have other causes, such as running out of memory, a failed compilation
# or a lost device.
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
    """Logs each warning only once, even if it applies to a model and to its frozen copy."""
    logger.warning(text)


def as_called(model: nn.Module) -> Any:
    """Returns the model with its adapter, but without the wrappers for distributed training."""
    called: Any = model
    while not isinstance(called, PeftModel) and isinstance(
        getattr(called, "module", None), nn.Module
    ):
        called = called.module
    return called


def trial_tokens(model: nn.Module, count: int) -> list[int]:
    """Returns random token ids from the middle half of the vocabulary, with a fixed seed."""
    table: Any = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
    for wrapped in ("base_layer", "original_module"):  # of LoRA, of other adapters
        table = getattr(table, wrapped, table)
    # A sharded weight can have another shape in each process.
    size: int = getattr(table, "num_embeddings", None) or table.weight.shape[0]
    first, stop = size // 4, max(size // 4 + 1, 3 * size // 4)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first, stop, (count,), generator=generator).tolist()


def padded_logits(called: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Computes the logits `(T, V)` of each sequence, in one right-padded batch.

    A trial compares its results with these logits. A padded batch uses attention kernels with a
    mask, as most packing modes do. A single sequence would use other kernels, whose bfloat16
    results may differ by more than the tolerance.

    Args:
        called: the result of `as_called`.
    """
    inputs = padded(sequences, device_of(called))
    with without_cudnn_attention():
        logits_BTV = called(**inputs, use_cache=False).logits
    return [row[: len(s)] for row, s in zip(logits_BTV, sequences, strict=True)]


@torch.no_grad()
def why_inexact(model: nn.Module, trial: Logits) -> str | None:
    """Runs a trial and returns why its results are not exact, or `None` if they are exact.

    The model runs in evaluation mode, under its own autocast if it has one, and otherwise under the
    current autocast context. The tolerance depends on the precision of the computation.

    Args:
        trial: a function that returns the logits `(N, V)` to check and the expected logits.

    Raises:
        Exception: an error that the model did not cause, such as running out of memory or a failed
            compilation. The trial can be run again.
    """
    device = next(model.parameters()).device
    # Accelerate's autocast would remain enabled permanently if it were nested. A model that has its
    # own autocast therefore runs without an outer one.
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
        # Autocast caches converted weights, and those from this trial have no gradient. If the
        # cache were not cleared, later computations would reuse them.
        torch.clear_autocast_cache()
    off = relative_difference(found.float(), expected.float())
    tolerance = _IN_FLOAT32 if all(computes_in) else IN_LESS
    if not off <= tolerance:
        return f"in a trial, logits differed by {off:.1e} times the largest logit"
    return None


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference as a fraction of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[bool]]:
    """Yields a list that records for each call whether the model computes in float32 or better."""
    inner: Any = unwrapped(model)
    device = next(inner.parameters()).device
    full: list[bool] = []
    # Measure the precision now, because this is not possible while a CUDA graph is being captured.
    exact = _multiplies_exactly(device)

    def look(module: nn.Module, args: Any) -> None:
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else inner.dtype
        full.append(dtype == torch.float64 or (dtype == torch.float32 and exact))

    # The embeddings are inside all wrappers of the model's forward method, so a hook there sees the
    # autocast context of every wrapper.
    hook = inner.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield full
    finally:
        hook.remove()


def _multiplies_exactly(device: torch.device) -> bool:
    """Returns whether float32 matrices are multiplied in float32 instead of TF32 or bfloat16.

    The precision is measured, because PyTorch has two kinds of settings for it and does not allow
    one kind to be read after the other has been set.
    """
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    found, true = (a.to(device) @ b.to(device)).cpu().double(), a.double() @ b.double()
    return bool((found - true).norm() < 1e-5 * true.norm())

"""Chooses the number of tokens in a forward pass by the kind of device and the model's width.

This module uses the shapes of a model's matrices and, on request, measures their speed. The number
of tokens does not depend on the input.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from self_judge.errors import ConfigError
from self_judge.storage.atomic import atomic_write, loads
from self_judge.storage.jsonl import entries_of

logger = logging.getLogger(__name__)

FILE = "batch_shape.json"
ASKED = "SELF_JUDGE_TOKENS_PER_PASS"
# Maps the minimum hidden size to the number of tokens in a pass. On two CPU cores, the matrices of
# SmolLM2-135M (hidden size 576) keep the cores busy at 512 tokens. Judging is 8% faster with
# passes of 1,024 tokens, and 2,048 tokens bring no further gain. Tiny models need 2,048 tokens to
# keep the cores busy. The numbers for other devices are estimates.
_ON_CPU = {0: 4096, 256: 1024}
_ELSEWHERE = {0: 16_384, 4096: 8192}
# An H100 computes this many tokens in the time that launching the kernels of a pass takes (about 1
# ms per layer, measured with Llama shapes in bfloat16). On a CPU, no kernels are launched.
_BUSY_ELSEWHERE = {0: 16_384, 1024: 4096, 4096: 2048}
_CANDIDATES = (256, 512, 1024, 2048, 4096, 8192, 16_384)
_SECONDS = 0.5
_GOOD_ENOUGH = 0.95

Measure = Callable[[list[torch.Tensor], int], float]
_SHARES: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
_MEASURED: dict[tuple[Any, ...], int] = {}  # keyed by the device, dtype and shapes of the matrices


def tokens_per_pass(inner: nn.Module) -> int:
    """Returns the number of tokens in a forward pass of a model.

    Sequences that share a pass affect the rounding of each other's results. The number therefore
    depends only on the kind of device and the width of the model, unless
    `$SELF_JUDGE_TOKENS_PER_PASS` is set to a number or to `measure` (see
    `measured_tokens_per_pass`).

    Args:
        inner: the model inside all wrappers.

    Raises:
        ConfigError: `$SELF_JUDGE_TOKENS_PER_PASS` is neither a positive number nor `measure`.
    """
    asked = os.environ.get(ASKED, "")
    if asked == "measure":
        # Measure only once: judging calls this before every pass, and a frozen copy of the model
        # must use the same number.
        kind = tuple(sorted((str(m.device), str(m.dtype), *m.shape) for m in _matrices(inner)))
        if kind not in _MEASURED:
            _MEASURED[kind] = measured_tokens_per_pass(inner)
        return _MEASURED[kind]
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"{ASKED} must be a number of tokens or 'measure', got {asked}")
        return int(asked)
    return _by_width(inner, _ON_CPU if _on_cpu(inner) else _ELSEWHERE)


def busy_tokens(inner: nn.Module) -> int:
    """Returns the minimum number of tokens that keeps the device busy during kernel launches.

    A pass with fewer tokens is not faster. On a CPU, the minimum is 0.

    Args:
        inner: the model inside all wrappers.
    """
    return 0 if _on_cpu(inner) else _by_width(inner, _BUSY_ELSEWHERE)


def _on_cpu(inner: nn.Module) -> bool:
    return next(inner.parameters()).device.type == "cpu"


def _by_width(inner: nn.Module, figures: dict[int, int]) -> int:
    config: Any = getattr(inner, "config", None)
    width = getattr(config.get_text_config(), "hidden_size", None) if config is not None else None
    return max((least, n) for least, n in figures.items() if least <= (width or 1024))[1]


def measured_tokens_per_pass(inner: nn.Module, measure: Measure | None = None) -> int:
    """Returns twice the token count at which the matrix products reach 95% of their peak rate.

    The factor of two covers the fixed cost of a pass. A new measurement may give a different
    number, and therefore different rounding.

    Args:
        inner: the model inside all wrappers.
        measure: a function that returns the tokens per second for a list of matrices and a token
            count. By default, the matrix products are timed.
    """
    matrices = _matrices(inner)
    if not matrices or matrices[0].device.type == "meta":  # all matrices are sharded or quantized
        return 1024
    tokens = min(2 * _smallest_good(matrices, measure or _tokens_per_second), _CANDIDATES[-1])
    logger.info("using %d tokens per forward pass, which keep the device busy", tokens)
    return tokens


def pinned_tokens_per_pass(inner: nn.Module, folder: str | Path) -> int:
    """Returns the `tokens_per_pass` of a run, the same for all processes and after a resume.

    Args:
        folder: the folder of the run. The main process reads or writes `batch_shape.json` there.
    """
    path = Path(folder) / FILE
    pinned = [0]
    if PartialState().is_main_process:
        if path.is_file():
            with entries_of(path, remedy=": delete this file"):
                pinned = [int(loads(path.read_bytes())["tokens"])]
        else:
            pinned = [tokens_per_pass(inner)]
            with atomic_write(path) as file:
                file.write(json.dumps({"tokens": pinned[0]}) + "\n")
    broadcast_object_list(pinned)
    return pinned[0]


def attention_share(inner: Any) -> float:
    """Returns the FLOPs for a query-key pair, divided by the FLOPs for a token in all matrices.

    With a context of L tokens, attention adds L times this ratio to the work for a token. Adapters
    are not counted, so the passes of a model are the same with and without adapters.
    """
    if inner not in _SHARES:
        _SHARES[inner] = _attention_share(inner)
    return _SHARES[inner]


def _attention_share(inner: Any) -> float:
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1)
    layers = getattr(config, "num_hidden_layers", 0)
    embedded = {
        id(p) for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    head = inner.get_output_embeddings()
    embedded |= {id(p) for p in head.parameters()} if head is not None else set()
    adapters = {
        id(p)
        for m in inner.modules()
        if isinstance(m, BaseTunerLayer)
        for name in m.adapter_layer_names
        for p in getattr(m, name).parameters()
    }
    skipped = embedded | adapters
    matrices = sum(p.numel() for p in inner.parameters() if p.dim() > 1 and id(p) not in skipped)
    return 2 * heads * size * layers / max(matrices, 1)


def _matrices(inner: nn.Module) -> list[torch.Tensor]:
    """Returns one matrix of each shape, except the LM head, which processes few tokens."""
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for module in inner.modules():
        if type(module) is nn.Linear and module is not head:
            weight = module.weight.detach()
            # A sharded weight may be flat or empty.
            whole = type(weight) is torch.Tensor and weight.dim() == 2 and weight.numel()
            if whole and weight.is_floating_point():
                found.setdefault(tuple(weight.shape), weight)
    return list(found.values())


def _smallest_good(matrices: list[torch.Tensor], measure: Measure) -> int:
    started = time.perf_counter()
    rates: dict[int, float] = {}
    for tokens in _CANDIDATES:
        rates[tokens] = measure(matrices, tokens)
        if time.perf_counter() - started > _SECONDS:
            break
    best = max(rates.values())
    return next(tokens for tokens, rate in rates.items() if rate >= _GOOD_ENOUGH * best)


@torch.no_grad()
def _tokens_per_second(matrices: list[torch.Tensor], tokens: int) -> float:
    inputs = [torch.ones(tokens, m.shape[1], dtype=m.dtype, device=m.device) for m in matrices]

    def once() -> float:
        started = time.perf_counter()
        for x, matrix in zip(inputs, matrices, strict=True):
            nn.functional.linear(x, matrix)
        if matrices[0].is_cuda:
            torch.cuda.synchronize(matrices[0].device)
        return time.perf_counter() - started

    once()
    # Use the best of three measurements, because other programs on the machine can only slow down a
    # measurement.
    return tokens / min(once() for _ in range(3))

"""How many tokens a forward pass should hold: measured on the device that it runs on.

It knows a model's matrices and a clock, not what the tokens are or how they are laid out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from self_judge.storage.atomic import atomic_write

logger = logging.getLogger(__name__)

FILE = "batch_shape.json"
# Where nothing can be measured: sharded or quantized matrices.
_DEFAULT = {"cpu": 1024}
_DEFAULT_ELSEWHERE = 16_384
_CANDIDATES = (256, 512, 1024, 2048, 4096, 8192, 16_384)
_SECONDS = 0.5
_GOOD_ENOUGH = 0.95

Measure = Callable[[list[torch.Tensor], int], float]
_MEASURED: dict[tuple[object, ...], int] = {}


def busy_tokens(inner: nn.Module, measure: Measure | None = None) -> int:
    """How many tokens a pass should hold: twice the fewest that keep the model's matrices busy.

    Busy is 95 % of the best rate. A pass also has a price that does not depend on its tokens, and
    small work between the matrices: on two CPU cores with a model of 135M, passes of 1,024 tokens
    were 8 % faster than the 512 at which the matrices were busy, and 2,048 no faster.

    Measured once per machine for all models of one shape, dtype and device, in half a second:
    which sequences share a pass is part of the rounding of their numbers, so that runs of the same
    seed must find the same figure. It is kept under `$SELF_JUDGE_CACHE` (default:
    `~/.cache/self_judge`), where it can be.

    Args:
        inner: the model under all wrappers.
        measure: gives the tokens per second of some matrices (default: by the clock).
    """
    device = next(inner.parameters()).device
    matrices = _matrices(inner)
    if not matrices or device.type == "meta":
        return _DEFAULT.get(device.type, _DEFAULT_ELSEWHERE)
    shapes = tuple(sorted(tuple(m.shape) for m in matrices))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    key = (device.type, name, str(matrices[0].dtype), shapes)
    if key not in _MEASURED:
        kept = _cache() / f"batch-shape-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
        _MEASURED[key] = _kept_or(
            kept, lambda: _smallest_good(matrices, measure or _tokens_per_second)
        )
        logger.info("%d tokens keep the matrices busy on %s", _MEASURED[key], device)
    return min(2 * _MEASURED[key], _CANDIDATES[-1])


def _cache() -> Path:
    return Path(os.environ.get("SELF_JUDGE_CACHE", "~/.cache/self_judge")).expanduser()


def _kept_or(path: Path, measured: Callable[[], int]) -> int:
    """The figure in a file; else a new one, which goes there. The first to write wins."""
    if path.is_file():
        return int(json.loads(path.read_text(encoding="utf-8"))["tokens"])
    tokens = measured()
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"tokens": tokens}) + "\n", encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        aside.unlink()
        return int(json.loads(path.read_text(encoding="utf-8"))["tokens"])
    except OSError as error:
        logger.warning("the measured size of a pass is not kept: %s", error)
        return tokens


def settled_tokens(inner: nn.Module, folder: str | Path) -> int:
    """`busy_tokens` of a run, the same for all its processes and after a resume.

    Which sequences share a pass is part of the rounding of their numbers, so a run that goes on
    must go on in the same passes: the figure is kept in the run's folder.

    Args:
        folder: the run's folder; the first process reads or writes `batch_shape.json` there.
    """
    path = Path(folder) / FILE
    settled = [0]
    if PartialState().is_main_process:
        if path.is_file():
            settled = [int(json.loads(path.read_text(encoding="utf-8"))["tokens"])]
        else:
            settled = [busy_tokens(inner)]
            with atomic_write(path) as file:
                file.write(json.dumps({"tokens": settled[0]}) + "\n")
    broadcast_object_list(settled)
    return settled[0]


def _matrices(inner: nn.Module) -> list[torch.Tensor]:
    """One matrix of every shape, but for the head, which sees few tokens."""
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for module in inner.modules():
        if type(module) is nn.Linear and module is not head:
            weight = module.weight.detach()
            # A shard may be flat, or empty.
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
    # The best of three: whatever else runs on the machine only ever slows one down.
    return tokens / min(once() for _ in range(3))

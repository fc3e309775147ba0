"""What every part measures with: findings as JSON lines, clocks, memory, ceilings, floors."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Check:
    """One part of the check, as its own process sees it.

    Attributes:
        part: its name.
        out: the folder of the findings.
        data: the folder of the HH files.
        model: the folder of SmolLM2, whose tokenizer serves all shapes.
        aside: a folder for what nobody needs afterwards.
        shapes: names in `project.SHAPES`.
        tiny: a dry run, on the CPU.
        started: `time.monotonic()` at the start of the whole check.
        deadline: when this part is ended, by the same clock.
    """

    part: str
    out: Path
    data: Path
    model: Path
    aside: Path
    shapes: tuple[str, ...] = ("smollm2", "1b", "7b")
    tiny: bool = False
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    def left(self) -> float:
        """Seconds until this part is ended."""
        return self.deadline - time.monotonic()

    def say(self, **values: Any) -> None:
        """Prints a finding, and adds it to the results."""
        passed = round(time.monotonic() - self.started, 1)
        line = json.dumps({"part": self.part, "t": passed, **values}, default=str)
        print(line, file=sys.__stdout__, flush=True)
        with (self.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def errors_told(self, **about: Any) -> Iterator[None]:
        """Within, an error is a finding, and no end."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:600]
            self.say(**about, error=text, where=_where(error))
        finally:
            clean()


def _where(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-6:]


# -- clocks and memory -----------------------------------------------------------------------------


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clean() -> None:
    """Gives unused memory back, and counts the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gib(size: float) -> float:
    return round(size / 2**30, 2)


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    """Bytes allocated at most since `clean`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, device included, and what it gave."""
    sync()
    started = time.perf_counter()
    result = work()
    sync()
    return time.perf_counter() - started, result


class Timed(NamedTuple):
    """Seconds of a first call, in which kernels are made, and the median of later ones."""

    seconds: float
    first: float
    result: Any


def timed(check: Check, work: Callable[[], Any], rounds: int = 3) -> Timed:
    """As many rounds as there is time for, one at least."""
    first, result = seconds_of(work)
    times: list[float] = []
    wanted = 1 if check.tiny else rounds
    while not times or (len(times) < wanted and check.left() > 2 * times[-1]):
        times.append(seconds_of(work)[0])
    return Timed(statistics.median(times), first, result)


def with_and_without_cudnn() -> tuple[bool, ...]:
    """What `cudnn_attention` can be: without a GPU, one thing."""
    return (True, False) if torch.cuda.is_available() else (False,)


@contextlib.contextmanager
def cudnn_attention(on: bool) -> Iterator[None]:
    """Within, PyTorch's attention may or may not choose cuDNN's kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# -- ceilings and floors ---------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What the device does at best: FLOPs, and bytes read or written, per second."""

    flops: float
    bytes: float


def ceilings(check: Check) -> Ceilings:
    """Of a large matrix product and of a copy; measured once, kept beside the findings."""
    kept = check.out / "ceilings.json"
    if kept.is_file():
        return Ceilings(*json.loads(kept.read_text(encoding="utf-8")))
    size, values = (256, 2**20) if check.tiny else (8192, 2**30)
    draw = {"device": check.device, "dtype": check.dtype}
    left, right = (torch.randn(size, size, **draw) for _ in range(2))  # type: ignore[call-overload]
    product = timed(check, lambda: [left @ right for _ in range(10)]).seconds
    source = torch.randn(values, **draw)  # type: ignore[call-overload]
    target = torch.empty_like(source)
    copy = timed(check, lambda: [target.copy_(source) for _ in range(10)]).seconds
    found = Ceilings(10 * 2.0 * size**3 / product, 10 * 2.0 * source.nbytes / copy)
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


class Floor(NamedTuple):
    """The least that a piece of work takes: its FLOPs or its bytes at the device's best rate."""

    flops: float
    bytes: float

    def seconds(self, check: Check) -> float:
        best = ceilings(check)
        return max(self.flops / best.flops, self.bytes / best.bytes)


def weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())

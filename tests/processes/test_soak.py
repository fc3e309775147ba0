"""Hours in minutes: memory and open files stay where they are after the first part of the work."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Make
from self_judge import Comparison

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def resident() -> float:
    """MiB of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def grows(work: Callable[[int], object], times: int, warm: int) -> tuple[float, int]:
    """By how much memory (as a share) and open files grow once `warm` rounds are over."""
    for i in range(warm):
        work(i)
    memory, files = resident(), open_files()
    for i in range(warm, times):
        work(i)
    return resident() / memory - 1, open_files() - files


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_twenty_thousand_judgments_take_no_more_memory_than_five_thousand(make: Make) -> None:
    judge = make().judge

    def work(i: int) -> None:
        judge.compare(
            [
                Comparison(f"what is {i} and {k}?", f"it is {k}" * (1 + k % 5), f"no, {i}")
                for k in range(500)
            ]
        )

    memory, files = grows(work, times=40, warm=10)
    print(f"20,000 judgments: memory {memory:+.1%}, open files {files:+d}")
    assert memory < 0.05
    assert files <= 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_hundred_steps_take_no_more_memory_than_fifty(make: Make) -> None:
    from transformers import TrainerCallback

    found: list[tuple[float, int]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step in (50, 200):  # type: ignore[attr-defined]
                found.append((resident(), open_files()))

    trainer = make(max_steps=200, save_strategy="steps", save_steps=20, save_total_limit=2)
    trainer.add_callback(Watch())
    trainer.train()
    (memory, files), (later, more) = found
    print(f"200 steps: memory {later / memory - 1:+.1%}, open files {more - files:+d}")
    assert later < 1.05 * memory
    assert more <= files

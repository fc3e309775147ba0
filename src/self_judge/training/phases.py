"""The phases of an optimizer step and how long each takes, over all processes.

It knows names and clocks. It does not know what is done in a phase.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

# In the order of a step. `waiting`: for the slowest process, between judging and the update.
PHASES = ("sampling", "judging", "reference", "waiting", "update")


class StepClock(TrainerCallback):
    """Times the phases of each optimizer step and logs them when the step ends.

    `time/<phase>` is the time of the slowest process in seconds; of `waiting` it is the longest
    wait. `tokens_per_second/sampling` and `tokens_per_second/step` are sampled tokens of all
    processes, over the time of sampling and of the whole step.

    Args:
        accelerator: joins the processes' times.
        metrics: lists of values by name, to which each step's are added.
    """

    def __init__(self, accelerator: Accelerator, metrics: Any) -> None:
        self.accelerator = accelerator
        self.metrics = metrics
        self.tokens = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._rolled_out: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what happens inside as a part of this phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def rolled_out(self, tokens: int) -> None:
        """The rollout has ended, after so many sampled tokens of this process: the update begins.

        Every process must call it: it waits for the slowest.
        """
        with self.phase("waiting"):
            self.accelerator.wait_for_everyone()
        self.tokens = tokens
        self._rolled_out = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what was timed outside of the training loop."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._rolled_out = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the step's times to the metrics."""
        if self._rolled_out is None:
            return
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds["update"] = time.perf_counter() - self._rolled_out
        own = torch.tensor([*self.seconds.values(), float(self.tokens)], device=device)
        every = self.accelerator.gather(own[None])
        slowest = dict(zip(PHASES, every[:, :-1].max(0).values.tolist(), strict=True))
        # Who waits is not the slowest: a step lasts as long as its work in the slowest process.
        step = every[:, :-1].sum(1).max().item()
        tokens = every[:, -1].sum().item()
        for name, seconds in slowest.items():
            self.metrics[f"time/{name}"].append(seconds)
        self.metrics["tokens_per_second/sampling"].append(tokens / max(slowest["sampling"], 1e-9))
        self.metrics["tokens_per_second/step"].append(tokens / max(step, 1e-9))
        self._rolled_out = None

"""A live line for a training phase: how far it is, how long it takes, and the numbers that matter.

On a terminal it moves; in a pipe or a file it is a plain line per log. It knows what the trainers
log. It changes nothing about training.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from self_judge.console import neutral

# What is logged -> what it is called on the line, in this order. A narrow terminal shows the first.
_SHOWN = {
    "loss": "loss",
    "judge/margin": "judge margin",
    "judge/order_agreement": "orders agree",
    "judge/undecidable": "undecidable",
    "rewards/accuracies": "reward accuracy",
    "completions/mean_length": "tokens",
    "objective/kl": "KL",
    "mean_token_accuracy": "token accuracy",
    "grad_norm": "gradient",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out reward accuracy",
}


class _WithNumbers(Progress):
    """A bar with a line of numbers below it."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield Text(f"  {self.numbers}", style="dim", no_wrap=True, overflow="ellipsis")


class LiveProgress(TrainerCallback):
    """One bar for one call of `train`, in place of the Trainer's own bar and printed dictionaries.

    Args:
        title: what is going on.
        console: where to draw; where it is not a terminal, every log is a line of text.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title = neutral(title)
        self.console = console
        self.latest: dict[str, float] = {}
        self.bar = _WithNumbers(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def attach(self, trainer: Trainer) -> None:
        """Takes the place of the callbacks that print."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.begun, self.first = time.perf_counter(), state.global_step
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.console.is_terminal:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        self.latest.update((key, logs[key]) for key in _SHOWN if key in logs)
        if self.console.is_terminal:
            self.bar.numbers = _numbers(self.latest)
        else:
            self.console.print(
                f"{self.title.strip()}: {self._pace(state)}; {_numbers(logs)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the terminal as it was; to be called where training ends with an error."""
        if self.console.is_terminal:
            self.bar.stop()

    def _pace(self, state: Any) -> str:
        done = state.global_step - self.first
        seconds = (time.perf_counter() - self.begun) / max(done, 1)
        left = timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return f"step {state.global_step}/{state.max_steps}, {seconds:.3g} s a step, {left} left"


def _numbers(logs: dict[str, float]) -> str:
    # Self-training logs the token accuracy too; there it says little.
    left_out = {"mean_token_accuracy"} if "judge/margin" in logs else set()
    shown = [(key, name) for key, name in _SHOWN.items() if key in logs and key not in left_out]
    return " · ".join(f"{name} {logs[key]:.3g}" for key, name in shown)

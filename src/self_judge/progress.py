"""A live line for a training phase: how far it is, how long it takes, and the numbers that matter.

It knows what the trainers log. It changes nothing about training.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

# What is logged -> what it is called on the line, in this order; the first two found are shown.
_SHOWN = {
    "judge/margin": "judge margin",
    "rewards/accuracies": "reward accuracy",
    "completions/mean_length": "tokens",
    "loss": "loss",
    "grad_norm": "gradient",
}


class LiveProgress(TrainerCallback):
    """One bar for one call of `train`, in place of the Trainer's own bar and printed dictionaries.

    Args:
        title: what is going on.
        console: where to draw; nothing moves where it is not a terminal.
    """

    def __init__(self, title: str, console: Console) -> None:
        self.title = title
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[numbers]}"),
            console=console,
        )

    def attach(self, trainer: Trainer) -> None:
        """Takes the place of the callbacks that print."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, numbers=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        numbers = [f"{name} {logs[key]:.3g}" for key, name in _SHOWN.items() if key in logs]
        self.bar.update(self.task, numbers=" · ".join(numbers[:2]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()

"""Callbacks for both trainers: a run log, times, a progress bar, and stopping on SIGTERM.

Like the integrations of experiment trackers, these callbacks only receive the trainer's events.
They do not change training.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
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
from transformers.trainer_utils import IntervalStrategy

from self_judge import __version__
from self_judge.console import masked, neutral
from self_judge.storage.atomic import atomic_write
from self_judge.storage.run_dir import METRICS, RUN, append_line, rewind

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


class RunLog(TrainerCallback):
    """Writes `run.json` when training begins, and adds a line to `metrics.jsonl` at every log.

    When a run resumes from a checkpoint, the lines for the steps after the checkpoint are removed,
    because those steps run again.

    Args:
        kind: the kind of run, `jsft` or `self_judge`.
        about: additional entries for `run.json`, such as the judge templates.

    Attributes:
        run_file: the run's configuration, if there is a run file.
    """

    def __init__(self, kind: str, about: Mapping[str, Any] | None = None) -> None:
        self.kind = kind
        self.about = dict(about or {})
        self.run_file: Mapping[str, Any] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        rewind(folder, state.global_step)
        with atomic_write(folder / RUN) as file:
            # Values that JSON cannot represent (a dtype, an enum) are written as strings.
            json.dump(masked(self._described(args, state, model)), file, indent=2, default=str)
            file.write("\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs the last step, even if `logging_steps` would omit it."""
        by_steps = args.logging_strategy == IntervalStrategy.STEPS
        if by_steps and state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        numbers = {
            key: value
            for key, value in logs.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        line = {"step": state.global_step, "time": round(time.time(), 3), **numbers}
        append_line(Path(args.output_dir) / METRICS, line)

    def _described(self, args: Any, state: Any, model: Any) -> dict[str, Any]:
        parameters = list(model.parameters()) if model is not None else []
        return {
            "kind": self.kind,
            "self_judge": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_at_step": state.global_step or None,
            "max_steps": state.max_steps,
            "model": str(getattr(getattr(model, "config", None), "name_or_path", "")) or None,
            "parameters": {
                # Sharded parameters are empty here. DeepSpeed stores their size in `ds_numel`.
                "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
                "trained": sum(
                    getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad
                ),
            },
            "processes": args.world_size,
            "device": str(args.device),
            **self.about,
            "run_file": self.run_file,
            "changed_arguments": _changed(args),
            "arguments": args.to_dict(),  # `to_dict` masks access tokens
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "platform": platform.platform(),
        }


def _changed(args: Any) -> dict[str, Any]:
    """Returns the arguments that differ from the defaults of their class."""
    values = args.to_dict()
    changed = {}
    for field in dataclasses.fields(args):
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if getattr(args, field.name) != default and field.name in values:
            changed[field.name] = values[field.name]
    return changed


# The phases of a step, in order. In the `waiting` phase, a process waits for the slowest process
# before the update.
PHASES = ("sampling", "judging", "reference", "waiting", "update")


class StepClock(TrainerCallback):
    """Times the phases of each optimizer step and logs them when the step ends.

    `time/<phase>` is the number of seconds that the slowest process spends in the phase.
    `tokens_per_second/sampling` and `tokens_per_second/step` are the number of tokens sampled by
    all processes, divided by the time of the sampling phase and of the whole step, respectively.

    Args:
        accelerator: gathers the times from all processes.
        metrics: lists of values by name. Each step appends its values to these lists.
    """

    def __init__(self, accelerator: Accelerator, metrics: Any) -> None:
        self.accelerator = accelerator
        self.metrics = metrics
        self.tokens = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._rolled_out: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of the `with` block to the phase `name`."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def rolled_out(self, tokens: int) -> None:
        """Marks the end of the rollout, and waits until all processes have finished their rollouts.

        Args:
            tokens: the number of tokens that this process sampled.
        """
        with self.phase("waiting"):
            self.accelerator.wait_for_everyone()
        self.tokens = tokens
        self._rolled_out = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resets the times, because they may include work outside the training loop."""
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
        # The phases of each process, including waiting, add up to the whole step. The maximum of
        # these sums is the step's time. The sum of the maxima would count some waiting twice.
        step = every[:, :-1].sum(1).max().item()
        tokens = every[:, -1].sum().item()
        for name, seconds in slowest.items():
            self.metrics[f"time/{name}"].append(seconds)
        self.metrics["tokens_per_second/sampling"].append(tokens / max(slowest["sampling"], 1e-9))
        self.metrics["tokens_per_second/step"].append(tokens / max(step, 1e-9))
        self._rolled_out = None


# Metrics and their names on the progress line, in order. A narrow terminal shows only the first
# ones.
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
    """A progress bar with a line of numbers below it."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            yield Text(f"  {self.numbers}", style="dim", no_wrap=True, overflow="ellipsis")


class LiveProgress(TrainerCallback):
    """Shows one bar per call of `train`, instead of the Trainer's bar and printed dictionaries.

    Args:
        title: the label of the bar.
        console: the console to print to. If the console is not a terminal, every log is printed as
            one line of text.
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
        """Replaces the trainer's own printing callbacks with this one."""
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
            self.bar.numbers = shown_metrics(self.latest)
        else:
            self.console.print(
                f"{self.title.strip()}: {self._pace(state)}; {shown_metrics(logs)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Restores the terminal. Call this method if training ends with an error."""
        if self.console.is_terminal:
            self.bar.stop()

    def _pace(self, state: Any) -> str:
        done = state.global_step - self.first
        seconds = (time.perf_counter() - self.begun) / max(done, 1)
        left = timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return f"step {state.global_step}/{state.max_steps}, {seconds:.3g} s per step, {left} left"


def shown_metrics(logs: Mapping[str, float]) -> str:
    """Returns the most important metrics of a log as one line."""
    # Self-training also logs the token accuracy, but it is not a useful metric for preference
    # pairs.
    left_out = {"mean_token_accuracy"} if "judge/margin" in logs else set()
    shown = [(key, name) for key, name in _SHOWN.items() if key in logs and key not in left_out]
    return " · ".join(f"{name} {logs[key]:.3g}" for key, name in shown)


class StopAfterStep(TrainerCallback):
    """Saves a checkpoint and ends training after the step in which any process receives SIGTERM.

    Attributes:
        asked: whether this process received the signal.
        stopped: whether training ended because of the signal.
    """

    # The processes may receive the signal in different steps, so they synchronize after each step:
    #
    #   process 0     step 7 ... step 8 ... SIGTERM ... step 9 ends: trigger ─┐
    #   process 1     step 7 ... step 8 ............... step 9 ends ──────────┴─> both save and stop

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.asked = False
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = self.asked
        if self.accelerator.num_processes > 1:
            if asked:
                self.accelerator.set_trigger()
            asked = self.accelerator.check_trigger()
        if asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def stopping(trainer: Any) -> Iterator[None]:
    """Makes SIGTERM end training after the current step; see `FaultToleranceMixin.stopped_early`.

    This has no effect outside the main thread, because only the main thread receives signals. It
    also has no effect with Transformers' `enable_jit_checkpoint`, which uses its own handler.
    """
    trainer.stopped_early = False
    own = trainer.stop_on_sigterm and threading.current_thread() is threading.main_thread()
    if not own or getattr(trainer.args, "enable_jit_checkpoint", False):
        yield
        return
    stop = StopAfterStep(trainer.accelerator)

    def asked(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, asked)
    trainer.add_callback(stop)
    try:
        yield
    finally:
        trainer.remove_callback(stop)
        signal.signal(signal.SIGTERM, before)
        trainer.stopped_early = stop.stopped


class _AtStart(TrainerCallback):
    def __init__(self, then: Callable[[], object]) -> None:
        self.then = then

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.then()


@contextmanager
def at_the_start(trainer: Any, then: Callable[[], object]) -> Iterator[None]:
    """Calls a function when the training loop begins, with the weights in place and unchanged."""
    start = _AtStart(then)
    trainer.add_callback(start)
    try:
        yield
    finally:
        trainer.remove_callback(start)

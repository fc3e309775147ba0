"""What a person sees while a model trains: a moving bar, or plain lines where nothing can move."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from self_judge.training.callbacks import LiveProgress


def state(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=4, is_world_process_zero=True)


def followed(console: Console, **numbers: float) -> LiveProgress:
    progress = LiveProgress("self-training", console)
    progress.on_train_begin(None, state(0), None)
    progress.on_step_end(None, state(1), None)
    progress.on_log(None, state(1), None, logs={"loss": 0.6931, **numbers})
    return progress


def test_in_a_pipe_every_log_is_one_plain_line() -> None:
    text = io.StringIO()
    progress = followed(
        Console(file=text, width=40),
        **{"judge/margin": 0.125, "judge/undecidable": 0.0, "objective/kl": 1.5, "other": 1.0},
    )
    progress.on_log(None, state(2), None, logs={"eval_loss": 0.5})
    progress.on_log(None, state(4), None, logs={"train_runtime": 3.0})
    progress.on_train_end(None, state(4), None)
    first, second = text.getvalue().splitlines()
    assert first.startswith("self-training: step 1/4, ")
    assert first.endswith("; loss 0.693 · judge margin 0.125 · undecidable 0 · KL 1.5")
    assert "s per step, 0:00:0" in first
    assert second.endswith("; held-out loss 0.5")
    assert "\x1b" not in text.getvalue()


def test_on_a_terminal_the_numbers_stand_below_the_bar_and_stay() -> None:
    text = io.StringIO()
    console = Console(file=text, width=60, force_terminal=True, color_system=None)
    progress = followed(console, **{"judge/margin": 0.125})
    progress.on_log(None, state(2), None, logs={"eval_loss": 0.5})
    progress.on_step_end(None, state(2), None)
    progress.on_train_end(None, state(4), None)
    shown = text.getvalue()
    assert "2/4" in shown
    assert "loss 0.693 · judge margin 0.125 · held-out loss 0.5" in shown


def test_a_narrow_terminal_keeps_one_line_of_numbers() -> None:
    text = io.StringIO()
    console = Console(file=text, width=30, force_terminal=True, color_system=None)
    followed(console, **{"judge/margin": 0.125, "grad_norm": 1.0}).stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
    last = shown.rstrip().splitlines()[-1]
    assert len(last) <= 30
    assert "loss 0.693 · judge" in last
    assert "…" in last


def test_an_error_in_training_gives_the_cursor_back() -> None:
    text = io.StringIO()
    progress = followed(Console(file=text, width=60, force_terminal=True))
    progress.stop()
    assert text.getvalue().count("\x1b[?25l") == text.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("other", [PrinterCallback, ProgressCallback])
def test_it_takes_the_place_of_what_prints_otherwise(other: Any) -> None:
    removed, added = [], []
    trainer: Any = SimpleNamespace(remove_callback=removed.append, add_callback=added.append)
    progress = LiveProgress("JSFT", Console(quiet=True))
    progress.attach(trainer)
    assert other in removed
    assert added == [progress]

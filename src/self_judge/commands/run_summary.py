"""Summarizes a training run: time, last metrics, judge accuracy before and after, conclusions.

`train.py` calls this module at the start and at the end of a run. The rules for conclusions are in
`evaluation.conclusions`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments

from self_judge.console import masked, print_conclusions
from self_judge.console import say as print_line
from self_judge.data.sources import PreferenceData
from self_judge.datatypes import Comparison, stable_seed
from self_judge.evaluation.conclusions import as_json, judge_gain
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.evaluation.statistics import labeled_comparisons
from self_judge.judging.judge import Judge
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_prompt import encode_orders
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.reporting.collect import run_conclusions
from self_judge.storage.atomic import loads, write_json
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import METRICS, SUMMARY
from self_judge.training.callbacks import shown_metrics
from self_judge.training.identity.shards import is_sharded
from self_judge.training.setup import Say

MAX_PAIRS = 200
MIN_PAIRS = 20  # a measurement with fewer pairs is not worth its time
SHARE = 0.05  # of the run's time
# A training step has a forward pass and a backward pass, which costs about two forward passes.
_PASSES_PER_STEP = 3

# A comparison in which response `a` is better, and the principle of the label.
LabeledPair = tuple[Comparison, str | None]


@dataclass
class JudgeAccuracy:
    """Measures the judge's accuracy on held-out pairs before and after training.

    Args:
        encoder, templates, letters: the judge's settings.
        pairs: comparisons in which response `a` is better, with the principle of the label.
        max_length: the maximum number of tokens in a judge prompt.
    """

    encoder: ChatEncoder
    templates: JudgeTemplates
    letters: tuple[int, int]
    pairs: Sequence[LabeledPair]
    max_length: int | None = None

    def measure(self, model: torch.nn.Module) -> dict[str, Any]:
        """Returns the metrics from `JudgeTally.report`. The random state does not change."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            judge = Judge(
                model,
                self.encoder,
                self.templates,
                token_id_a=self.letters[0],
                token_id_b=self.letters[1],
                max_length=self.max_length,
            )
            verdicts = judge.compare([comparison for comparison, _ in self.pairs])
        principles = self.templates.principles
        tally = JudgeTally(principles)
        for (comparison, principle), verdict in zip(self.pairs, verdicts, strict=True):
            place = None if principle is None else principles.index(principle)
            lengths = len(comparison.response_a), len(comparison.response_b)
            tally.add(JudgedPair("a", verdict, place, lengths))
        return tally.report()


def judge_accuracy(
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    letters: tuple[int, int],
    held_out: PreferenceData | None,
    args: TrainingArguments,
    max_length: int | None,
    trained_tokens: float,
    say: Say,
) -> JudgeAccuracy | None:
    """Returns the measurement for a run, or says why there is none.

    Args:
        trained_tokens: the number of tokens in all training steps.
    """
    if is_sharded(args):
        reason = "the model is sharded over processes: use self-judge eval after training"
    elif held_out is None:
        reason = "nothing is held out: set dataset.held_out or dataset.eval"
    else:
        every = labeled_comparisons(held_out.records)
        usable = [(pair, label) for pair, label in every if label is None or label in templates]
        pairs = _drawn(usable, encoder, templates, max_length, trained_tokens, args.seed)
        if len(pairs) >= MIN_PAIRS:
            return JudgeAccuracy(encoder, templates, letters, pairs, max_length)
        there = f"there are {len(usable)}: raise dataset.held_out, or evaluate other pairs"
        if len(usable) >= MIN_PAIRS:
            there = f"only {len(pairs)} can be judged in {SHARE:.0%} of the run's time: evaluate"
        reason = f"it needs {MIN_PAIRS} held-out pairs, and {there} with self-judge eval"
    say(f"judge accuracy is not measured: {reason}")
    return None


def _drawn(
    usable: Sequence[LabeledPair],
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    max_length: int | None,
    trained_tokens: float,
    seed: int,
) -> list[LabeledPair]:
    """Draws at most 200 pairs that can be judged twice in 5% of the run's time.

    Times are estimated from numbers of tokens, so the pairs do not depend on the machine.
    """
    pairs = list(usable)
    random.Random(stable_seed(seed, "judge accuracy")).shuffle(pairs)
    left = SHARE * _PASSES_PER_STEP * trained_tokens
    drawn: list[LabeledPair] = []
    for comparison, principle in pairs[:MAX_PAIRS]:
        orders = (encode_orders(encoder, templates, p, comparison, max_length) for p in templates)
        left -= 2 * sum(len(ids) for both in orders for ids in both or ())
        if left < 0:
            break
        drawn.append((comparison, principle))
    return drawn


@dataclass
class RunSummary:
    """Writes `summary.json` and prints what a run came to.

    Args:
        folder: the run's output folder.
        console: the console for the summary.
        judge: measures the judge's accuracy, or `None`.
    """

    folder: Path
    console: Console
    judge: JudgeAccuracy | None = None
    before: Mapping[str, Any] | None = field(default=None, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)
    _resumed: bool = field(default=False, init=False)
    _begun: float = field(default_factory=time.time, init=False)

    def start(self, model: Any, *, resumed: bool) -> None:
        """Measures the judge before the first step, or reads its accuracy if the run resumes."""
        if self.judge is not None and resumed:
            try:
                self.before = loads((self.folder / SUMMARY).read_bytes())["judge"]["before"]
            except (OSError, LookupError, TypeError, ValueError):
                print_line(
                    self.console, f"{self.folder / SUMMARY} has no judge accuracy before training"
                )
        elif self.judge is not None:
            self.before = self.judge.measure(model)
            write_json(self.folder / SUMMARY, {"judge": {"before": self.before}})
        self._begun, self._resumed = time.time(), resumed

    def write(self, model: Any, next_command: str) -> None:
        """Measures the judge after the last step, and writes the summary.

        Call this method before the model is saved, because the model card shows the accuracy.

        Args:
            next_command: the command that continues with this run's model.
        """
        seconds = time.time() - self._begun
        lines = list(read_lines(self.folder / METRICS))
        last = {key: value for line in lines for key, value in line.items()}
        conclusions = as_json(run_conclusions(self.folder))
        judged = None
        if self.judge is not None:
            after = self.judge.measure(model)
            judged = {"before": self.before, "after": after}
            conclusions += as_json(judge_gain(self.before or {}, after))
        self.summary = {
            "steps": last.get("step"),
            "seconds": round(seconds, 1),
            "tokens_per_second": _tokens_per_second(
                [line for line in lines if line["time"] >= self._begun]
            ),
            "metrics": last,
            "judge": judged,
            "conclusions": conclusions,
            "next": next_command,
        }
        write_json(self.folder / SUMMARY, masked(self.summary))

    def show(self) -> None:
        """Prints the summary."""
        summary, pace = self.summary, self.summary["tokens_per_second"]
        print_line(
            self.console,
            f"{summary['steps'] or 0:,} steps{'; this call took' if self._resumed else ' in'} "
            f"{timedelta(seconds=round(summary['seconds']))}"
            + (f", {pace:,.0f} tokens per second" if pace else "")
            + f"; last logged: {shown_metrics(summary['metrics'])}",
        )
        print_conclusions(self.console, summary["conclusions"])
        print_line(self.console, f"next: {summary['next']}")


def _tokens_per_second(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the pace of this call: logged by self-training, and counted by TRL in JSFT."""
    paces = [line["tokens_per_second/step"] for line in lines if "tokens_per_second/step" in line]
    if paces:
        return round(float(paces[-1]), 1)
    counted = [line for line in lines if "num_tokens" in line]
    if len(counted) < 2 or counted[-1]["time"] <= counted[0]["time"]:
        return None
    tokens = counted[-1]["num_tokens"] - counted[0]["num_tokens"]
    return round(tokens / (counted[-1]["time"] - counted[0]["time"]), 1)

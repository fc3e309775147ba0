"""Logs rollouts as metrics over all processes, one file per step, and a table on the console.

This module reads judged pairs. It does not sample, judge or train.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from self_judge.console import Terminal, masked, neutral
from self_judge.datatypes import Verdict
from self_judge.judging.voting import under_principle
from self_judge.prompting.thoughts import NO_ANSWER
from self_judge.storage.atomic import atomic_write
from self_judge.storage.run_dir import rollout_file, thin_rollouts
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.rollouts import Rollout


def rollout_totals(rollouts: Sequence[Rollout], principles: Sequence[str]) -> dict[str, float]:
    """Returns sums over rollouts, from which `rollout_metrics` computes the means."""
    decided = [r.verdict for r in rollouts if r.decided and r.verdict is not None]
    judged = [r.verdict for r in rollouts if r.verdict is not None and r.verdict.is_judged]
    both = [x for r in rollouts for x in (r.chosen, r.rejected)]
    thoughts = [x.thought_length for x in both if x.thought is not None]
    totals = {
        "pairs": float(len(rollouts)),
        "decided": float(len(decided)),
        "judged": float(len(judged)),
        "margin": math.fsum(v.margin for v in decided),
        "orders_agree": float(sum(v.orders_agree for v in judged)),
        "mass": math.fsum(_letter_mass(v) for v in decided),
        "broken": float(sum(is_broken(r) for r in rollouts)),
        "responses": float(len(both)),
        "tokens": float(sum(x.answer_length for x in both)),
        "finished": float(sum(x.finished for x in both)),
        "chosen_tokens": float(sum(r.chosen.answer_length for r in rollouts)),
        "rejected_tokens": float(sum(r.rejected.answer_length for r in rollouts)),
        "thoughts": float(len(thoughts)),
        "thought_tokens": float(sum(thoughts)),
        "unanswered": float(sum(not x.answered for x in both)),
    }
    for p, principle in enumerate(principles):
        wins = 0.0
        for verdict in decided:
            (aa, ab), (ba, bb) = verdict.probabilities[p]
            difference = (aa + bb) - (ab + ba)
            wins += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        totals[f"wins/{principle}"] = wins
        own = (under_principle(verdict, p) for verdict in judged)
        totals[f"orders/{principle}"] = float(sum(verdict.orders_agree for verdict in own))
    return totals


def _letter_mass(verdict: Verdict) -> float:
    """Returns p(A) + p(B), the mean over all prompts of a pair."""
    masses = [sum(letters) for orders in verdict.probabilities for letters in orders]
    return math.fsum(masses) / len(masses)


def is_broken(rollout: Rollout) -> bool:
    """Returns whether an empty response or a non-finite score makes the pair unusable."""
    if not (rollout.chosen.ids and rollout.rejected.ids):
        return True
    verdict = rollout.verdict
    return verdict is not None and bool(verdict.probabilities) and not math.isfinite(verdict.margin)


def rollout_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Computes the logged means from the sums of `rollout_totals`.

    Margin, letter mass and win rates are means over decided pairs, and the order agreement is one
    over judged pairs (see `voting.order_agreement`). The win rate of a principle or a member of a
    panel is the share of pairs in which it agrees with the verdict, and its order agreement is that
    of its own verdicts. Lengths count only answers. If there are thoughts, the metrics also include
    their mean length and the share of responses without an answer.
    """
    decided, responses = max(totals["decided"], 1.0), max(totals["responses"], 1.0)
    pairs, judged = max(totals["pairs"], 1.0), max(totals["judged"], 1.0)
    metrics = {
        "judge/margin": totals["margin"] / decided,
        "judge/order_agreement": totals["orders_agree"] / judged,
        "judge/letter_mass": totals["mass"] / decided,
        "judge/undecidable": 1.0 - totals["decided"] / pairs,
        "judge/broken": totals["broken"] / pairs,
        "completions/mean_length": totals["tokens"] / responses,
        "completions/finished": totals["finished"] / responses,
        "completions/chosen_length": totals["chosen_tokens"] / pairs,
        "completions/rejected_length": totals["rejected_tokens"] / pairs,
    }
    if totals["thoughts"]:
        metrics["completions/thought_length"] = totals["thought_tokens"] / totals["thoughts"]
        metrics["completions/unanswered"] = totals["unanswered"] / responses
    if totals.get("judge_thoughts"):
        metrics["judge/thought_tokens"] = totals["judge_thoughts"] / pairs
    votes = [name.removeprefix("wins/") for name in totals if name.startswith("wins/")]
    for name in votes:
        metrics[f"judge/win_rate/{name}"] = totals[f"wins/{name}"] / decided
        metrics[f"judge/order_agreement/{name}"] = totals[f"orders/{name}"] / judged
    return metrics


def write_rollouts(
    path: Path,
    rollouts: Iterable[Rollout],
    step: int,
    principles: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Writes one JSON line per rollout. The file is complete or absent.

    Args:
        step: the optimizer step that learns from the rollouts, counted from 1.
        principles: the names of the principles, in the order of a verdict's probabilities.
        decode: decodes the ids of a prompt to text, including control tokens.
    """
    with atomic_write(path) as file:
        for rollout in rollouts:
            values = {
                "step": step,
                **_as_json(rollout),
                "principles": list(principles),
                "prompt": decode(rollout.prompt_ids),
            }
            file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def _as_json(rollout: Rollout) -> dict[str, Any]:
    verdict = rollout.verdict
    return {
        "record": rollout.record,
        "context": rollout.context,
        "chosen": rollout.chosen.text,
        "rejected": rollout.rejected.text,
        "chosen_tokens": rollout.chosen.answer_length,
        "rejected_tokens": rollout.rejected.answer_length,
        "chosen_finished": rollout.chosen.finished,
        "rejected_finished": rollout.rejected.finished,
        "decided": rollout.decided,
        "margin": verdict.margin if rollout.decided and verdict else None,
        "orders_agree": verdict.orders_agree if verdict else None,
        # JSON has no NaN, so non-finite numbers become null.
        "probabilities": [
            [[p if math.isfinite(p) else None for p in letters] for letters in orders]
            for orders in verdict.probabilities
        ]
        if verdict
        else None,
        "undecidable_because": _why_undecided(rollout),
        **{
            f"{side}_{name}": value
            for side, own in (("chosen", rollout.chosen), ("rejected", rollout.rejected))
            if own.thought is not None
            for name, value in (("thought", own.thought), ("thought_tokens", own.thought_length))
        },
    }


def _why_undecided(rollout: Rollout) -> str | None:
    if rollout.decided:
        return None
    if rollout.verdict is None:
        return "equal texts" if rollout.chosen.answered else NO_ANSWER
    if not (rollout.chosen.ids and rollout.rejected.ids):
        return "a response without a token"
    return rollout.verdict.undecidable_because or "the verdict contradicts the tournament"


def kl_estimate(
    chosen_rewards: Sequence[float],
    rejected_rewards: Sequence[float],
    undecidable: Sequence[float],
    beta: float,
) -> float | None:
    """Estimates KL(policy ‖ reference) in nats per response from values that the loss computes.

    The policy itself sampled both responses of a pair, so the mean of log π(y|x) − log π_ref(y|x)
    over them estimates the divergence without further forward passes (this is the estimator k1 in
    Schulman, "Approximating KL Divergence"). It is unbiased for K = 2 at temperature 1 and top_p 1.
    With K > 2, only the best and the worst response are used. Undecidable pairs have empty masks
    and therefore a reward of 0. Dividing by the share of decided pairs corrects for this.

    Args:
        chosen_rewards, rejected_rewards: means of β (log π − log π_ref) over batches of equal size.
        undecidable: the share of undecidable pairs in each optimizer step.
        beta: β.

    Returns:
        The estimate, or `None` if there are no decided pairs.
    """
    # For rewards .3 and -.1 with β = .1, the estimate is (.3 - .1) / (2·.1) = 1 nat. If half of the
    # pairs are undecidable, the means are .15 and -.05, and (.15 - .05) / (2·.1·.5) is also 1 nat.
    if not (chosen_rewards and rejected_rewards and undecidable):
        return None
    decided = 1.0 - sum(undecidable) / len(undecidable)
    if decided <= 0:
        return None
    rewards = sum(chosen_rewards) / len(chosen_rewards) + sum(rejected_rewards) / len(
        rejected_rewards
    )
    return rewards / (2 * beta * decided)


def add_kl_estimate(metrics: dict[str, list[float]], beta: float) -> None:
    """Adds `objective/kl` to the metrics since the last log, if `kl_estimate` returns a value."""
    names = ("rewards/chosen", "rewards/rejected", "judge/undecidable")
    chosen, rejected, undecidable = (metrics.get(name, ()) for name in names)
    kl = kl_estimate(chosen, rejected, undecidable, beta)
    if kl is not None:
        metrics["objective/kl"].append(kl)


def keep_rollouts(
    rollouts: Sequence[Rollout],
    step: int,
    principles: Sequence[str],
    args: SelfJudgeConfig,
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Writes a step's rollouts to the output folder and deletes surplus rollout files."""
    folder = Path(str(args.output_dir))
    write_rollouts(
        rollout_file(folder, step), rollouts[: args.rollout_pairs], step, principles, decode
    )
    thin_rollouts(folder, step, args.rollout_files)


def metrics_over_processes(
    rollouts: Sequence[Rollout],
    principles: Sequence[str],
    accelerator: Accelerator,
    thought_tokens: int = 0,
) -> tuple[dict[str, float], bool]:
    """Returns a step's metrics over all processes, and whether all rollouts are unusable.

    Every process must call this function.

    Args:
        thought_tokens: the number of tokens in this process's judge's thoughts.
    """
    totals = rollout_totals(rollouts, principles) | {"judge_thoughts": float(thought_tokens)}
    lengths = [float(x.answer_length) for r in rollouts for x in (r.chosen, r.rejected)]
    device = accelerator.device
    summed = accelerator.reduce(
        torch.tensor(list(totals.values()), device=device, dtype=torch.float32), "sum"
    )
    extremes = accelerator.gather(torch.tensor([[min(lengths), max(lengths)]], device=device))
    over_all = dict(zip(totals, summed.tolist(), strict=True))
    metrics = rollout_metrics(over_all)
    metrics["completions/min_length"] = extremes[:, 0].min().item()
    metrics["completions/max_length"] = extremes[:, 1].max().item()
    return metrics, over_all["broken"] == over_all["pairs"]


def show_pairs(rollouts: Sequence[Rollout], step: int, report_to: Sequence[str]) -> None:
    """Prints sampled pairs, and logs them as a table to W&B and Trackio, as TRL does."""
    Terminal().print(pairs_table(rollouts[:4], step))
    rows = [
        {
            "step": step,
            "context": r.context,
            "chosen": r.chosen.judged,
            "rejected": r.rejected.judged,
            "margin": r.verdict.margin if r.decided and r.verdict else None,
        }
        for r in rollouts
    ]
    for name in ("wandb", "trackio"):
        if name in report_to:  # so the trainer's callback has imported it and begun a run
            tracker = importlib.import_module(name)
            tracker.log({"pairs": tracker.Table(dataframe=pd.DataFrame(masked(rows)))})


def pairs_table(rollouts: Sequence[Rollout], step: int) -> Table:
    """Returns a table of sampled pairs with their margins for the console."""
    title = Text(f"sampled pairs at step {step}", "bold")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_lines=True)
    for heading in ("context", "chosen", "rejected"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_column("margin", justify="right", no_wrap=True)
    for r in rollouts:
        margin = f"{r.verdict.margin:+.3f}" if r.decided and r.verdict else "undecidable"
        shown = (r.context[-400:], r.chosen.judged[:400], r.rejected.judged[:400])
        # `Text` does not interpret brackets in a response as markup.
        table.add_row(*(Text(neutral(s)) for s in shown), margin)
    return table

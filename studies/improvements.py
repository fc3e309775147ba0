"""Changes to self-training, each against the paper's method with as many sampled tokens.

The paper's method is the arm "on-policy, frozen judge" of the study "learning". Every arm here
trains the JSFT model of its seed with the same loss, learning rate, number of steps and responses
per step, unless its name says otherwise.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from learning import CountingTrainer, self_trained, what_was_sampled
from self_judge.commands.demo.run import PRIOR_WEIGHT
from self_judge.datatypes import stable_seed
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.rollouts import Rollout
from study import Study
from world import World

Change = Callable[[Sequence[Rollout]], Sequence[Rollout]]


class Changed(CountingTrainer):
    """Self-training that changes the judged pairs of a step before the policy learns from them."""

    def __init__(self, *arguments: Any, change: Change, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.change = change

    def _roll_out(self, batches: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        return [list(self.change(own)) for own in super()._roll_out(batches)]


def _changed(world: World, arm: str, change: Change) -> dict[str, Any]:
    trainer: Any = partial(Changed, change=change)
    return self_trained(world, arm, trainer)


def _with_settings(world: World, arm: str, prompts: float = 1, **values: Any) -> dict[str, Any]:
    """Self-training with other settings, and a fraction of the prompts per step."""
    settings = dataclasses.replace(
        world.settings, prompts_per_step=round(prompts * world.settings.prompts_per_step)
    )

    def trainer(*, args: SelfJudgeConfig, **named: Any) -> CountingTrainer:
        for name, value in values.items():
            setattr(args, name, value)
        args.check()
        return CountingTrainer(args=args, **named)

    demo = dataclasses.replace(world.demo(arm), settings=settings)
    trained = demo.self_training(world.jsft(), trainer)  # type: ignore[arg-type]
    responses = settings.prompts_per_step * values.get("num_generations", 2)
    return {**world.measured(trained.model), **what_was_sampled(trained, responses)}


def _undecided(rollout: Rollout) -> Rollout:
    return dataclasses.replace(rollout, decided=False)


def _reversed(rollout: Rollout) -> Rollout:
    verdict = rollout.verdict and rollout.verdict.swapped()
    chosen, rejected = rollout.rejected, rollout.chosen
    return dataclasses.replace(rollout, chosen=chosen, rejected=rejected, verdict=verdict)


def orders_agree(world: World) -> dict[str, Any]:
    """Pairs for which the verdict depends on the order are left out."""

    def change(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [r if r.verdict and r.verdict.orders_agree else _undecided(r) for r in rollouts]

    return _changed(world, "orders-agree", change)


def abstention(world: World) -> dict[str, Any]:
    """The half of a step's pairs with the smaller log odds is left out."""

    def change(rollouts: Sequence[Rollout]) -> list[Rollout]:
        odds = [abs(r.verdict.log_odds) if r.decided and r.verdict else 0.0 for r in rollouts]
        least = median([x for x in odds if x] or [0.0])
        return [r if x >= least else _undecided(r) for r, x in zip(rollouts, odds, strict=True)]

    return _changed(world, "abstention", change)


def soft_labels(world: World) -> dict[str, Any]:
    """A pair is reversed with the probability that the judge gives to the other response.

    The expected loss is that of soft labels: conservative DPO with the judge's own probability.
    """
    g = random.Random(stable_seed(world.seed, "soft labels"))

    def change(rollouts: Sequence[Rollout]) -> list[Rollout]:
        return [
            _reversed(r) if r.decided and r.verdict and g.random() >= r.verdict.share else r
            for r in rollouts
        ]

    return _changed(world, "soft-labels", change)


def prior(world: World) -> dict[str, Any]:
    """The response with the higher log odds + 5 × mean log π of the initial model is chosen."""

    def change(rollouts: Sequence[Rollout]) -> list[Rollout]:
        prompts = [r.prompt_ids for r in rollouts]
        sampler = world.sampler(world.judge.model)
        means = sampler.mean_log_probs(prompts, [[r.chosen, r.rejected] for r in rollouts])
        changed = []
        for rollout, (chosen, rejected) in zip(rollouts, means, strict=True):
            odds = rollout.verdict.log_odds if rollout.decided and rollout.verdict else 0.0
            worse = rollout.decided and odds + PRIOR_WEIGHT * (chosen - rejected) < 0
            changed.append(_reversed(rollout) if worse else rollout)
        return changed

    return _changed(world, "prior", change)


def rounds(world: World) -> dict[str, Any]:
    """Half of the steps, and then the other half with the policy as initial model and judge."""
    settings = dataclasses.replace(world.settings, steps=-(-world.settings.steps // 2))
    model, found = world.jsft(), []
    for number in (1, 2):
        demo = dataclasses.replace(
            world.demo(f"round-{number}"), settings=settings, seed=world.seed + number - 1
        )
        trained = demo.self_training(model, CountingTrainer)
        found.append(what_was_sampled(trained, 2 * settings.prompts_per_step))
        model = trained.model
    cost = ("sampled_tokens", "matches", "judge_tokens", "trained_tokens")
    return {**world.measured(model), **{k: sum(own[k] for own in found) for k in cost}}


STUDY = Study(
    "improvements",
    "Which changes to self-training help at equal cost of sampling?",
    {
        "labels with a prior, judge + 5 log π per token": prior,
        "4 responses, best and worst, half the prompts": partial(
            _with_settings, arm="best-worst", prompts=0.5, num_generations=4
        ),
        "4 responses, best and a random one, half the prompts": partial(
            _with_settings, arm="best-random", prompts=0.5, num_generations=4,
            pair_selection="best_random",
        ),
        "pairs whose orders agree": orders_agree,
        "the clearer half of the pairs": abstention,
        "soft labels": soft_labels,
        "mean log π per token (sigmoid_norm, beta 1)": partial(
            _with_settings, arm="per-token", loss_type=["sigmoid_norm"], beta=1.0
        ),
        "ld_alpha 0.5": partial(_with_settings, arm="ld-alpha", ld_alpha=0.5),
        "2 rounds with renewed judge": rounds,
    },
    "Among the arms that ran so far, only labels with a prior help: +0.018 [0.000, 0.037] on four "
    "seeds, with less KL divergence.",
)  # fmt: skip

"""What a policy learns from: own pairs or given ones, and who judges.

Every arm trains the JSFT model of its seed with the same loss, learning rate, number of steps and
pairs per step. Only the pairs and the judge differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from self_judge.config.self_training import SamplingSettings
from self_judge.data import synthetic
from self_judge.datatypes import Comparison, Verdict, stable_seed
from self_judge.inference.letter_scoring import TransformersScorer
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.judging.panel import AnyJudge
from self_judge.judging.reward import PairwiseReward, Scheme
from self_judge.training.self_training.trainer import SelfJudgeTrainer
from study import Study
from world import World, preference_dataset, prompts_of, right, train


class Asked:
    """What a judge was asked: the number of matches, and of tokens in their prompts.

    Shared prefixes count each time, and equal matches too.
    """

    def __init__(self, judge: AnyJudge) -> None:
        self.matches = self.tokens = 0
        self._judge = judge

    def add(self, comparisons: Sequence[Comparison]) -> None:
        self.matches += len(comparisons)
        for judge, match in itertools.product(self._judge.judges, comparisons):
            self.tokens += sum(map(len, prompts_of(judge, match)))

    def cost(self) -> dict[str, int]:
        return {"matches": self.matches, "judge_tokens": self.tokens}


class CountingTrainer(SelfJudgeTrainer):
    """Self-training that counts what it asks its judge."""

    def _set_up(self, *arguments: Any) -> None:
        super()._set_up(*arguments)
        self.asked, compare = Asked(self.judge), self.judge.compare

        def counted(comparisons: Sequence[Comparison]) -> list[Verdict]:
            self.asked.add(comparisons)
            return compare(comparisons)

        self.judge.compare = counted  # type: ignore[method-assign]


class JudgedByThePolicy(CountingTrainer):
    """Self-training in which the policy judges its own responses with its current weights."""

    def _set_up(self, *arguments: Any) -> None:
        super()._set_up(*arguments)
        rows = self.args.judge_batch_size
        self.judge.scorer = TransformersScorer(self.model, rows, self.args.packing)


class Counted(PairwiseReward):
    """The reward function, which counts what it asks its judge."""

    def __init__(self, judge: Judge, scheme: Scheme) -> None:
        super().__init__(judge, scheme)
        self.asked = Asked(judge)

    def _compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked.add(comparisons)
        return super()._compare(comparisons)


def jsft(world: World) -> dict[str, Any]:
    model, seconds = world.taught("shared")
    return {**world.measured(model), **_judging(world, model), "jsft_seconds": seconds}


def on_policy(world: World) -> dict[str, Any]:
    return self_trained(world, "on-policy", CountingTrainer)


def current_judge(world: World) -> dict[str, Any]:
    return self_trained(world, "current-judge", JudgedByThePolicy)


def off_policy(world: World) -> dict[str, Any]:
    """DPO on pairs that the JSFT model sampled and judged once, before training."""
    demo, model = world.demo("off-policy"), world.jsft()
    rows = demo.prompts()["prompt"]
    sampling = SamplingSettings(max_new_tokens=world.settings.max_new_tokens)
    sampler = TransformersSampler(model, demo.encoder, sampling, 256)
    prompts = [demo.encoder.encode_prompt(messages) for messages in rows]
    seeds = [stable_seed(world.seed, "off-policy", i) for i in range(len(prompts))]
    sampled = sampler.sample(prompts, 2, seeds)
    items = [
        Comparison(messages[-1]["content"], a.text, b.text)
        for messages, (a, b) in zip(rows, sampled, strict=True)
    ]
    asked = Asked(world.judge)
    asked.add(items)
    verdicts = world.judge.compare(items)
    pairs = [
        (messages, *((a, b) if verdict.preferred == "a" else (b, a)))
        for messages, (a, b), verdict in zip(rows, sampled, verdicts, strict=True)
        if verdict.preferred is not None and a.text != b.text
    ]
    return {
        **_trained_on(
            world, model, [(m, chosen.text, rejected.text) for m, chosen, rejected in pairs]
        ),
        "sampled_tokens": sum(len(r.ids) for own in sampled for r in own),
        **asked.cost(),
    }


def offline(world: World) -> dict[str, Any]:
    """DPO on the labeled pairs of the data, for the same prompts."""
    settings = world.settings
    count = settings.prompts_per_step * settings.steps
    records = synthetic.records(count, stable_seed(world.seed, "prompts"), writers=2)
    pairs = [(list(r.prompt), r.pairs[0].chosen, r.pairs[0].rejected) for r in records]
    return _trained_on(world, world.jsft(), pairs)


def self_trained(world: World, arm: str, trainer_class: type[CountingTrainer]) -> dict[str, Any]:
    trainer = world.demo(arm).self_training(world.jsft(), trainer_class)
    return {
        **world.measured(trainer.model),
        **_judging(world, trainer.model),
        **what_was_sampled(trainer, 2 * world.settings.prompts_per_step),
    }


def what_was_sampled(trainer: CountingTrainer, responses: int) -> dict[str, Any]:
    """Returns the cost, and per step the agreement of the orders and the mean length.

    Args:
        responses: the number of responses per step.
    """
    logs = [log for log in trainer.state.log_history if "judge/margin" in log]
    return {
        "sampled_tokens": round(sum(responses * log["completions/mean_length"] for log in logs)),
        **trainer.asked.cost(),
        **_trained_tokens(trainer),
        "order_agreement": [round(log["judge/order_agreement"], 4) for log in logs],
        "mean_length": [round(log["completions/mean_length"], 2) for log in logs],
    }


def grpo(scheme: Scheme) -> Callable[[World], dict[str, Any]]:
    """GRPO with pairwise rewards in groups of 8, with as many responses per step as the others."""

    def arm(world: World) -> dict[str, Any]:
        demo, settings = world.demo("grpo"), world.settings
        responses = 2 * settings.prompts_per_step
        args = GRPOConfig(
            str(demo.output),
            per_device_train_batch_size=responses,
            num_generations=8,
            max_completion_length=settings.max_new_tokens,
            beta=0.04,
            **demo.policy_args(),
        )
        reward = Counted(world.judge, scheme)
        trainer = GRPOTrainer(
            model=world.jsft(),
            reward_funcs=reward,  # type: ignore[arg-type]
            args=args,
            processing_class=demo.encoder.tokenizer,
            train_dataset=demo.prompts(),
        )
        train(trainer)
        logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
        return {
            **world.measured(trainer.model),
            **_judging(world, trainer.model),
            "sampled_tokens": round(
                sum(responses * log["completions/mean_length"] for log in logs)
            ),
            **reward.asked.cost(),
            **_trained_tokens(trainer),
        }

    return arm


def _trained_on(world: World, model: Any, pairs: list[tuple[Any, str, str]]) -> dict[str, Any]:
    demo, settings = world.demo("dpo"), world.settings
    args = DPOConfig(
        str(demo.output),
        per_device_train_batch_size=settings.prompts_per_step,
        beta=settings.beta,
        max_length=512,
        **demo.policy_args(),
    )
    trainer = DPOTrainer(
        model, args=args, train_dataset=preference_dataset(pairs),
        processing_class=demo.encoder.tokenizer,
    )  # fmt: skip
    train(trainer)
    return {
        **world.measured(trainer.model),
        **_judging(world, trainer.model),
        **_trained_tokens(trainer),
        "pairs": len(pairs),
    }


def _trained_tokens(trainer: Any) -> dict[str, int]:
    """Returns the number of tokens that the policy was trained on, prompts included."""
    counts = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    return {"trained_tokens": int(counts[-1])}


def _judging(world: World, model: Any) -> dict[str, Any]:
    """Returns how often the model itself, as a judge, prefers the better held-out response."""
    verdicts = world.shared.judge(model).compare(world.shared.held_out_pairs())
    return {"judged_right": right(verdicts)}


STUDY = Study(
    "learning",
    "Does a policy learn more from its own fresh responses than from given ones, and is the frozen "
    "initial model the better judge?",
    {
        "JSFT": jsft,
        "on-policy, frozen judge": on_policy,
        "on-policy, current judge": current_judge,
        "off-policy": off_policy,
        "offline": offline,
        "GRPO, all pairs": grpo("all_pairs"),
        "GRPO, swiss": grpo("swiss"),
        "GRPO, knockout": grpo("knockout"),
    },
    "As in the paper, fresh responses teach more than pairs sampled once or given, with a sixth of "
    "the KL divergence at the same learning rate. The current policy judges as well as the frozen "
    "model. GRPO by `swiss` or `all_pairs` learns as much, for three to seven times the judge "
    "tokens.",
)

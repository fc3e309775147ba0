"""What makes a judge: JSFT against its parts, a reward model, principles and rationales.

All arms train the same tiny model on the same records for one epoch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from self_judge.data import synthetic
from self_judge.evaluation.statistics import judge_quality
from study import Study
from world import World, preference_dataset, rewarded, right, train


def jsft(world: World) -> dict[str, Any]:
    model, seconds = world.taught("shared")
    return {**world.measured(model), **_judged(world, model), "jsft_seconds": seconds}


def judge_only(world: World) -> dict[str, Any]:
    demo = world.demo("judge-only")
    records = [dataclasses.replace(r, demonstration=None) for r in demo.records()]
    return _judged(world, demo.jsft(records))


def answer_only(world: World) -> dict[str, Any]:
    demo = world.demo("answer-only")
    return world.measured(demo.jsft([dataclasses.replace(r, pairs=()) for r in demo.records()]))


def principles(world: World) -> dict[str, Any]:
    """The shared JSFT model, which judges under four principles that vote."""
    return _judged(world, world.jsft(), templates=synthetic.judge_templates())


def rationales(world: World) -> dict[str, Any]:
    """JSFT with rationales after the letter, which judges by the overall question."""
    model = _with_rationales(world)
    return {**world.measured(model), **_judged(world, model)}


def principles_and_rationales(world: World) -> dict[str, Any]:
    return _judged(world, _with_rationales(world), templates=synthetic.judge_templates())


def reward_model(world: World) -> dict[str, Any]:
    """TRL's reward model of the same base model, on the same overall pairs."""
    demo, settings = world.demo("reward-model"), world.settings
    base = demo.base_model()
    config = base.config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)  # of the new head
        model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(base.model.state_dict())
    pairs = (
        (list(record.prompt), pair.chosen, pair.rejected)
        for record in demo.records()
        for pair in record.pairs[:1]
    )
    args = RewardConfig(
        str(demo.output),
        num_train_epochs=3,  # one epoch has a third of the judge examples, which are in both orders
        per_device_train_batch_size=settings.jsft_batch,
        learning_rate=settings.jsft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_length=512,
        **demo.common_args(),
    )
    trainer = RewardTrainer(
        model, args=args, train_dataset=preference_dataset(pairs),
        processing_class=demo.encoder.tokenizer,
    )  # fmt: skip
    train(trainer)
    pairs = (
        ([{"role": "user", "content": pair.context}], pair.response_a, pair.response_b)
        for pair in demo.held_out_pairs()
    )
    return {"judged_right": rewarded(model, demo.encoder.tokenizer, pairs)}


def _with_rationales(world: World) -> Any:
    """JSFT with rationales. Overall pairs have none, because only principles have rationales."""
    templates = synthetic.judge_templates(overall=True, rationales=True)
    return world.taught("rationales", None, templates)[0]


def _judged(world: World, model: Any, **fields: Any) -> dict[str, Any]:
    demo = world.demo("judge", **fields)
    verdicts = demo.judge(model).compare(demo.held_out_pairs())
    return {
        "judged_right": right(verdicts),
        "order_agreement": judge_quality(verdicts).order_agreement,
    }


STUDY = Study(
    "judging",
    "Does JSFT judge as well as a model that only judges and as a reward model, does judging cost "
    "answers, and do principles and rationales help?",
    {
        "JSFT": jsft,
        "judge only": judge_only,
        "answer only": answer_only,
        "reward model": reward_model,
        "JSFT, principles": principles,
        "JSFT with rationales": rationales,
        "JSFT with rationales, principles": principles_and_rationales,
    },
)

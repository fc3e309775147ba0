"""What a prepared run needs on a device: steps, tokens, judge calls, memory and time.

It turns a run's settings and the lengths of its examples into the work of a step, for `memory`.
It does not know text or data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from self_judge.check.memory import (
    GPUS,
    Device,
    Memory,
    Seconds,
    Setting,
    Sharding,
    Work,
    gpu_like,
    memory,
    seconds,
    this_cpu,
)
from self_judge.check.model_size import FourBits, Kept, Size, kept_activations, size_of
from self_judge.config.hardware import Machine
from self_judge.config.schema import JSFTRun, SelfJudgeRun
from self_judge.config.self_training import PairSelection
from self_judge.datatypes import Comparison, Response, Verdict
from self_judge.training.self_training.rollouts import select_pairs


@dataclass(frozen=True, slots=True)
class Needs:
    """The estimate of a run.

    Attributes:
        device, measured: where; whether its rate was measured here or stands in a data sheet.
        processes, sharding: over how many processes, and how what is held is spread.
        size: the model.
        examples: training examples (JSFT) or prompts (self-training) of an epoch.
        steps, steps_per_epoch: optimizer steps.
        tokens: that the update computes in all of training; shared prefixes once.
        per_step: what one step does over all processes: examples, responses, judge prompts, …
        memory, seconds: of one process, of one step.
        activations_counted: whether activations were counted or are a rule of thumb.
        assumed: what the estimate takes for granted, in words.
    """

    device: str
    measured: bool
    processes: int
    sharding: Sharding
    size: Size
    examples: int
    steps: int
    steps_per_epoch: int
    tokens: int
    per_step: dict[str, int]
    memory: Memory
    seconds: Seconds
    activations_counted: bool
    device_memory: int
    assumed: str

    @property
    def hours(self) -> float:
        return self.steps * self.seconds.step / 3600


def device_for(gpu: str | None, machine: Machine, bf16: bool) -> Device:
    """The device that is asked for, or that of this machine.

    Raises:
        ValueError: a GPU that is not in the table.
    """
    if gpu is not None:
        if gpu not in GPUS:
            raise ValueError(f"--gpu {gpu}: unknown; there are figures for {', '.join(GPUS)}")
        return GPUS[gpu]
    if machine.cuda:
        properties = torch.cuda.get_device_properties(0)
        return gpu_like(properties.name, properties.total_memory)
    return this_cpu(torch.bfloat16 if bf16 else torch.float32)


def setting_of(
    run: JSFTRun | SelfJudgeRun,
    args: Any,
    machine: Machine,
    sharding: Sharding | None,
    *,
    adapter: bool,
    reference: bool = False,
) -> Setting:
    """How a run, fitted to `machine`, trains on it."""
    training = run.training_args
    if sharding is None:
        deepspeed = training.get("deepspeed")
        stage = deepspeed.get("zero_optimization", {}).get("stage") if isinstance(
            deepspeed, dict
        ) else None  # fmt: skip
        named: dict[Any, Sharding] = {2: "zero2", 3: "zero3"}
        sharding = named.get(stage, "fsdp" if training.get("fsdp") else "none")
    return Setting(
        adapter=adapter,
        reference=reference,
        checkpointing=bool(args.gradient_checkpointing),
        bf16=bool(training.get("bf16", machine.bf16) or training.get("fp16")),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        processes=machine.processes,
        sharding=sharding,
        four_bits=_four_bits(run),
    )


def _four_bits(run: JSFTRun | SelfJudgeRun) -> FourBits:
    if not run.model.load_in_4bit:
        return "no"
    return "nested" if run.model.use_bnb_nested_quant else "plain"


def jsft_work(units: Sequence[tuple[int, int, int]], args: Any) -> Work:
    """The work of a JSFT step on one process.

    Args:
        units: (examples, tokens with shared ones once, trained tokens) of what is drawn together.
    """
    examples = sum(n for n, _, _ in units)
    tokens, scored = sum(t for _, t, _ in units), sum(s for _, _, s in units)
    own = args.per_device_train_batch_size
    step = own * args.gradient_accumulation_steps
    # Twins are one row of their tree.
    rows = max(1, round(own * len(units) / examples))
    return Work(
        tokens=tokens / examples * step,
        scored=scored / examples * step,
        length=tokens / len(units),
        largest=(rows, _longest([t for _, t, _ in units], rows)),
        largest_scored=math.ceil(scored / examples * own * 2),
    )


def _longest(lengths: Sequence[float], size: int, draws: int = 1000) -> int:
    """The longest sequence of so many randomly drawn micro-batches; the others are padded to it."""
    chosen = random.Random(0)
    return math.ceil(max(chosen.choices(lengths, k=size * draws)))


def self_judge_work(
    prompts: Sequence[int],
    response: float,
    judge_tokens: Sequence[tuple[float, float]],
    run: SelfJudgeRun,
    args: Any,
    principles: int,
) -> Work:
    """The work of a self-training step on one process.

    Args:
        prompts: their lengths.
        response: tokens of a response, on average.
        judge_tokens: per comparison, (tokens of all its prompts with shared ones once, tokens of
            its longest prompt).
    """
    own = run.self_judge_args
    per_device = args.per_device_train_batch_size
    step = per_device * args.gradient_accumulation_steps
    prompt = sum(prompts) / len(prompts)
    responses = step * own.num_generations
    comparisons = step * comparisons_per_prompt(own.num_generations, own.pair_selection)
    unique = sum(t for t, _ in judge_tokens) / max(1, len(judge_tokens))
    longest = max((n for _, n in judge_tokens), default=0.0)
    row = _longest(list(map(float, prompts)), per_device) + 2 * own.max_new_tokens
    return Work(
        tokens=step * (prompt + 2 * response),
        scored=step * 2 * response,
        length=prompt + 2 * response,
        largest=(per_device, row),
        largest_scored=per_device * 2 * own.max_new_tokens,
        responses=responses,
        prompt=prompt,
        # A batch is sampled until its longest response ends.
        response=float(own.max_new_tokens),
        at_once=own.generation_batch_size,
        judged=comparisons * unique,
        judge_prompts=comparisons * principles * 2,
        judge_length=unique / max(1, principles),
        judge_at_once=round(
            own.judge_batch_size * longest
            if own.packing == "off"
            else min(max(16_384, 2 * longest), comparisons * unique)
        ),
    )


def comparisons_per_prompt(responses: int, selection: PairSelection) -> int:
    """How many comparisons select a pair, found by playing it with a judge that prefers a."""
    played = 0

    def compare(comparisons: Any) -> list[Verdict]:
        nonlocal played
        asked: list[Comparison] = list(comparisons)
        played += len(asked)
        return [Verdict("a", 1.0, 0.0, 1.0, 1.0, True)] * len(asked)

    own = [Response((i,), str(i), True) for i in range(responses)]
    select_pairs(compare, ["context"], [own], [0], selection)
    return played


def needs_of(
    model: Any,
    work: Work,
    setting: Setting,
    device: Device,
    args: Any,
    examples: int,
    per_step: dict[str, int],
    assumed: str,
) -> Needs:
    """Puts the estimate together; `model` is empty, with its adapter."""
    size = size_of(model, setting.four_bits)
    kept: Kept = kept_activations(model, *work.largest, bf16=setting.bf16)
    micro = math.ceil(examples / (args.per_device_train_batch_size * setting.processes))
    per_epoch = max(1, math.ceil(micro / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Needs(
        device=device.name,
        measured=device.measured,
        processes=setting.processes,
        sharding=setting.sharding,
        size=size,
        examples=examples,
        steps=steps,
        steps_per_epoch=per_epoch,
        tokens=round(steps * work.tokens * setting.processes),
        per_step=per_step,
        memory=memory(size, kept, work, setting, device),
        seconds=seconds(size, work, setting, device),
        activations_counted=kept.counted,
        device_memory=device.memory,
        assumed=assumed,
    )

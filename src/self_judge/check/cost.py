"""Estimates the cost of a prepared run: steps, tokens, judge prompts and memory.

This module computes the work in one step from the settings of a run and the lengths of its
examples. It does not depend on text or data. `memory.py` estimates the memory for this work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from self_judge.check.memory import GPUS, Device, Memory, Setting, Sharding, Work, memory, this_cpu
from self_judge.check.model_size import FourBits, Size, kept_activations, size_of
from self_judge.config.hardware import Machine
from self_judge.config.schema import JSFTRun, SelfJudgeRun
from self_judge.config.self_training import PairSelection, SelfJudgeArgs
from self_judge.datatypes import Comparison, Response, Verdict
from self_judge.training.self_training.rollouts import select_pairs


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a run.

    Attributes:
        device, device_memory: the device and its memory in bytes (0 if unknown).
        processes, sharding: the number of processes, and how they shard the model.
        size: the size of the model.
        examples: the number of training examples (JSFT) or prompts (self-training) in an epoch.
        steps, steps_per_epoch: the number of optimizer steps, in total and per epoch.
        tokens: the number of tokens that all updates process; shared prefixes are counted once.
        per_step: the work in one step over all processes: examples, responses, judge prompts, …
        memory: the memory estimate for one process.
        activations_counted: whether activations were counted in a traced forward pass, rather than
            estimated by a rule of thumb.
        assumed: a description of the assumptions behind the numbers.
    """

    device: str
    device_memory: int
    processes: int
    sharding: Sharding
    size: Size
    examples: int
    steps: int
    steps_per_epoch: int
    tokens: int
    per_step: dict[str, int]
    memory: Memory
    activations_counted: bool
    assumed: str


def device_for(gpu: str | None, machine: Machine) -> Device:
    """Returns the requested device, or the device of this machine.

    Raises:
        ValueError: the GPU is not in the table.
    """
    if gpu is not None:
        if gpu not in GPUS:
            raise ValueError(f"--gpu {gpu}: unknown GPU; known GPUs: {', '.join(GPUS)}")
        return GPUS[gpu]
    if machine.cuda:
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory)
    return this_cpu()


def setting_of(
    run: JSFTRun | SelfJudgeRun, args: Any, machine: Machine, sharding: Sharding | None, model: Any
) -> Setting:
    """Returns the settings that affect memory, for a run that is adapted to `machine`."""
    training = run.training_args
    if sharding is None:
        deepspeed = training.get("deepspeed")
        config = deepspeed if isinstance(deepspeed, dict) else {}
        named: dict[Any, Sharding] = {2: "zero2", 3: "zero3"}
        stage = config.get("zero_optimization", {}).get("stage")
        sharding = named.get(stage, "fsdp" if training.get("fsdp") else "none")
    kept: FourBits = "nested" if run.model.use_bnb_nested_quant else "plain"
    return Setting(
        # If there is no adapter to disable, the judge is a copy of all weights.
        reference=isinstance(run, SelfJudgeRun) and not isinstance(model, PeftModel),
        checkpointing=bool(args.gradient_checkpointing),
        bf16=bool(training.get("bf16", machine.bf16) or training.get("fp16")),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        processes=machine.processes,
        sharding=sharding,
        four_bits=kept if run.model.load_in_4bit else "no",
    )


@dataclass(frozen=True, slots=True)
class Training:
    """The model, settings and device for a run.

    Attributes:
        model: the model on the meta device, with its adapter if there is one.
        args: the trainer's arguments.
    """

    model: Any
    args: Any
    setting: Setting
    device: Device


def jsft_cost(training: Training, units: Sequence[tuple[int, int, int]], examples: int) -> Cost:
    """Estimates the cost of a JSFT run.

    Args:
        units: (examples, tokens, trained tokens) for each set of examples that share a row, such as
            an example and its swapped version. Shared tokens are counted once.
        examples: the total number of examples.
    """
    drawn, tokens, scored = (sum(column) for column in zip(*units, strict=True))
    own = training.args.per_device_train_batch_size
    step = own * training.args.gradient_accumulation_steps
    # An example and its swapped version share one row.
    rows = max(1, round(own * len(units) / drawn))
    work = Work(
        tokens=tokens / drawn * step,
        largest=(rows, _longest([t for _, t, _ in units], rows)),
        largest_scored=math.ceil(scored / drawn * own * 2),
    )
    per_step = {"examples": step * training.setting.processes}
    assumed = "for memory, the longest example in a thousand random micro-batches"
    return _cost(training, work, examples, per_step, assumed)


def _longest(lengths: Sequence[float], size: int, draws: int = 1000) -> int:
    """Returns the length of the longest sequence in `draws` random micro-batches of `size`."""
    chosen = random.Random(0)
    return math.ceil(max(chosen.choices(lengths, k=size * draws)))


def self_judge_cost(
    training: Training,
    own: SelfJudgeArgs,
    principles: int,
    prompts: Sequence[int],
    responses: Sequence[int],
    judged: Sequence[tuple[int, int]],
    examples: int,
) -> Cost:
    """Estimates the cost of a self-training run.

    Args:
        prompts: the lengths of the prompts.
        responses: the lengths of the better responses in the data; may be empty.
        judged: (tokens in all judge prompts, tokens in the longest judge prompt) for each
            comparison. Shared tokens are counted once.
        examples: the total number of prompts.
    """
    new, per_device = own.max_new_tokens, training.args.per_device_train_batch_size
    step = per_device * training.args.gradient_accumulation_steps
    response = min(sum(responses) / len(responses), new) if responses else new
    prompt = sum(prompts) / len(prompts)
    played = comparisons_per_prompt(own.num_generations, own.pair_selection)
    unique = sum(tokens for tokens, _ in judged) / max(1, len(judged))
    longest = max((tokens for _, tokens in judged), default=0)
    together = min(max(16_384, 2 * longest), step * played * unique)
    work = Work(
        tokens=step * (prompt + 2 * response),
        largest=(per_device, _longest(prompts, per_device) + 2 * new),
        largest_scored=per_device * 2 * new,
        sampled_at_once=min(own.generation_batch_size, step * own.num_generations),
        # A batch is sampled until its longest response ends.
        sampled_length=prompt + new,
        judged_at_once=round(own.judge_batch_size * longest if own.packing == "off" else together),
    )
    everywhere = step * training.setting.processes
    per_step = {
        "prompts": everywhere,
        "responses": everywhere * own.num_generations,
        "comparisons": everywhere * played,
        "judge prompts": everywhere * played * 2 * principles,
    }
    assumed = (
        f"for memory, responses of {new} tokens; for trained tokens, responses of {response:.0f} "
        + ("tokens (the mean of the better responses in the data)" if responses else "tokens")
    )
    return _cost(training, work, examples, per_step, assumed)


def comparisons_per_prompt(responses: int, selection: PairSelection) -> int:
    """Counts the comparisons needed to select a pair if the judge always prefers response `a`."""
    played = 0

    def compare(comparisons: Any) -> list[Verdict]:
        nonlocal played
        asked: list[Comparison] = list(comparisons)
        played += len(asked)
        return [Verdict("a", 1.0, 0.0, 1.0, 1.0, True)] * len(asked)

    own = [Response((i,), str(i), True) for i in range(responses)]
    select_pairs(compare, ["context"], [own], [0], selection)
    return played


def _cost(
    training: Training, work: Work, examples: int, per_step: dict[str, int], assumed: str
) -> Cost:
    args, setting, device = training.args, training.setting, training.device
    size = size_of(training.model, setting.four_bits)
    kept = kept_activations(training.model, *work.largest, bf16=setting.bf16)
    micro = math.ceil(examples / (args.per_device_train_batch_size * setting.processes))
    per_epoch = max(1, math.ceil(micro / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    return Cost(
        device=device.name,
        device_memory=device.memory,
        processes=setting.processes,
        sharding=setting.sharding,
        size=size,
        examples=examples,
        steps=steps,
        steps_per_epoch=per_epoch,
        tokens=round(steps * work.tokens * setting.processes),
        per_step=per_step,
        memory=memory(size, kept, work, setting, device),
        activations_counted=kept.counted,
        assumed=assumed,
    )

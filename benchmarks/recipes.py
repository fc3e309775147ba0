"""The estimates of docs/scaling.md: memory of a step of a 7B model on several machines.

Nothing is loaded or run: the model of Llama 2 7B's shape is empty. The workloads are assumed, and
stand in the page beside the table.

    python benchmarks/recipes.py
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from self_judge.check.memory import GIB, GPUS, Setting, Sharding, Work, memory
from self_judge.check.model_size import FourBits, kept_activations, size_of

PROMPT, RESPONSE, NEW, TEMPLATE = 200, 200, 256, 150  # tokens; a response is at most NEW long


def jsft(per_device: int, accumulation: int) -> Work:
    """Examples of 350 tokens on average and 800 at most, of which 60 and 200 are trained."""
    examples = per_device * accumulation
    return Work(examples * 350, (per_device, 800), per_device * 200)


def self_training(per_device: int, accumulation: int, at_a_time: int) -> Work:
    """Two responses to each prompt, judged in both orders by one principle."""
    longest = PROMPT + 2 * NEW
    prompts = per_device * accumulation
    return Work(
        tokens=prompts * (PROMPT + 2 * RESPONSE),
        largest=(per_device, longest),
        largest_scored=per_device * 2 * NEW,
        sampled_at_once=min(at_a_time, 2 * prompts),
        sampled_length=PROMPT + NEW,
        judged_at_once=16 * (longest + TEMPLATE),
    )


def model_of(lora: bool) -> Any:
    """The shape: bfloat16 under LoRA, else float32."""
    dtype = torch.bfloat16 if lora else torch.float32
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(LlamaConfig(), dtype=dtype)
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.1))


def row(
    title: str, work: Work, gpu: str, processes: int = 1, sharding: Sharding = "none", *,
    lora: bool = True, judge_apart: bool = False, four_bits: FourBits = "no",
) -> None:  # fmt: skip
    """Prints one line of the table."""
    model = model_of(lora)
    size = size_of(model, four_bits)
    setting = Setting(judge_apart, True, True, "adamw_torch", processes, sharding, four_bits)
    kept = kept_activations(model, *work.largest, bf16=True)
    held = memory(size, kept, work, setting, GPUS[gpu])
    print(
        f"{processes} × {gpu:<10} {title:<24} {sharding:<6} {held.peak / GIB:5.0f} GiB "
        f"({held.largest_phase})",
        flush=True,
    )


def main() -> None:
    """All rows, in the page's order."""
    print("machine, run, sharding, memory of one GPU (in which phase)")
    row("JSFT, LoRA", jsft(2, 64), "rtx-4090")
    row("self-training, LoRA", self_training(2, 32, 8), "rtx-4090")
    row("JSFT, QLoRA", jsft(4, 32), "rtx-4090", four_bits="plain")
    row("self-training, QLoRA", self_training(4, 16, 32), "rtx-4090", four_bits="plain")
    row("JSFT, LoRA", jsft(8, 16), "a100-80gb")
    for gpu in ("a100-80gb", "h100"):
        row("self-training, LoRA", self_training(8, 8, 64), gpu)
    for sharding in ("zero3", "fsdp", "zero2"):
        row("JSFT, full", jsft(4, 4), "a100-80gb", 8, sharding, lora=False)
    row("self-training, LoRA", self_training(8, 1, 64), "a100-80gb", 8)
    work = self_training(4, 2, 64)
    row("self-training, full", work, "a100-80gb", 8, "zero3", lora=False, judge_apart=True)
    row("JSFT, full", jsft(4, 1), "a100-80gb", 32, "fsdp", lora=False)
    row("self-training, LoRA", self_training(2, 1, 64), "a100-80gb", 32)


if __name__ == "__main__":
    main()

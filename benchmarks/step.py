"""A whole optimizer step with LoRA on real HH prompts: SelfJudgeTrainer against OnlineDPOTrainer.

Ours samples, judges every pair in both orders by the frozen model, and updates. TRL's experimental
OnlineDPOTrainer samples, asks a free scalar reward (the length of the text) and updates: it does
less. Dtype, prompts, samples, lengths, accumulation, adapter and sampling settings are the same.

    python benchmarks/step.py [--new 64] [--checkpointing 1] [--dtype bfloat16]
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer


def main() -> None:
    """One step of each, in turn, on the same prompts."""
    given = bench.arguments(
        __doc__, ("self_judge", "OnlineDPO"), prompts=4, new=32, accumulation=1, checkpointing=0
    )
    encoder = bench.encoder_of(given)
    rows = [{"prompt": [dict(m) for m in r.prompt]} for r in bench.records_of(given, given.prompts)]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": given.prompts // given.accumulation,
        "gradient_accumulation_steps": given.accumulation,
        "max_steps": 1,
        "max_new_tokens": given.new,
        "max_length": 1024,
        "temperature": 1.0,
        "top_p": 0.9,
        "bf16": False,
        "gradient_checkpointing": bool(given.checkpointing),
        "use_cpu": given.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    sampled: dict[str, list[int]] = {"self_judge": [], "OnlineDPO": []}
    phases: list[dict[str, float]] = []

    def ours() -> Callable[[], None]:
        torch.manual_seed(0)
        trainer = SelfJudgeTrainer(
            model=bench.model_of(given),
            args=SelfJudgeConfig(**common, save_rollouts=False),
            processing_class=encoder.tokenizer,
            judge_templates=bench.templates_of(),
            train_dataset=Dataset.from_list(rows),
            peft_config=bench.lora(),
        )

        def step() -> None:
            trainer.train()
            logged = next(x for x in trainer.state.log_history if "completions/mean_length" in x)
            sampled["self_judge"].append(
                round(2 * given.prompts * logged["completions/mean_length"])
            )
            phases.append({k[5:]: v for k, v in logged.items() if k.startswith("time/")})

        return step

    def theirs() -> Callable[[], None]:
        torch.manual_seed(0)
        tokens: list[int] = []

        def length(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
            tokens.append(sum(map(len, completion_ids)))
            return [float(len(str(text))) for text in completions]

        trainer = OnlineDPOTrainer(
            model=bench.model_of(given),
            reward_funcs=length,
            args=OnlineDPOConfig(**common),
            processing_class=encoder.tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=bench.lora(),
        )

        def step() -> None:
            tokens.clear()
            trainer.train()
            sampled["OnlineDPO"].append(sum(tokens))

        return step

    made = {name: make() for name, make in (("self_judge", ours), ("OnlineDPO", theirs))
            if name in given.sides}  # fmt: skip
    seconds, _ = bench.alternating(made, given)
    rates = [
        f"{name}: {statistics.median(tokens):.0f} tokens sampled, "
        f"{statistics.median(tokens) / statistics.median(seconds[name]):.1f} a second of the step"
        for name, tokens in sampled.items()
    ]
    last = ", ".join(f"{name} {s:.2f} s" for name, s in phases[-1].items())
    bench.report(
        f"step of {given.prompts} prompts × 2 samples × {given.new} tokens, accumulation "
        f"{given.accumulation}, checkpointing {bool(given.checkpointing)}, LoRA",
        given,
        seconds,
        limit=None,
        notes=[*rates, f"the last of ours: {last}"],
    )


if __name__ == "__main__":
    main()

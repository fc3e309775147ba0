"""What `self-judge check` estimates against what is measured: peak memory of one update.

A preference update of SelfJudgeTrainer (policy, reference, backward pass, optimizer step) on real
HH pairs, each setting in a process of its own, and the same estimated from the configuration.

    python benchmarks/needs.py --model path/to/smollm2 [--batch 4]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.check.memory import GIB, Setting, Work, memory, this_cpu
from self_judge.check.model_size import empty_model, kept_activations, size_of
from self_judge.packing.prefix_tree import prefix_rows
from self_judge.training.self_training.rollouts import preference_batch

SETTINGS: dict[str, dict[str, bool]] = {
    "LoRA": {"adapter": True, "checkpointing": False},
    "LoRA, gradient checkpointing": {"adapter": True, "checkpointing": True},
    "full": {"adapter": False, "checkpointing": False},
    "full, gradient checkpointing": {"adapter": False, "checkpointing": True},
}


def main() -> None:
    """Measures every setting and prints it beside its estimate."""
    given = bench.arguments(__doc__, (), batch=4, length=1024)
    if given.only:
        _measure(given, **SETTINGS[given.only])
        return
    print(f"one update of {given.batch} pairs, {given.dtype}, {torch.get_num_threads()} threads")
    print(f"{'':<32}{'memory, GiB':>24}{'seconds':>12}")
    print(f"{'':<32}{'measured':>12}{'estimated':>12}{'measured':>12}")
    for name, setting in SETTINGS.items():
        command = [sys.executable, *sys.argv, "--only", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak, spent = map(float, output.rsplit("measured", 1)[1].split())
        need = _estimate(given, **setting)
        print(
            f"{name:<32}{peak:12.2f}{need:12.2f}{spent:12.1f}   ({100 * (need / peak - 1):+.0f}%)"
        )


def _pairs(given: Any) -> list[tuple[list[int], list[int], list[int], bool]]:
    encoder = bench.encoder_of(given)
    return [
        (
            encoder.encode_prompt(r.prompt),
            encoder.encode_content(r.pairs[0].chosen),
            encoder.encode_content(r.pairs[0].rejected),
            True,
        )
        for r in bench.records_of(given, given.batch)
    ]


def _measure(given: Any, adapter: bool, checkpointing: bool) -> None:
    torch.manual_seed(0)
    trainer: Any = SelfJudgeTrainer(
        model=bench.model_of(given),
        args=SelfJudgeConfig(
            tempfile.mkdtemp(),
            max_new_tokens=64,
            bf16=False,
            gradient_checkpointing=checkpointing,
            report_to="none",
            use_cpu=True,
            max_length=given.length,
        ),
        processing_class=bench.encoder_of(given).tokenizer,
        judge_templates=bench.templates_of(),
        train_dataset=Dataset.from_list([{"query": "a"}] * 2),
        peft_config=bench.lora() if adapter else None,
    )
    trainer.model.train()
    if checkpointing:  # the training loop does so at its start
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    batch = preference_batch(_pairs(given), 0, max_length=given.length)
    for _ in range(2):  # from the second step on, the optimizer's moments are held as well
        started = time.perf_counter()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        spent = time.perf_counter() - started
    print("measured", bench.peak(given), spent)


def _estimate(given: Any, adapter: bool, checkpointing: bool) -> float:
    model: Any = empty_model(given.model, dtype=given.dtype)
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, bench.lora())
    pairs = _pairs(given)
    trees = [
        sum(len(r) for r in prefix_rows([[*p, *a][:-1], [*p, *b][:-1]], sys.maxsize))
        for p, a, b, _ in pairs
    ]
    shape = (len(trees), max(trees))  # as the check has it: padded to the longest
    setting = Setting(reference=not adapter, checkpointing=checkpointing, bf16=False)
    work = Work(sum(trees), shape, sum(len(a) + len(b) for _, a, b, _ in pairs))
    kept = kept_activations(model, *shape)
    need = memory(size_of(model), kept, work, setting, this_cpu())
    return (need.held + need.phases["update"]) / GIB


if __name__ == "__main__":
    main()

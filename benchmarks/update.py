"""The preference update on real HH pairs: SelfJudgeTrainer's packed step against TRL's DPOTrainer.

Both do the policy's forward and backward pass and the reference's forward pass (the adapter off) on
the same batches of 8 pairs with LoRA; only the layout differs. Sampling and judging are left out.

    python benchmarks/update.py [--dtype bfloat16] [--batches 2]
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.rollouts import preference_batch


def main() -> None:
    """Both trainers' own loss on the same batches."""
    given = bench.arguments(__doc__, ("packed", "DPOTrainer"), batches=1, batch=8, length=1024)
    model = bench.model_of(given)
    encoder = bench.encoder_of(given)
    records = bench.records_of(given, given.batch * given.batches)
    pairs = [
        (
            encoder.encode_prompt(r.prompt),
            encoder.encode_content(r.pairs[0].chosen),
            encoder.encode_content(r.pairs[0].rejected),
            True,
        )
        for r in records
    ]
    batches = [
        preference_batch(pairs[i : i + given.batch], 0, max_length=given.length)
        for i in range(0, len(pairs), given.batch)
    ]
    inputs = [{k: v.to(given.device) for k, v in batch.items()} for batch in batches]

    folder = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": given.device == "cpu",
        "max_length": given.length,
    }
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2

    def ours() -> Any:
        return SelfJudgeTrainer(
            model=model,
            args=SelfJudgeConfig(folder, max_new_tokens=64, **common),
            processing_class=encoder.tokenizer,
            judge_templates=bench.templates_of(),
            train_dataset=Dataset.from_list([{"query": "a"}] * 2),
            peft_config=bench.lora(),
        )

    def theirs() -> Any:
        return DPOTrainer(
            model=model,
            args=DPOConfig(folder, **common),
            processing_class=encoder.tokenizer,
            train_dataset=Dataset.from_list(rows),
            peft_config=bench.lora(),
        )

    trainers: dict[str, Any] = {}
    for name, make in (("packed", ours), ("DPOTrainer", theirs)):
        if name in given.sides:
            torch.manual_seed(0)
            trainers[name] = make()
            trainers[name].model.train()
            model = bench.model_of(given)

    sides = {n: functools.partial(bench.losses_of, t, inputs) for n, t in trainers.items()}
    seconds, losses = bench.alternating(sides, given)
    # What the loss needs: all but the last token of every response.
    sequences = [[*p, *side][: given.length][:-1] for p, *own, _ in pairs for side in own]
    targets = sum(int(b["completion_mask"].sum()) for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)
    inner = trainers["packed"].model.get_base_model()
    # The reference's forward and the policy's, and twice less in the backward pass of LoRA: the
    # gradients of activations, but none of the frozen weights.
    work = 3 * bench.flops(inner, sequences, targets)
    bench.report(
        f"update of {len(pairs)} pairs, LoRA",
        given,
        seconds,
        limit=padded / bench.unique_tokens(sequences),
        floor=work / bench.matrix_rate(inner),
        notes=[bench.way(trainers["packed"].packing), bench.gap(losses)],
    )


if __name__ == "__main__":
    main()

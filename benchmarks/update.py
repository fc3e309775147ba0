"""The preference update on real HH pairs: SelfJudgeTrainer's packed step against TRL's DPOTrainer.

Both do the policy's forward and backward pass and the reference's forward pass (the adapter off) on
the same batches of 8 pairs with LoRA; only the layout differs. Sampling and judging are left out.

    python benchmarks/update.py [--dtype bfloat16] [--batches 2]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.training.self_training.rollouts import preference_batch


class Pairs(NamedTuple):
    """Real pairs in padded batches, and the sequences of what the loss needs."""

    tokenizer: Any
    inputs: list[dict[str, torch.Tensor]]
    sequences: list[list[int]]  # all but the last token of every response


def pairs_of(given: argparse.Namespace) -> Pairs:
    """`given.batches` of `given.batch` pairs of at most `given.length` tokens a sequence."""
    encoder = bench.encoder_of(given)
    pairs = [
        (
            encoder.encode_prompt(r.prompt),
            encoder.encode_content(r.pairs[0].chosen),
            encoder.encode_content(r.pairs[0].rejected),
            True,
        )
        for r in bench.records_of(given, given.batch * given.batches)
    ]
    batches = [
        preference_batch(pairs[i : i + given.batch], 0, max_length=given.length)
        for i in range(0, len(pairs), given.batch)
    ]
    inputs = [{k: v.to(given.device) for k, v in batch.items()} for batch in batches]
    sequences = [[*p, *side][: given.length][:-1] for p, *own, _ in pairs for side in own]
    return Pairs(encoder.tokenizer, inputs, sequences)


def trainer_of(kind: Any, given: argparse.Namespace, pairs: Pairs, **settings: Any) -> Any:
    """Either trainer, with the LoRA of all benchmarks."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": given.device == "cpu",
        "max_length": given.length,
        **{"bf16": False, **settings},
    }
    if kind is SelfJudgeTrainer:
        own: dict[str, Any] = {
            "args": SelfJudgeConfig(**common, max_new_tokens=64),
            "judge_templates": bench.templates_of(),
            "train_dataset": Dataset.from_list([{"query": "a"}] * 2),
        }
    else:
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        own = {"args": DPOConfig(**common), "train_dataset": Dataset.from_list(rows)}
    trainer = kind(
        model=bench.model_of(given),
        processing_class=pairs.tokenizer,
        peft_config=bench.lora(),
        **own,
    )
    trainer.model.train()
    return trainer


def needed_flops(inner: Any, pairs: Pairs) -> float:
    """Of a forward pass over the unique tokens."""
    targets = sum(int(b["completion_mask"].sum()) for b in pairs.inputs)
    return bench.flops(inner, pairs.sequences, targets)


def main() -> None:
    """Both trainers' own loss on the same batches."""
    given = bench.arguments(__doc__, ("packed", "DPOTrainer"), batches=1, batch=8, length=1024)
    pairs = pairs_of(given)
    kinds = {"packed": SelfJudgeTrainer, "DPOTrainer": DPOTrainer}
    trainers = {n: trainer_of(k, given, pairs) for n, k in kinds.items() if n in given.sides}

    sides = {n: functools.partial(bench.losses_of, t, pairs.inputs) for n, t in trainers.items()}
    seconds, losses = bench.alternating(sides, given)
    padded = sum(b["input_ids"].numel() for b in pairs.inputs)
    inner = trainers["packed"].model.get_base_model()
    # The reference's forward and the policy's, and twice less in the backward pass of LoRA: the
    # gradients of activations, but none of the frozen weights.
    bench.report(
        f"update of {given.batch * given.batches} pairs, LoRA",
        given,
        seconds,
        limit=padded / bench.unique_tokens(pairs.sequences),
        floor=3 * needed_flops(inner, pairs) / bench.matrix_rate(inner),
        notes=[bench.way(trainers["packed"].packing), bench.gap(losses)],
    )


if __name__ == "__main__":
    main()

"""A JSFT step on real HH records: JSFTTrainer's packed step against TRL's SFTTrainer, padded.

Forward and backward pass of the same examples (SFT, and judging in both orders), 8 a batch, LoRA.

    python benchmarks/jsft.py [--dtype bfloat16] [--batches 3]
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

import side_by_side as bench
from self_judge import JudgeAugmentedSFTCollator
from self_judge.jsft import jsft_dataset
from self_judge.jsft_trainer import JSFTTrainer, TwinSampler


def main() -> None:
    """Both trainers' own loss on the same batches."""
    given = bench.arguments(__doc__, ("packed", "SFTTrainer"), batches=3, batch=8, length=1024)
    encoder, templates = bench.encoder_of(given), bench.templates_of()
    dataset, _ = jsft_dataset(
        bench.records_of(given, given.batch * given.batches),
        encoder,
        templates,
        encoder.letter_ids(templates),
        max_length=given.length,
    )
    order = list(TwinSampler(dataset["twin"], seed=0))[: given.batch * given.batches]
    examples = [dataset[i] for i in order]
    collate = JudgeAugmentedSFTCollator(encoder.tokenizer)
    batches = [collate(examples[i : i + given.batch]) for i in range(0, len(order), given.batch)]
    inputs = [{k: v.to(given.device) for k, v in batch.items()} for batch in batches]

    def make(kind: Any) -> Any:
        torch.manual_seed(0)
        trainer = kind(
            model=bench.model_of(given),
            args=SFTConfig(
                tempfile.mkdtemp(),
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                use_cpu=given.device == "cpu",
            ),
            data_collator=collate,
            train_dataset=dataset,
            processing_class=encoder.tokenizer,
            peft_config=bench.lora(),
        )
        trainer.model.train()
        return trainer

    kinds = {"packed": JSFTTrainer, "SFTTrainer": SFTTrainer}
    trainers = {n: make(kind) for n, kind in kinds.items() if n in given.sides}

    sides = {n: functools.partial(bench.losses_of, t, inputs) for n, t in trainers.items()}
    seconds, losses = bench.alternating(sides, given)
    per_batch = [examples[i : i + given.batch] for i in range(0, len(examples), given.batch)]
    # What the loss needs: every example up to its last trained token.
    needed = [[_needed(e) for e in batch] for batch in per_batch]
    inner = trainers["packed"].model.get_base_model()
    rate = bench.matrix_rate(inner)
    targets = [sum(label != -100 for e in batch for label in e["labels"]) for batch in per_batch]
    work = sum(2 * bench.flops(inner, n, t) for n, t in zip(needed, targets, strict=True))
    bench.report(
        f"JSFT of {len(examples)} examples, LoRA",
        given,
        seconds,
        limit=sum(b["input_ids"].numel() for b in batches) / sum(map(bench.unique_tokens, needed)),
        floor=work / rate,
        notes=[bench.way(trainers["packed"].packing), bench.gap(losses)],
    )


def _needed(example: dict[str, Any]) -> list[int]:
    trained = [i for i, label in enumerate(example["labels"]) if label != -100]
    ids: list[int] = example["input_ids"][: max(trained)]
    return ids


if __name__ == "__main__":
    main()

"""A JSFT step on real HH records: JSFTTrainer's packed step against TRL's SFTTrainer, padded.

Forward and backward pass of the same examples (SFT, and judging in both orders), 8 a batch, LoRA.

    python benchmarks/jsft.py [--dtype bfloat16] [--batches 3]
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from self_judge import JudgeAugmentedSFTCollator
from self_judge.jsft import jsft_dataset
from self_judge.jsft_trainer import JSFTTrainer, TwinSampler
from side_by_side import (
    alternating,
    arguments,
    encoder_of,
    flops,
    matrix_rate,
    model_of,
    peak,
    peaks,
    records_of,
    report,
    templates_of,
    unique_tokens,
)


def main() -> None:
    """Both trainers' own loss on the same batches."""
    given = arguments(__doc__, batches=3, batch=8, length=1024)
    memory = (
        None if given.only else peaks(["packed", "SFTTrainer"])
    )  # before this process holds any
    encoder, templates = encoder_of(given), templates_of()
    dataset, _ = jsft_dataset(
        records_of(given, given.batch * given.batches),
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
            model=model_of(given),
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
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
        )
        trainer.model.train()
        return trainer

    kinds = {"packed": JSFTTrainer, "SFTTrainer": SFTTrainer}
    trainers = {n: make(kind) for n, kind in kinds.items() if given.only in (None, n)}

    def step(trainer: Any) -> list[float]:
        losses = []
        for batch in inputs:
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            losses.append(loss.item())
        trainer.model.zero_grad()
        return losses

    if given.only:
        step(trainers[given.only])
        print("peak", peak(given))
        return
    sides = {name: (lambda t=t: step(t)) for name, t in trainers.items()}
    losses = [work() for work in sides.values()]
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    seconds = alternating(sides, given.rounds, given.device)
    per_batch = [examples[i : i + given.batch] for i in range(0, len(examples), given.batch)]
    # What the loss needs: every example up to its last trained token.
    needed = [[_needed(e) for e in batch] for batch in per_batch]
    inner = trainers["packed"].model.get_base_model()
    rate = matrix_rate(inner)
    targets = [sum(label != -100 for e in batch for label in e["labels"]) for batch in per_batch]
    work = sum(2 * flops(inner, n, t) for n, t in zip(needed, targets, strict=True))
    report(
        f"JSFT of {len(examples)} examples, LoRA",
        given,
        seconds,
        limit=sum(b["input_ids"].numel() for b in batches) / sum(map(unique_tokens, needed)),
        floor=work / rate,
        memory=memory,
        notes=[f"losses differ by at most {gap:.1e}"],
    )


def _needed(example: dict[str, Any]) -> list[int]:
    trained = [i for i, label in enumerate(example["labels"]) if label != -100]
    ids: list[int] = example["input_ids"][: max(trained)]
    return ids


if __name__ == "__main__":
    main()

"""A JSFT step on real HH records: JSFTTrainer's packed step against TRL's SFTTrainer, padded.

Forward and backward pass of the same examples (SFT, and judging in both orders), 8 a batch, LoRA.

    python benchmarks/jsft.py [--dtype bfloat16] [--batches 3]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from typing import Any, NamedTuple

import torch
from trl import SFTConfig, SFTTrainer

import side_by_side as bench
from self_judge import JudgeAugmentedSFTCollator
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.jsft.trainer import JSFTTrainer, PairSampler


class Examples(NamedTuple):
    """Real examples, both orders of a pair together, as a dataset and in padded batches."""

    tokenizer: Any
    dataset: Any
    batches: list[list[dict[str, Any]]]
    inputs: list[dict[str, torch.Tensor]]


def examples_of(given: argparse.Namespace) -> Examples:
    """`given.batches` of `given.batch` examples of at most `given.length` tokens."""
    encoder, templates = bench.encoder_of(given), bench.templates_of()
    dataset, _ = jsft_dataset(
        bench.records_of(given, given.batch * given.batches),
        encoder,
        templates,
        encoder.letter_ids(templates),
        max_length=given.length,
    )
    order = list(PairSampler(dataset["swapped"], seed=0))[: given.batch * given.batches]
    examples = [dataset[i] for i in order]
    batches = [examples[i : i + given.batch] for i in range(0, len(order), given.batch)]
    collated = [JudgeAugmentedSFTCollator(encoder.tokenizer)(batch) for batch in batches]
    inputs = [{k: v.to(given.device) for k, v in batch.items()} for batch in collated]
    return Examples(encoder.tokenizer, dataset, batches, inputs)


def trainer_of(
    kind: Any, given: argparse.Namespace, examples: Examples, *, lora: bool = True, **settings: Any
) -> Any:
    """A trainer of the kind, with the LoRA of all benchmarks or of all weights."""
    torch.manual_seed(0)
    trainer = kind(
        model=bench.model_of(given),
        args=SFTConfig(
            tempfile.mkdtemp(),
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=given.device == "cpu",
            **{"bf16": False, **settings},
        ),
        data_collator=JudgeAugmentedSFTCollator(examples.tokenizer),
        train_dataset=examples.dataset,
        processing_class=examples.tokenizer,
        peft_config=bench.lora() if lora else None,
    )
    trainer.model.train()
    return trainer


def needed_flops(inner: Any, examples: Examples) -> float:
    """Of a forward pass: every example up to its last trained token, shared tokens once a batch."""
    needed = [[_needed(e) for e in batch] for batch in examples.batches]
    targets = [sum(t != -100 for e in batch for t in e["labels"]) for batch in examples.batches]
    return sum(bench.flops(inner, n, t) for n, t in zip(needed, targets, strict=True))


def main() -> None:
    """Both trainers' own loss on the same batches."""
    given = bench.arguments(__doc__, ("packed", "SFTTrainer"), batches=3, batch=8, length=1024)
    examples = examples_of(given)
    kinds = {"packed": JSFTTrainer, "SFTTrainer": SFTTrainer}
    trainers = {n: trainer_of(k, given, examples) for n, k in kinds.items() if n in given.sides}

    sides = {n: functools.partial(bench.losses_of, t, examples.inputs) for n, t in trainers.items()}
    seconds, losses = bench.alternating(sides, given)
    inner = trainers["packed"].model.get_base_model()
    unique = [bench.unique_tokens([_needed(e) for e in batch]) for batch in examples.batches]
    bench.report(
        f"JSFT of {sum(map(len, examples.batches))} examples, LoRA",
        given,
        seconds,
        limit=sum(b["input_ids"].numel() for b in examples.inputs) / sum(unique),
        floor=2 * needed_flops(inner, examples) / bench.matrix_rate(inner),
        notes=[bench.way(trainers["packed"].packing), bench.gap(losses)],
    )


def _needed(example: dict[str, Any]) -> list[int]:
    trained = [i for i, label in enumerate(example["labels"]) if label != -100]
    ids: list[int] = example["input_ids"][: max(trained)]
    return ids


if __name__ == "__main__":
    main()

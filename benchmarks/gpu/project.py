"""The project as the check uses it: all imports of inner modules, models of a shape, real data.

What moves inside the project is followed here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import Check
from transformers import AutoModelForCausalLM, LlamaConfig

import side_by_side as bench
from judge import agreement, computed, plain
from self_judge import (
    ChatEncoder,
    Judge,
    JudgeAugmentedSFTCollator,
    SelfJudgeConfig,
    SelfJudgeTrainer,
)
from self_judge.commands.train import run_jsft, run_self_judge
from self_judge.config.schema import load_run
from self_judge.config.self_training import SamplingSettings
from self_judge.data import synthetic
from self_judge.data.files import read_raw
from self_judge.data.records import judge_context
from self_judge.data.sources import load_preferences
from self_judge.evaluation.statistics import evaluate_judge
from self_judge.inference.decoding import why_no_graphs, why_not_shared
from self_judge.inference.letter_scoring import TransformersScorer
from self_judge.inference.logits_processors import seeded_gumbel
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.tournament import knockouts
from self_judge.models import load_model, load_tokenizer
from self_judge.packing import packing as packing_module
from self_judge.packing.fused_head import pack_fused_head
from self_judge.packing.packing import Packing
from self_judge.packing.passes import hidden_states_at
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.jsft.trainer import JSFTTrainer, PairSampler
from self_judge.training.self_training.rollouts import preference_batch

__all__ = [
    "JSFTTrainer",
    "Judge",
    "JudgeAugmentedSFTCollator",
    "Packing",
    "PairSampler",
    "SamplingSettings",
    "SelfJudgeConfig",
    "SelfJudgeTrainer",
    "TransformersSampler",
    "TransformersScorer",
    "agreement",
    "attending_by_segments",
    "bench",
    "computed",
    "evaluate_judge",
    "hidden_states_at",
    "jsft_dataset",
    "judge_context",
    "knockouts",
    "load_model",
    "load_preferences",
    "load_run",
    "needed_of",
    "pack_fused_head",
    "plain",
    "preference_batch",
    "run_jsft",
    "run_self_judge",
    "seeded_gumbel",
    "updating",
    "why_no_graphs",
    "why_not_shared",
]

ROOT = Path(__file__).parents[2]
TRAINING = ("base_train", "online_train", "rs_train")
HELD_OUT = "base_test_1000"

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
SHAPES = {"smollm2": SMOLLM2, **bench.SHAPES}
TINY = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


# -- models ----------------------------------------------------------------------------------------


def encoder_of(check: Check) -> ChatEncoder:
    """The tokenizer's own chat template."""
    return ChatEncoder(load_tokenizer(check.model))


def shaped(check: Check, shape: str, attention: str = "sdpa") -> Any:
    """A Llama of this shape with random weights, on the device; only the shape counts for speed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder_of(check).tokenizer) if check.tiny else 49152,
        max_position_embeddings=4096,
        tie_word_embeddings=shape == "smollm2",
        **(TINY if check.tiny else SHAPES[shape]),
    )
    with torch.device(check.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=check.dtype, attn_implementation=attention
        )
    return model.eval()


def built(config: Any, attention: str, dtype: torch.dtype, device: str) -> Any:
    """A model whose weights are far from zero, so that mistakes show; the same one for a type."""
    torch.manual_seed(1)
    # A copy: models share a configuration otherwise, and with it their kind of attention.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.to(device, dtype).eval()


def quiet_training(check: Check, **changes: Any) -> dict[str, Any]:
    """A trainer's settings by which it writes nothing; bfloat16 on a GPU."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "bf16": not check.tiny,
        "use_cpu": check.tiny,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def updating(check: Check, model: Any, **changes: Any) -> SelfJudgeTrainer:
    """A self-training with LoRA whose updates are measured; it samples nothing."""
    asked = {"max_length": 1024, "max_new_tokens": 64, "save_rollouts": False, **changes}
    return SelfJudgeTrainer(
        model=model,
        args=SelfJudgeConfig(**quiet_training(check, **asked)),
        processing_class=encoder_of(check).tokenizer,
        judge_templates=bench.templates_of(),
        train_dataset=Dataset.from_list([{"query": "a"}] * 2),
        peft_config=bench.lora(),
    )


@contextlib.contextmanager
def backbone_tokens(model: Any) -> Iterator[list[int]]:
    """Tokens of every pass through the model's backbone, padding included, while inside."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"].numel())

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def attending_by_segments(chosen: bool) -> Iterator[None]:
    """Trees segment by segment, whatever the device, or under masks, while inside."""
    usual = packing_module._by_segments
    packing_module._by_segments = lambda packing: chosen
    try:
        yield
    finally:
        packing_module._by_segments = usual


@contextlib.contextmanager
def logits_read(packing: Any) -> Iterator[list[torch.Tensor]]:
    """The logits that a judge's packing hands out, while inside."""
    seen: list[torch.Tensor] = []
    original = packing.next_token_logits

    def spy(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        for places, logits in original(sequences):
            seen.append(logits.detach().flatten().cpu())
            yield places, logits

    packing.next_token_logits = spy
    try:
        yield seen
    finally:
        del packing.next_token_logits


# -- data ------------------------------------------------------------------------------------------


def data_file(folder: Path, name: str) -> Path:
    return next(p for p in (folder / f"{name}.jsonl.gz", folder / f"{name}.jsonl") if p.is_file())


@functools.cache
def records(check: Check, count: int) -> list[Any]:
    """Held-out records with a pair, in their own order."""
    path = str(data_file(check.data, HELD_OUT))
    found = [r for r in load_preferences(path, max_records=2 * count).records if r.pairs]
    return found[:count]


def pairs_of(check: Check, encoder: ChatEncoder, count: int) -> list[Any]:
    """Prompt, chosen and rejected as ids, of real pairs."""
    return [
        (
            encoder.encode_prompt(r.prompt),
            encoder.encode_content(r.pairs[0].chosen),
            encoder.encode_content(r.pairs[0].rejected),
            True,
        )
        for r in records(check, count)
    ]


def needed_of(example: dict[str, Any]) -> list[int]:
    """What the loss of a JSFT example needs: its ids before the last trained token."""
    trained = [i for i, label in enumerate(example["labels"]) if label != -100]
    return list(example["input_ids"][: max(trained)])


def split(folder: Path, into: Path, held_out: int) -> tuple[Path, Path]:
    """All records in two files: for training, and at least so many held out.

    The test file is held out whole. What is wanting comes from the last training file: dialogues
    whose first turn occurs nowhere else.
    """

    def opening(record: dict[str, Any]) -> str:
        return str(record["chosen"]).split("\n\nAssistant:")[0]

    test = list(read_raw(str(data_file(folder, HELD_OUT))))
    *others, last = ([*read_raw(str(data_file(folder, name)))] for name in TRAINING)
    train = [r for own in others for r in own]
    counts: dict[str, int] = {}
    for record in itertools.chain(train, test, last):
        counts[opening(record)] = counts.get(opening(record), 0) + 1
    wanting = max(0, held_out - len(test))
    alone = [i for i, r in enumerate(last) if counts[opening(r)] == 1]
    taken = set(alone[len(alone) - wanting :] if wanting else ())
    test += [r for i, r in enumerate(last) if i in taken]
    train += [r for i, r in enumerate(last) if i not in taken]
    files = (into / "train.jsonl", into / "held_out.jsonl")
    for file, own in zip(files, (train, test), strict=True):
        file.write_text("".join(json.dumps(r) + "\n" for r in own), encoding="utf-8")
    return files


def tiny_world(check: Check) -> None:
    """What a dry run works on: a tiny model, its tokenizer and the synthetic world as HH files."""
    tokenizer = synthetic.tiny_tokenizer()
    tokenizer.save_pretrained(check.model)
    synthetic.tiny_model(tokenizer, 0, hidden_size=32, layers=2).save_pretrained(check.model)
    check.data.mkdir()
    for seed, name in enumerate((*TRAINING, HELD_OUT)):
        synthetic.write_dataset("hh", check.data / f"{name}.jsonl", 12, seed=seed)

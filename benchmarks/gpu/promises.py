"""What half precision and long pairs must not lose.

A judge in bf16 training reads float32 logits, and gives the probabilities of a judge by itself;
full fine-tuning with float32 weights packs and decodes as without autocast; two long sequences
share their prefix.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from datasets import Dataset
from measuring import Check
from project import (
    SelfJudgeConfig,
    SelfJudgeTrainer,
    TransformersScorer,
    backbone_tokens,
    bench,
    built,
    encoder_of,
    load_model,
    logits_read,
    pack_fused_head,
    quiet_training,
    records,
    seeded_gumbel,
    why_not_shared,
)
from transformers import LlamaConfig
from trl.trainer.utils import add_fused_lm_head

# TF32 last: it stays on.
TRAININGS = (
    {"weights": "bfloat16", "lora": True},
    {"weights": "bfloat16", "lora": False},
    {"weights": "float32", "lora": True},
    {"weights": "float32", "lora": False},
    {"weights": "float32", "lora": False, "tf32": True},
)
LENGTH, SHARED = 900, 500


def promises(check: Check) -> None:
    """All three."""
    for training in TRAININGS[:2] if check.tiny else TRAININGS:
        with check.errors_told(promise="float32 logits in training", **training):
            _training(check, **training)  # type: ignore[arg-type]
    with check.errors_told(promise="long pairs share"):
        _long_pairs(check)
    with check.errors_told(promise="the same noise on every device"):
        seeds = torch.tensor([1, 2**40])
        here, there = (
            seeded_gumbel(seeds.to(device), 7, 4096).cpu() for device in ("cpu", check.device)
        )
        check.say(promise="the same noise on every device", off=float((here - there).abs().max()))


def _model(check: Check, weights: str, vocabulary: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return built(config, "sdpa", getattr(torch, weights), check.device)


def _trained(check: Check, weights: str, vocabulary: int) -> Any:
    """SmolLM2, where it is there; else a random model."""
    if (check.model / "model.safetensors").is_file():
        return load_model(check.model, dtype=weights)
    return _model(check, weights, vocabulary)


def _training(check: Check, weights: str, lora: bool, tf32: bool = False) -> None:
    """One step of self-training, and what its judge read."""
    encoder = encoder_of(check)
    model = _trained(check, weights, len(encoder.tokenizer))
    before = copy.deepcopy(model).to(check.device)
    rows = [{"prompt": [dict(m) for m in r.prompt]} for r in records(check, 4)]
    precision: dict[str, Any] = {"bf16": False, "tf32": True} if tf32 else {"bf16": True}
    trainer = SelfJudgeTrainer(
        model=model,
        args=SelfJudgeConfig(
            **quiet_training(
                check,
                max_steps=1,
                max_new_tokens=8,
                max_length=1024,
                per_device_train_batch_size=4,
                save_rollouts=False,
                **precision,
            )
        ),
        processing_class=encoder.tokenizer,
        judge_templates=bench.templates_of(),
        train_dataset=Dataset.from_list(rows),
        peft_config=bench.lora() if lora else None,
    )
    scorer: Any = trainer.judge.scorer
    original, judged = scorer.letter_probabilities, []

    def spy(prompts: Any, letters: Any, done: Any) -> torch.Tensor:
        found = original(prompts, letters, done)
        if len(prompts):
            judged.append((list(prompts), letters, found))
        return found

    scorer.letter_probabilities = spy
    with logits_read(scorer.packing) as seen:
        trainer.train()
    logits = torch.cat([s.float() for s in seen])
    # The same weights, dtype and passes, without a trainer around them.
    alone = TransformersScorer(
        before, scorer.batch_size, batch_tokens=scorer.packing.shape.batch_tokens
    )
    again = [alone.letter_probabilities(prompts, ids, lambda n: None) for prompts, ids, _ in judged]
    here, there = torch.cat(again), torch.cat([found for *_, found in judged])
    packing = trainer.packing
    check.say(
        promise="float32 logits in training",
        weights=weights,
        lora=lora,
        tf32=tf32,
        off=float(f"{float((here - there).abs().max()):.1e}"),  # bfloat16 weights: within 1e-4
        off_in_logs=float(f"{float((here.log() - there.log()).abs().max()):.1e}"),
        logits_rounded_to_bfloat16=bool((logits == logits.bfloat16().float()).all()),
        judge=scorer.packing.describe()[:160],
        policy=packing.describe()[:160] if packing else "off",
        decoding=(why_not_shared(trainer.model) or "shared prompts")[:160],
        device=str(trainer.accelerator.device),
    )


def _long_pairs(check: Check) -> None:
    """Tokens computed for two sequences of 900 that share 500: 1,300."""
    draw, vocabulary = random.Random(0), 300
    prefix = [draw.randrange(3, vocabulary) for _ in range(SHARED)]
    pair = [
        prefix + [draw.randrange(3, vocabulary) for _ in range(LENGTH - SHARED)] for _ in range(2)
    ]
    unique = 2 * LENGTH - SHARED
    dtype = "float32" if check.tiny else "bfloat16"
    model = _model(check, dtype, vocabulary)
    scorer = TransformersScorer(model)
    scorer.letter_probabilities([prefix], (3, 4), lambda n: None)  # tries the model once
    with backbone_tokens(model) as seen:
        scorer.letter_probabilities(pair, (3, 4), lambda n: None)
    computed = {"judge": sum(seen)}
    ids = torch.tensor(pair, device=check.device)
    labels = ids.clone()
    labels[:, :SHARED] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    add_fused_lm_head(model)
    packing = pack_fused_head(model)
    assert packing is not None
    route = packing.decision.route
    for work, grad in (("update and JSFT", True), ("reference", False)):
        model.train(grad)
        with torch.set_grad_enabled(grad), backbone_tokens(model) as seen:
            model(**batch, fused_lm_head=True)
        computed[work] = sum(seen)
    check.say(promise="long pairs share", unique=unique, computed=computed, route=route)

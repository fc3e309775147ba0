"""Tiny models of many families, and sequences with prefixes in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers as hf

from conftest import DEVICE, on_test_device
from self_judge.packing.fused_head import FUSED_HEAD

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


SMALL: dict[str, Any] = {
    k: SIZES[k] for k in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")
}


CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": lambda: hf.MistralConfig(**SIZES, sliding_window=10),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=8),
    "gemma 2, windows in turn": lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=10),
    "phi": lambda: hf.PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
    "gpt2": lambda: hf.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                                  bos_token_id=1, eos_token_id=2, attn_pdrop=0, resid_pdrop=0,
                                  embd_pdrop=0),
    "granite, scaled logits": lambda: hf.GraniteConfig(**SIZES, logits_scaling=8.0),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "bloom, ALiBi": lambda: hf.BloomConfig(**SMALL, n_layer=2, n_head=4, hidden_dropout=0,
                                           attention_dropout=0),
    "falcon, ALiBi": lambda: hf.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4,
                                             alibi=True, new_decoder_architecture=False),
    "mamba 2, recurrent": lambda: hf.Mamba2Config(**SMALL, num_hidden_layers=2, state_size=8,
                                                  num_heads=8, head_dim=8, n_groups=1,
                                                  chunk_size=8, pad_token_id=0),
}  # fmt: skip


# What `auto` takes, by family.
ROUTES = dict.fromkeys(CONFIGS, "tree") | {
    "bloom, ALiBi": "cache",
    "falcon, ALiBi": "cache",
    "mamba 2, recurrent": "cache",
}


CASES = [
    (name, attention)
    for name in CONFIGS
    for attention in ("sdpa", "eager")
    if attention == "eager" or name not in ("bloom, ALiBi", "mamba 2, recurrent")
]


FUSED = pytest.mark.skipif(not FUSED_HEAD, reason="TRL 1.14 has no fused LM head")


def build(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if name.startswith("gemma 2"):
        attention = "eager"  # soft-capped scores are not in SDPA
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    for parameter in model.parameters():  # initial weights are so small that logits hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return on_test_device(model.eval())


def sharing(seed: int, longest_prefix: int = 9) -> list[list[int]]:
    """Sequences with prefixes in common, on two levels, of lengths from 1."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 120) for _ in range(draw.randint(least, most))]

    sequences = []
    for _ in range(4):
        root = tokens(1, longest_prefix)
        for _ in range(2):
            branch = root + tokens(0, 4)
            sequences += [branch + tokens(0, 6) for _ in range(draw.randint(1, 3))]
    draw.shuffle(sequences)
    return [*sequences, sequences[0]]


def fresh() -> int:
    return random.SystemRandom().randrange(10**6)


def alone(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]


def batch_of(sequences: Sequence[Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """TRL's batch: padded on the right, labels where a loss falls."""
    draw = random.Random(seed)
    longest = max(map(len, sequences)) + 2
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        ids[row, :n], mask[row, :n] = torch.tensor(sequence), 1
        start = draw.randint(0, n)
        labels[row, start:n] = ids[row, start:n]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}

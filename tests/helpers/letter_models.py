"""Shared by tests of judge and letter_scoring."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel


def reference(model: torch.nn.Module, prompts: list[list[int]], letters: Any) -> torch.Tensor:
    """One prompt at a time, no padding, all logits, double precision."""
    exact = tiny_copy(model).double()
    with torch.no_grad():
        ids = [torch.tensor([p], device=exact.device) for p in prompts]
        rows = [exact(own).logits[0, -1].softmax(-1).cpu() for own in ids]
    return torch.stack(rows)[:, list(letters)]


def gpt2(vocabulary: int, positions: int = 256) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=positions,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def with_adapter(model: torch.nn.Module, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "v_proj"], **changes}
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    )
    return adapted.eval()


def tiny_copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).eval()

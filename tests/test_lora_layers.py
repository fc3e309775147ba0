"""LoRA layers made lighter: PEFT's numbers, wherever and however they are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_llama
from self_judge.lora_layers import lighten


def adapted(dtype: torch.dtype, *, names: tuple[str, ...] = ("default",), **config: Any) -> Any:
    """A tiny model with adapters whose weights are all random, in training mode."""
    base = tiny_llama(64).to(dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **config)
    torch.manual_seed(0)
    model: Any = get_peft_model(base, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    model.base_model.set_adapter(list(names))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn_like(weight)
            weight.requires_grad_(True)
    return model.train()


def lightened(model: Any) -> Any:
    copied = copy.deepcopy(model)
    lighten(copied)
    return copied


def outcome(model: Any, *, autocast: bool, **inputs: Any) -> list[torch.Tensor]:
    """Logits and the adapters' gradients of one step."""
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, **inputs).logits
    logits.float().logsumexp(-1).mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 1 and all(map(torch.equal, left, right))


def casts(model: Any, *, autocast: bool) -> int:
    with torch.profiler.profile() as profile:
        outcome(model, autocast=autocast)
    return sum(e.count for e in profile.key_averages() if e.key == "aten::_to_copy")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"names": ("one", "two")},
        {"names": ("one", "two"), "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_logits_and_gradients_are_those_of_peft_to_the_bit(
    kind: dict[str, Any], dtype: torch.dtype, autocast: bool
) -> None:
    model = adapted(dtype, **kind)
    assert same(outcome(lightened(model), autocast=autocast), outcome(model, autocast=autocast))


def test_an_input_that_autocast_would_cast_back_is_not_cast() -> None:
    model = adapted(torch.bfloat16)
    layers = sum(hasattr(m, "lora_A") for m in model.modules())
    saved = casts(model, autocast=True) - casts(lightened(model), autocast=True)
    # There and back, forward and backward; the three that read frozen embeddings have no backward.
    assert saved == 4 * layers - 6


def test_the_model_of_a_trainer_is_lighter_and_has_the_weights_that_it_had(
    make: Any, tokenizer: Any
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    usual = get_peft_model(tiny_llama(len(tokenizer)).bfloat16(), adapter).train()
    trained = make(model=tiny_llama(len(tokenizer)).bfloat16(), peft_config=adapter).model
    assert list(trained.state_dict()) == list(usual.state_dict())
    assert casts(trained, autocast=True) < casts(usual, autocast=True) - 40

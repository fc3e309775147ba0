"""LoRA layers made lighter: PEFT's numbers, wherever and however they are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from conftest import DEVICE, tiny_llama
from self_judge.training.lora_layers import lighten


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
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.manual_seed(2)  # of dropout
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
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
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"lora_bias": True},
        {"names": ("one", "two")},
        {"names": ("one", "two"), "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_what_is_not_plain_gives_the_numbers_of_peft_to_the_bit(
    kind: dict[str, Any], dtype: torch.dtype, autocast: bool
) -> None:
    model = adapted(dtype, **kind)
    assert same(outcome(lightened(model), autocast=autocast), outcome(model, autocast=autocast))


def trained_base(model: Any) -> None:
    model.get_base_model().requires_grad_(True)


def merged(model: Any) -> None:
    model.merge_adapter()
    model.get_base_model().model.embed_tokens.requires_grad_(True)


def off(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.get_base_model().model.embed_tokens.requires_grad_(True)


def doubled(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [trained_base, merged, off, doubled])
def test_what_becomes_other_than_plain_later_gives_the_numbers_of_peft(change: Any) -> None:
    model = adapted(torch.bfloat16)
    lighter = lightened(model)
    for one in (model, lighter):
        change(one)
    assert same(outcome(lighter, autocast=True), outcome(model, autocast=True))


def test_a_batch_of_several_adapters_gives_the_numbers_of_peft() -> None:
    model = adapted(torch.bfloat16, names=("one", "two")).eval()
    model.set_adapter("one")
    inputs = {"adapter_names": ["one", "two"], "autocast": True}
    assert same(outcome(lightened(model), **inputs), outcome(model, **inputs))


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, True), (torch.float32, False)])
@pytest.mark.parametrize("scaling", [1, 2, 1.7])
@pytest.mark.parametrize("seed", range(3))
def test_a_plain_layer_is_as_near_to_float64_as_in_peft(
    dtype: torch.dtype, autocast: bool, scaling: float, seed: int
) -> None:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(96, 160)).requires_grad_(False).to(DEVICE, dtype)
    config = LoraConfig(r=8, lora_alpha=8 * scaling, target_modules=["0"])  # type: ignore[arg-type]
    usual = inject_adapter_in_model(config, base)
    usual[0].lora_B["default"].weight.data.normal_(std=0.02)
    lighter = copy.deepcopy(usual)
    lighten(lighter)
    x, pull = (torch.randn(2, 150, width).to(DEVICE, dtype) for width in (96, 160))

    def found(model: nn.Module, states: torch.Tensor, cast: bool) -> list[torch.Tensor]:
        own = states.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
            given = model(own)
        adapter = [p for p in model.parameters() if p.requires_grad]
        assert len(adapter) == 2
        return [given, *torch.autograd.grad(given, [own, *adapter], pull.to(given.dtype))]

    exact = found(copy.deepcopy(usual).double(), x.double(), False)
    theirs, ours = found(usual, x, autocast), found(lighter, x, autocast)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    if autocast and DEVICE == "cpu":  # one rounding fewer
        assert not same(ours, theirs)
    for one, other, expected in zip(ours, theirs, exact, strict=True):
        limit = (other.double() - expected).norm()
        assert (one.double() - expected).norm() <= 1.1 * limit


def test_adapters_in_float32_on_half_precision_stay_in_float32_without_autocast() -> None:
    model = adapted(torch.bfloat16)
    assert same(outcome(lightened(model), autocast=False), outcome(model, autocast=False))


def test_an_input_that_autocast_would_cast_back_is_not_cast() -> None:
    for kind in ({}, {"lora_bias": True}):
        model = adapted(torch.bfloat16, **kind)
        layers = sum(hasattr(m, "lora_A") for m in model.modules())
        saved = casts(model, autocast=True) - casts(lightened(model), autocast=True)
        # There and back, forward and backward; three read frozen embeddings, without a backward.
        assert saved >= 4 * layers - 6


def test_the_model_of_a_trainer_is_lighter_and_has_the_weights_that_it_had(
    make: Any, tokenizer: Any
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    usual = get_peft_model(tiny_llama(len(tokenizer)).bfloat16(), adapter).train()
    trained = make(model=tiny_llama(len(tokenizer)).bfloat16(), peft_config=adapter).model
    assert list(trained.state_dict()) == list(usual.state_dict())
    assert casts(trained, autocast=True) < casts(usual, autocast=True) - 40

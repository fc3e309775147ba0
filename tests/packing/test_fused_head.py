"""The fused head: TRL's numbers from packed passes, and every other call as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import DEVICE
from families import (
    CASES,
    FUSED,
    ROUTES,
    alone,
    batch_of,
    build,
    fresh,
    sharing,
)
from self_judge.packing.fused_head import pack_fused_head


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    pairs = list(zip(found.parameters(), expected.parameters(), strict=True))
    kept = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    assert all(a is not None for a, _ in kept)
    off = sum(((a - b).double() ** 2).sum() for a, b in kept)
    size = sum((b.double() ** 2).sum() for _, b in kept)
    return float((off / size).sqrt())


@FUSED
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_log_probabilities_and_gradients_are_those_of_separate_passes(
    name: str, attention: str
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    seed = fresh()
    model = build(name, attention, seed)
    plain = copy.deepcopy(model)
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    packing = pack_fused_head(model)
    assert packing is not None
    expected_route = "padding" if name.startswith("mamba") else ROUTES[name]
    assert packing.decision.route == expected_route, packing.decision
    batch = batch_of(sharing(seed), seed)
    output = model(**batch, fused_lm_head=True)
    weight = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.to(output.log_probs.device)
    (output.log_probs * weight).sum().backward()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        logits = alone(plain, batch["input_ids"][row, :length])[:-1]
        targets = batch["labels"][row, 1:length]
        scored = targets != -100
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * scored
        (own * weight[row, : length - 1]).sum().backward()
        expected = {
            "log_probs": own,
            "entropy": -(log_probs.exp() * log_probs).sum(-1) * scored,
            "mean_logits": logits.mean(-1) * scored,
        }
        for field, value in expected.items():
            found = getattr(output, field)[row]
            assert not found[length - 1 :].any()
            torch.testing.assert_close(
                found[: length - 1], value, rtol=0, atol=1e-4, msg=f"{field}, seed {seed}"
            )
        right = (logits.argmax(-1) == targets) & scored
        assert output.is_top1[row, : length - 1].tolist() == right.tolist()
    assert relative(model, plain) < 1e-5, f"seed {seed}"


def fused_pair(model: Any, **lora: Any) -> tuple[Any, Any]:
    """The same model twice, with TRL's fused head: packed, and as it is."""
    from trl.trainer.utils import add_fused_lm_head

    twins = []
    for packed in (True, False):
        own = copy.deepcopy(model)
        add_fused_lm_head(own)
        if lora:
            torch.manual_seed(1)
            own = get_peft_model(
                own, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
            )
        if packed:
            assert pack_fused_head(own) is not None
        twins.append(own.train())
    return twins[0], twins[1]


@FUSED
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bloom, ALiBi"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    packed, plain = fused_pair(build(name, "eager"))
    for model in (packed, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        batch = batch_of(sharing(11), 11)
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
    assert relative(packed, plain) < 1e-5


@FUSED
def test_an_adapter_trains_the_same_and_can_be_switched_off() -> None:
    packed, plain = fused_pair(build("llama"), r=4, target_modules=["q_proj", "v_proj"])
    batch = batch_of(sharing(12), 12)
    computed: list[int] = []
    for model in (packed, plain):
        model(**batch, fused_lm_head=True)  # tries the model once
        model.get_base_model().model.register_forward_pre_hook(
            lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        model(**batch, fused_lm_head=True)
    assert sum(computed[:-1]) < computed[-1]  # packed, for all that the adapter hands on
    found = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    for log_probs in found:
        log_probs.sum().backward()
    assert relative(packed, plain) < 1e-5
    with packed.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        off = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    torch.testing.assert_close(*off, rtol=0, atol=1e-4)
    assert (off[0] - found[0]).abs().max() > 1e-2


@FUSED
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_reaches_the_packed_rows(attention: str) -> None:
    packed, plain = fused_pair(build("llama", attention))
    batch = batch_of(sharing(13), 13)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    exact = plain(**batch, fused_lm_head=True).log_probs
    off = [(f.float() - exact).abs().max().item() for f in found]
    assert 0 < off[0] < 2 * off[1] + 1e-3  # as far from float32 as unpacked rows are


@FUSED
def test_a_batch_without_targets_gives_zeros_that_are_connected_to_the_model() -> None:
    packed, _ = fused_pair(build("llama"))
    batch = batch_of(sharing(14), 14)
    batch["labels"][:] = -100
    output = packed(**batch, fused_lm_head=True)
    assert not output.log_probs.any()
    output.log_probs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())


@FUSED
def test_rows_without_targets_are_not_computed() -> None:
    packed, _ = fused_pair(build("llama"))
    batch = batch_of([[5, 6, 7, 8], [9, 10, 11, 12]], 0)
    batch["labels"][:] = -100
    batch["labels"][0, 3] = 8
    packed(**batch, fused_lm_head=True)  # tries the model once
    computed: list[int] = []
    packed.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    packed(**batch, fused_lm_head=True)
    assert computed == [3]  # the last token is a target only


@FUSED
def test_a_batch_that_cannot_be_packed_goes_to_the_model_as_it_is() -> None:
    packed, plain = fused_pair(build("mixtral"))
    batch = batch_of(sharing(15), 15)
    found = packed(**batch, fused_lm_head=True, output_router_logits=True)
    expected = plain(**batch, fused_lm_head=True, output_router_logits=True)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.aux_loss, expected.aux_loss)


@FUSED
def test_every_other_call_of_the_model_is_as_before() -> None:
    packed, plain = fused_pair(build("llama"))
    ids = torch.tensor([[5, 6, 7]], device=packed.device)
    assert torch.equal(packed.eval()(ids).logits, plain.eval()(ids).logits)
    made = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (packed, plain)]
    assert torch.equal(*made)

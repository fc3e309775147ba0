"""Half precision: the judge's logits stay float32, and what is exact is recognised as exact."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import DEVICE, TEMPLATES, Make, weights
from families import FUSED
from self_judge import Comparison, Judge
from self_judge.inference.decoding import why_not_shared
from self_judge.inference.letter_scoring import TransformersScorer
from self_judge.models import load_model
from self_judge.packing import exactness
from self_judge.packing.fused_head import pack_fused_head
from self_judge.packing.packing import _LAYOUTS, Packing
from self_judge.training.identity.reference import active_reference, frozen_reference

BF16 = torch.bfloat16
AUTOCAST = {"bf16": True, "use_cpu": DEVICE == "cpu", "max_steps": 1}
COMPARISONS = [Comparison(f"what is {i}?", f"it is {i}", "no " * i) for i in range(1, 6)]


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All logits that any judge reads."""
    found: list[torch.Tensor] = []
    usual = TransformersScorer._logits

    def spy(self: Any, prompts: Any) -> Iterator[Any]:
        for places, logits in usual(self, prompts):
            found.append(logits)
            yield places, logits

    monkeypatch.setattr(TransformersScorer, "_logits", spy)
    return found


# How the trainer comes by its judge.
JUDGES = {
    "the adapter switched off": lambda model: {"model": model, "peft_config": lora()},
    "a frozen copy": lambda model: {"model": model},
    "a copy of the adapter": lambda model: {"model": get_peft_model(model, lora())},
    "a model given": lambda model: {"model": model, "ref_model": frozen_reference(model)},
}


@pytest.mark.parametrize("weights", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("how", JUDGES)
def test_the_judge_of_a_training_in_bf16_reads_float32_logits(
    how: str, weights: torch.dtype, make: Make, model: Any, seen: list[torch.Tensor]
) -> None:
    trainer = make(**AUTOCAST, **JUDGES[how](model.to(weights)))
    trainer.train()
    seen.clear()
    with active_reference(trainer):
        trainer.judge.compare(COMPARISONS)
    logits = torch.cat([x.flatten() for x in seen])
    assert logits.dtype == torch.float32
    rounded = logits.to(BF16).float()
    assert (logits != rounded).float().mean() > 0.9  # bfloat16 cannot hold them


@pytest.mark.parametrize("packing", ["auto", "cache", "padding", "off"])
@pytest.mark.parametrize("how", JUDGES)
def test_the_judge_of_a_training_in_bf16_is_the_judge_by_itself(
    how: str, packing: Any, make: Make, model: Any, tokenizer: Any
) -> None:
    alone = copy.deepcopy(model.to(BF16))
    trainer = make(packing=packing, learning_rate=0.3, **AUTOCAST, **JUDGES[how](model))
    trainer.train()
    judge = Judge(
        alone, tokenizer, TEMPLATES, batch_size=8, max_length=256, packing=packing,
        batch_tokens=getattr(trainer.judge.packing.shape, "batch_tokens", None),
    )  # fmt: skip
    with active_reference(trainer):
        found = trainer.judge.compare(COMPARISONS)
    expected = judge.compare(COMPARISONS)
    for f, e in zip(found, expected, strict=True):
        # As logarithms: a random model gives its letters next to nothing.
        found_p, expected_p = torch.tensor(f.probabilities), torch.tensor(e.probabilities)
        torch.testing.assert_close(found_p.log(), expected_p.log(), rtol=0, atol=1e-4)


@FUSED
@pytest.mark.parametrize("trained", ["lora", "full"])
@pytest.mark.parametrize("weights", [BF16, torch.float32], ids=str)
def test_log_probabilities_of_a_training_in_bf16_are_as_precise_as_trls(
    trained: str, weights: torch.dtype, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for side in ("auto", "off"):
        adapter = {"peft_config": lora()} if trained == "lora" else {}
        own = copy.deepcopy(model).to(weights)
        trainer = make(model=own, packing=side, learning_rate=0.0, **AUTOCAST, **adapter)
        kept: list[torch.Tensor] = []
        usual = trainer._compute_loss

        def loss(
            model: Any, inputs: Any, outputs: bool, usual: Any = usual, kept: Any = kept
        ) -> Any:
            kept += [inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]
            return usual(model, inputs, outputs)

        monkeypatch.setattr(trainer, "_compute_loss", loss)
        trainer.train()
        found[side] = torch.cat(kept)
        history = trainer.state.log_history[0]
        # Nothing was learned yet: policy and reference say the same, to the rounding of bfloat16.
        assert abs(history["rewards/margins"]) < 0.02
    assert found["auto"].dtype == found["off"].dtype == torch.float32
    assert (found["auto"] != found["auto"].to(BF16).float()).any()
    torch.testing.assert_close(found["auto"], found["off"], rtol=1e-2, atol=1e-2)


# -- exactness -------------------------------------------------------------------------------------


def wrapped_in_autocast(model: Any) -> Any:
    """As Accelerate prepares a model for `bf16: true`."""
    usual = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(DEVICE, BF16):
            return usual(*args, **kwargs)

    model.forward = forward
    return model


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_float32_weights_that_compute_in_bf16_share_prefixes(model: Any, adapter: bool) -> None:
    rough = rounding(get_peft_model(model, lora()) if adapter else model)
    for choice in ("auto", "cache"):
        found = Packing(wrapped_in_autocast(rough), choice).decision
        assert found.route == ("tree" if choice == "auto" else choice), found.reason
    assert why_not_shared(rough) is None


def rounding(model: Any, share: float = 5e-3) -> Any:
    """Moves logits by a share of the largest, as other kernels of lower precision do."""
    generator = torch.Generator().manual_seed(0)

    def blur(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        noise = 2 * torch.rand(logits.shape, generator=generator) - 1
        return logits + share * logits.abs().max() * noise.to(logits.device)

    model.get_output_embeddings().register_forward_hook(blur)
    return model


def test_autocast_ends_with_the_training(make: Make, model: Any) -> None:
    for adapter in ({}, {"peft_config": lora()}):
        make(model=copy.deepcopy(model), **AUTOCAST, **adapter).train()
        assert not torch.is_autocast_enabled(DEVICE)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_the_first_update_in_bf16_reaches_every_weight(
    trained: str, make: Make, model: Any
) -> None:
    # Autocast keeps the weights it has cast: those of a trial have no gradient.
    adapter = {"peft_config": lora()} if trained == "lora" else {}
    trainer = make(model=model, learning_rate=0.1, **AUTOCAST, **adapter)
    before = weights(trainer.model)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:  # B is zero, and so A's gradient
            assert not torch.equal(parameter, before[name]), name


def test_tf32_shares_prefixes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Packing(rounding(copy.deepcopy(model))).decision.route == "off"  # in full float32
    monkeypatch.setattr(exactness, "_multiplies_exactly", lambda device: False)
    assert Packing(rounding(copy.deepcopy(model))).decision.route == "tree"
    assert why_not_shared(rounding(copy.deepcopy(model))) is None


def breaks(model: Any, error: BaseException, times: float = math.inf) -> None:
    """Makes the next calls of a model fail."""
    left = [times]

    def fail(module: Any, args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error

    model.get_input_embeddings().register_forward_pre_hook(fail)


PASSING = {
    "full memory of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "full memory of a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "full memory of the machine": MemoryError(),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    "a compilation": torch._dynamo.exc.InternalTorchDynamoError("no kernel", None),
    "Inductor": torch._inductor.exc.InductorError(ValueError("no kernel"), None),
}


@pytest.mark.parametrize("error", PASSING)
@pytest.mark.parametrize("way", ["packing", "decoding"])
def test_an_error_that_may_pass_is_raised_and_the_trial_run_again(
    way: str, error: str, model: Any
) -> None:
    breaks(model, PASSING[error], times=1)

    def route() -> str | None:
        return Packing(model).decision.route if way == "packing" else why_not_shared(model)

    with pytest.raises(type(PASSING[error])):
        route()
    assert route() == ("tree" if way == "packing" else None)


def test_full_memory_in_a_judges_trial_ends_in_a_verdict(model: Any, tokenizer: Any) -> None:
    expected = Judge(copy.deepcopy(model), tokenizer, TEMPLATES).compare(COMPARISONS)
    breaks(model, PASSING["full memory of a GPU"], times=1)
    judge = Judge(model, tokenizer, TEMPLATES)
    assert [v.preferred for v in judge.compare(COMPARISONS)] == [v.preferred for v in expected]
    assert judge.packing.decision.route == "tree"


def test_auto_that_shares_nothing_warns_once_with_the_reason(
    model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exactness.warn_once.cache_clear()
    breaks(model, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with caplog.at_level(logging.WARNING):
        for own in (model, copy.deepcopy(model), model):
            assert Packing(own).decision.route == "off"
            assert Packing(own, gradients=True).decision.route == "off"
            assert why_not_shared(own) is not None
    told = [r.getMessage() for r in caplog.records if "shapes cannot be multiplied" in r.message]
    assert [t.split(":")[0] for t in told if "generate" in t] == [
        "sampling with LlamaForCausalLM.generate"
    ]
    assert len([t for t in told if t.startswith("packing of LlamaForCausalLM: off")]) == 1


@pytest.mark.parametrize("wrong", ["mask", "positions"])
def test_a_mistake_is_caught_in_bf16_as_well(
    wrong: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = _LAYOUTS["tree"]

    def mistaken(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for this in usual(*args, **kwargs):
            if wrong == "mask":  # branches see each other
                this.inputs["attention_mask"] = torch.ones_like(
                    this.inputs["attention_mask"]
                ).tril()
            else:
                this.inputs["position_ids"] = this.inputs["position_ids"].sort(-1).values
            yield this

    monkeypatch.setitem(_LAYOUTS, "tree", mistaken)
    for own in (copy.deepcopy(model).to(BF16), wrapped_in_autocast(copy.deepcopy(model))):
        with pytest.raises(ValueError, match="in a trial, logits differed by"):
            Packing(own, "tree")


@pytest.mark.slow
def test_smollm2_in_full_fine_tuning_in_bf16_packs_trees_and_decodes_with_shared_prompts() -> None:
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    folder = Path(os.environ.get("SELF_JUDGE_SMOLLM2") or "no such folder")
    if not (folder / "config.json").is_file():
        pytest.skip("SELF_JUDGE_SMOLLM2 does not name a folder with SmolLM2")
    model: Any = load_model(folder, dtype=torch.float32)
    add_fused_lm_head(model)
    updates, judging = pack_fused_head(model), Packing(model)
    assert updates is not None
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert updates.decision.route == judging.decision.route == "tree"
    assert why_not_shared(model) is None

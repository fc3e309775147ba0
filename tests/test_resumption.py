"""Numbers that are not finite, memory that is full, two trainings at once: none spoils a run."""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from conftest import Make, history, same, weights
from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Response
from self_judge.inference.sampling import TransformersSampler
from self_judge.prompting.judge_prompt import encode_orders
from self_judge.training.checkpointing import NotFiniteError

LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def spoiled(trainer: Any, steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the loss of some steps NaN, and so their gradients."""
    inner = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = inner(*args, **kwargs)
        return loss * math.nan if trainer.state.global_step + 1 in steps else loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)


def test_a_step_without_a_finite_gradient_leaves_weights_and_optimizer_as_they_are(
    make: Make, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(max_steps=3)
    spoiled(trainer, {2}, monkeypatch)
    kept: list[Any] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = weights(trainer.model)
        state = copy.deepcopy(self.state_dict()["state"])
        found = step(self, *args, **kwargs)
        moments = self.state_dict()["state"]
        moved = any(
            not torch.equal(moments[k]["exp_avg"], state[k]["exp_avg"]) for k in state
        ) or len(moments) > len(state)
        kept.append((same(before, weights(trainer.model)), moved))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    trainer.train()
    assert kept == [(False, True), (True, False), (False, True)]
    assert history(trainer, "skipped_steps") == [0.0, 1.0, 0.0]
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert "step 2 is left out: the norm of its gradient is nan" in caplog.text


def test_training_stops_with_a_diagnosis_after_some_such_steps_in_a_row(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make(max_steps=9, max_skipped_steps=2, save_strategy="steps", save_steps=1)
    spoiled(trainer, {2, 4, 5, 6}, monkeypatch)
    with pytest.raises(NotFiniteError, match=r"step 5 is the last of 2 in a row .* after step 3"):
        trainer.train()
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (1, 2, 3, 4)
    ]


def test_training_stops_when_the_judge_gives_no_numbers(
    make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(max_steps=9)
    start = weights(trainer.model)
    nan = torch.full((2,), math.nan)
    monkeypatch.setattr(
        trainer.judge, "letter_probabilities", lambda prompts, **_: nan.expand(len(prompts), 2)
    )
    with pytest.raises(NotFiniteError, match=r"no response could be judged.* after step 0"):
        trainer.train()
    assert history(trainer, "judge/broken") == [1.0, 1.0]
    assert same(start, weights(trainer.model))


def test_a_response_without_a_token_is_counted_and_not_learned_from(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make(max_steps=1)
    sample = TransformersSampler.sample

    def silent(self: Any, *args: Any, **kwargs: Any) -> list[list[Response]]:
        found = sample(self, *args, **kwargs)
        return [
            [Response((), "", False), *own[1:]] if i == 0 else own for i, own in enumerate(found)
        ]

    monkeypatch.setattr(TransformersSampler, "sample", silent)
    trainer.train()
    assert history(trainer, "judge/broken") == [0.25]
    (path,) = (tmp_path / "run" / "rollouts").iterdir()
    first = json.loads(path.read_text().splitlines()[0])
    assert not first["decided"]
    assert first["undecidable_because"] == "a response without a token"


def test_weights_that_are_not_finite_are_never_a_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make(max_steps=4, save_strategy="steps", save_steps=1)
    step = torch.optim.AdamW.step

    def overflowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = step(self, *args, **kwargs)
        if trainer.state.global_step == 1:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = math.inf
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(NotFiniteError, match=r"step 2: 1 trained weights are not finite"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


# -- memory that is full ------------------------------------------------------------------------


def test_sampling_goes_on_with_half_as_many_responses_and_draws_the_same(
    model: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [encoder.encode_prompt([{"role": "user", "content": f"what is {i}?"}]) for i in "abc"]
    settings = SamplingSettings(max_new_tokens=5, temperature=1.0, top_p=0.9)
    expected = TransformersSampler(model, encoder, settings).sample(prompts, 4, 7)
    inner = TransformersSampler._sampled

    def small(self: Any, rows: Any) -> Any:
        if sum(len(seeds) for _, seeds in rows) > 3:
            raise torch.OutOfMemoryError(FULL)
        return inner(self, rows)

    monkeypatch.setattr(TransformersSampler, "_sampled", small)
    sampler = TransformersSampler(model, encoder, settings)
    with caplog.at_level(logging.WARNING):
        assert sampler.sample(prompts, 4, 7) == expected
    assert sampler.batch_size == 3
    assert "out of memory while sampling 12 responses at a time: from here on 6" in caplog.text


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_judging_goes_on_with_half_as_much_and_finds_the_same(
    packing: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from self_judge import Comparison

    judge = make(packing=packing).judge
    asked = [Comparison(f"what is {i}?", f"{i} it is", f"no, {i + 1}" * 3) for i in range(8)]
    expected = judge.compare(asked)
    inner, tried = judge.scorer.model.forward, []

    def small(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs["input_ids"].numel()
        tried.append(tokens)
        if tokens > 200:
            raise torch.OutOfMemoryError(FULL)
        return inner(*args, **kwargs)

    monkeypatch.setattr(judge.scorer.model, "forward", small)
    found = judge.compare(asked)
    assert max(tried) > 200
    assert max(tried[-3:]) <= 200
    for verdict, known in zip(found, expected, strict=True):
        assert verdict.score_a == pytest.approx(known.score_a, abs=1e-5)
        assert verdict.preferred == known.preferred


@pytest.mark.parametrize("packing", ["auto", "tree", "cache", "padding"])
def test_judging_comes_down_to_one_prompt_where_memory_has_no_room_for_a_pair(
    packing: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from self_judge import Comparison

    monkeypatch.setattr("self_judge.packing.packing._by_segments", lambda packing: False)
    judge = make(packing=packing).judge
    judge.packing.shape = replace(judge.packing.shape, batch_tokens=1000)
    asked = [Comparison(f"what is {i}?", f"{i} it is", f"no, {i + 1}" * 3) for i in range(2)]
    expected = judge.compare(asked)
    prompts = [
        ids
        for principle in judge.templates
        for one in asked
        for ids in encode_orders(judge.encoder, judge.templates, principle, one, None) or ()
    ]
    inner, longest = judge.scorer.model.forward, max(map(len, prompts))

    def small(*args: Any, **kwargs: Any) -> Any:
        held = kwargs.get("attention_mask", kwargs["input_ids"]).shape[-1]
        if kwargs["input_ids"].shape[0] * held > longest:
            raise torch.OutOfMemoryError(FULL)
        return inner(*args, **kwargs)

    monkeypatch.setattr(judge.scorer.model, "forward", small)
    for verdict, known in zip(judge.compare(asked), expected, strict=True):
        assert verdict.score_a == pytest.approx(known.score_a, abs=1e-5)
    monkeypatch.setattr(judge.scorer.model, "forward", inner)


def test_a_prompt_that_alone_fills_the_memory_is_the_error_that_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from self_judge import Comparison

    judge = make(packing="off").judge

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(judge.scorer.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        judge.compare([Comparison("what?", "this", "that")])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_update_is_done_in_parts_with_the_same_gradient(
    accumulation: int,
    make: Make,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
    }
    undisturbed = make(model=copy.deepcopy(model), **settings)
    undisturbed.train()
    trainer = make(model=copy.deepcopy(model), **settings)
    inner, calls = trainer._compute_loss, 0

    def small(model: Any, inputs: Any, return_outputs: bool) -> Any:
        nonlocal calls
        calls += 1
        # The last micro-batch of the first step is the first that does not fit.
        if calls >= accumulation and inputs["input_ids"].size(0) > 2:
            raise torch.OutOfMemoryError(FULL)
        return inner(model, inputs, return_outputs)

    monkeypatch.setattr(trainer, "_compute_loss", small)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "out of memory while updating on 4 pairs at a time: from here on 2" in caplog.text
    assert "out of memory while updating on 2 pairs at a time: from here on 1" in caplog.text
    for key in ("loss", "grad_norm", "rewards/margins", "judge/margin", "num_tokens"):
        assert history(trainer, key) == pytest.approx(history(undisturbed, key), rel=1e-4, abs=1e-6)
    for found, expected in zip(
        trainer.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# -- two trainings at once ----------------------------------------------------------------------


def test_two_trainers_in_one_process_do_not_disturb_each_other(
    make: Make, model: Any, tmp_path: Path
) -> None:
    def build(name: str, **changes: Any) -> Any:
        return make(model=copy.deepcopy(model), output_dir=str(tmp_path / name), **changes)

    def trained(trainer: Any) -> dict[str, torch.Tensor]:
        trainer.train()
        return weights(trainer.model)

    lora = {"peft_config": LoraConfig(**LORA), "seed": 3}
    alone = [trained(build("a", seed=1)), trained(build("b", **lora))]
    both = [build("c", seed=1), build("d", **lora)]
    later = trained(both[1])
    assert same(trained(both[0]), alone[0])
    assert same(later, alone[1])

"""Full memory: half as much at a time, with the same numbers."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from conftest import Make, history
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.prompting.judge_prompt import encode_orders

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


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
    assert "out of memory while sampling 12 responses at a time: continuing with 6" in caplog.text


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


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
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
    assert "out of memory while updating on 4 pairs at a time: continuing with 2" in caplog.text
    assert "out of memory while updating on 2 pairs at a time: continuing with 1" in caplog.text
    for key in ("loss", "grad_norm", "rewards/margins", "judge/margin", "num_tokens"):
        assert history(trainer, key) == pytest.approx(history(undisturbed, key), rel=1e-4, abs=1e-6)
    for found, expected in zip(
        trainer.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

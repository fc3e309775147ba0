"""Numbers that are not finite, memory that is full, two trainings at once: none spoils a run."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from conftest import Make, history, same, weights
from self_judge.datatypes import Response
from self_judge.inference.sampling import TransformersSampler
from self_judge.training.fault_tolerance import NotFiniteError

LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


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
    assert "step 2 is skipped: the norm of its gradient is nan" in caplog.text


def test_training_stops_with_a_diagnosis_after_some_such_steps_in_a_row(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = make(max_steps=9, max_skipped_steps=2, save_strategy="steps", save_steps=1)
    spoiled(trainer, {2, 4, 5, 6}, monkeypatch)
    with pytest.raises(NotFiniteError, match=r"step 5, the last of 2 .* since step 3"):
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
    with pytest.raises(NotFiniteError, match=r"no pair could be judged.* since step 0"):
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
    with pytest.raises(NotFiniteError, match=r"step 2: 1 trained weights contain NaN or infinity"):
        trainer.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]


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


def test_a_finished_run_resumed_into_an_empty_folder_ends_at_once(
    make: Make, model: Any, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 2}
    make(model=copy.deepcopy(model), **saving).train()
    elsewhere = make(model=model, output_dir=str(tmp_path / "elsewhere"), **saving)
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert elsewhere.state.global_step == 2
    assert not list((tmp_path / "elsewhere").glob("checkpoint-*"))

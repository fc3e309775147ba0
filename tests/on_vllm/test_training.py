"""Whole self-training steps of SmolLM2-135M through vLLM in the training process, for real."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import torch
from datasets import Dataset
from peft import LoraConfig

from on_vllm.conftest import ASKED, LORA, PAIRS, TEMPLATES
from self_judge import ChatEncoder, Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.training.identity.reference import active_reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_whole_self_training_step_goes_through_the_engine(
    lora: bool, base: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    rows = [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED]
    trainer = SelfJudgeTrainer(
        model=model,
        args=SelfJudgeConfig(
            str(tmp_path / "run"),
            use_vllm=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            max_new_tokens=12,
            max_length=512,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=3,
        ),
        processing_class=encoder.tokenizer,
        train_dataset=Dataset.from_list(rows),
        judge_templates=TEMPLATES,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    assert trainer.vllm is not None
    try:
        frozen = Judge(copy.deepcopy(base), encoder, TEMPLATES).compare(PAIRS)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 2
        assert all(math.isfinite(entry["loss"]) for entry in logged)
        assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # policy = reference
        assert logged[1]["loss"] != logged[0]["loss"]
        judged = trainer.judge.compare(PAIRS)
        for left, right in zip(judged, frozen, strict=True):  # whatever the policy has learned
            assert torch.tensor(left.probabilities).allclose(
                torch.tensor(right.probabilities), atol=1e-4
            )
        assert isinstance(trainer.judge.scorer, VLLMScorer) == lora
        # The policy that the training ended with samples in the engine as it does here.
        there = trainer.vllm.sampler(active_reference(trainer))
        there = VLLMSampler(there.engine, encoder, GREEDY, there.adapter)
        prompts = [encoder.encode_prompt([{"role": "user", "content": asked}]) for asked in ASKED]
        here = TransformersSampler(trainer.model, encoder, GREEDY).sample(prompts)
        assert there.sample(prompts) == here
        assert here != TransformersSampler(base, encoder, GREEDY).sample(prompts)
    finally:
        trainer.vllm.engine.close()  # type: ignore[attr-defined]

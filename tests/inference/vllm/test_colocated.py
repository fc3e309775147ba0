"""The colocated engine: how it sleeps, and what it says where it does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from conftest import SMALL, TEMPLATES
from fake_vllm import LORA, FakeLLM, install
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.errors import EngineError
from self_judge.inference.vllm.colocated import VLLMEngine
from self_judge.training.self_training.vllm_sync import checkpoint_weights


def engine(model: Any, **changes: Any) -> VLLMEngine:
    return VLLMEngine(
        model.config,
        checkpoint_weights(model),
        dtype=torch.float32,
        max_model_length=64,
        **changes,
    )


def answer(of: VLLMEngine) -> list[list[float]]:
    return of.next_token_logprobs([[3, 4, 5]], [6, 7], None, lambda n: None)


@pytest.mark.parametrize(("lora", "level"), [(True, 1), (False, 2)], ids=["lora", "full"])
def test_an_engine_keeps_the_weights_over_its_sleep_only_below_an_adapter(
    lora: bool,
    level: int,
    tmp_path: Path,
    tokenizer: Any,
    model: Any,
    queries: list[dict[str, Any]],
    monkeypatch: Any,
) -> None:
    install(monkeypatch)
    monkeypatch.setattr(SelfJudgeConfig, "_check_vllm", lambda self: None)  # there is no GPU
    args = SelfJudgeConfig(
        str(tmp_path), use_vllm=True, vllm_enable_sleep_mode=True, max_steps=3, **SMALL
    )
    trainer = SelfJudgeTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(queries),
        judge_templates=TEMPLATES,
        peft_config=LoraConfig(**LORA) if lora else None,
    )
    trainer.train()  # the first rollouts check that the engine answers as the model does
    (started,) = FakeLLM.started
    assert started.slept == [level] * 4  # once it is started, and after every rollout
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 5 for loss in losses)


def test_weights_that_were_dropped_have_to_be_loaded_before_anything_is_asked(
    model: Any, monkeypatch: Any
) -> None:
    install(monkeypatch)
    deep = engine(model, sleep_level=2)
    before = answer(deep)
    deep.sleep()
    deep.wake_up()
    with pytest.raises(EngineError, match=r"sleep level 2\): call load_weights"):
        answer(deep)
    deep.load_weights(checkpoint_weights(model))
    assert answer(deep) == before
    light = engine(model, sleep_level=1)
    light.sleep()
    light.wake_up()
    assert answer(light) == before


def test_an_engine_that_does_not_start_says_what_was_asked_and_what_is_free(
    model: Any, monkeypatch: Any
) -> None:
    def refuses(**settings: Any) -> Any:
        raise ValueError("Free memory on device cuda:0 (9.5/80.0 GiB) is less\n  than desired")

    install(monkeypatch, refuses)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(9.5 * 2**30), 80 * 2**30))
    with pytest.raises(EngineError) as caught:
        engine(model, gpu_memory_utilization=0.3)
    text = str(caught.value)
    assert "\n" not in text
    assert "vLLM cannot start with this model: Free memory on device cuda:0" in text
    assert "vllm_gpu_memory_utilization=0.3 reserves 24.0 of this GPU's 80.0 GiB" in text
    assert "9.5 GiB were free before vLLM started" in text


@pytest.mark.cpu
def test_an_engine_on_a_cpu_speaks_of_no_gpu(model: Any, monkeypatch: Any) -> None:
    def refuses(**settings: Any) -> Any:
        raise NotImplementedError("no such architecture")

    install(monkeypatch, refuses)
    with pytest.raises(EngineError, match=r"no such architecture$"):
        engine(model)

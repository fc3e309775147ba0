"""DeepSpeed on the CPU in two real processes; skipped where it is not installed.

`make test-extras` builds an environment with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from test_processes import (
    BIASED,
    ONE,
    SAVING,
    TWO,
    USED,
    WRONG,
    column,
    launch,
    refused,
    result,
    same_weights,
)
from train_in_processes import spoil

from conftest import byte_bpe, tiny_llama, wrap
from self_judge.models import load_tokenizer
from self_judge.storage.atomic import integrity_error

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model to name: under ZeRO-3 policy and judge are loaded by their name."""
    tokenizer = wrap(byte_bpe())
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_two_processes_learn_what_one_learns_from_a_batch_twice_as_large(
    file: str, lora: bool, folder: str, tmp_path: Path
) -> None:
    shared: dict[str, Any] = {"model": folder, "lora": lora}
    one = result(tmp_path / "one", **shared, args=ONE)
    two = result(tmp_path / "two", file=file, processes=2, **shared, args=TWO)
    assert (two["processes"], two["kind"]) == (2, "DEEPSPEED")
    for key in ("loss", "judge/margin", "completions/mean_length", "completions/max_length"):
        assert column(two, key) == pytest.approx(column(one, key), abs=1e-5), key
    assert len(set(column(one, "loss"))) == 4
    same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_a_run_is_resumed_from_its_checkpoint(file: str, folder: str, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"file": file, "processes": 2, "model": folder}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = result(tmp_path / "whole", **asked, args={**TWO, **saving})
    assert integrity_error(tmp_path / "whole" / "checkpoint-2") is None
    resumed = result(
        tmp_path / "resumed", **asked, args=TWO, resume=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss"), abs=1e-6)
    same_weights(tmp_path / "whole", tmp_path / "resumed", tolerance=1e-6)


@pytest.mark.parametrize("file", ["zero2", "zero3"])
def test_a_judge_that_uses_a_trained_weight_is_refused_by_its_name(
    file: str, folder: str, tmp_path: Path
) -> None:
    biased = tiny_llama(len(load_tokenizer(folder)), attention_bias=True)
    biased.save_pretrained(folder)
    refused(tmp_path, USED, file=file, model=folder, **BIASED)


@pytest.mark.parametrize(("asked", "told"), WRONG)
def test_a_sharded_run_ends_in_all_processes(
    asked: dict[str, Any], told: str, folder: str, tmp_path: Path
) -> None:
    refused(tmp_path, told, file="zero3", model=folder, **asked)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_weights_that_zero3_would_not_gather_are_refused_before_the_first_step(
    lora: bool, folder: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"file": "zero3", "model": folder, "lora": lora}
    asked |= {"flags": ["--zero3_save_16bit_model", "false"]}
    if lora:  # DeepSpeed always gathers an adapter
        run = result(tmp_path / "run", processes=2, **asked, args=TWO)
        assert len(set(column(run, "loss"))) == 4
    else:
        refused(tmp_path / "run", "ZeRO-3 would save shards instead of a model", **asked)


def test_an_adapter_of_embeddings_is_saved_without_them_and_resumed(
    folder: str, tmp_path: Path
) -> None:
    peft = {"target_modules": ["embed_tokens", "q_proj"]}
    asked: dict[str, Any] = {"file": "zero3", "model": folder, "lora": True, "peft": peft}
    whole = result(tmp_path / "whole", processes=2, **asked, args=SAVING)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = result(tmp_path / "resumed", processes=2, **asked, args=TWO, resume=str(checkpoint))
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss"), abs=1e-6)


def test_a_run_is_not_resumed_from_weights_that_differ_from_the_saved_model(
    folder: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"file": "zero3", "processes": 2, "model": folder}
    result(tmp_path / "whole", **asked, args=SAVING)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    spoil(checkpoint / "model.safetensors")  # DeepSpeed resumes from files of its own
    told = rf"cannot load {checkpoint}: \S+ differs from the weights in memory"
    refused(tmp_path / "resumed", told, **asked, resume=str(checkpoint))


def test_a_process_that_dies_ends_the_job_with_an_error(folder: str, tmp_path: Path) -> None:
    done = launch(tmp_path / "run", "zero3", 2, args=TWO, model=folder, dies=True)
    assert done.returncode != 0
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_model_in_memory_alone_is_refused_where_the_judge_is_loaded_by_name(
    tmp_path: Path,
) -> None:
    done = launch(tmp_path / "run", "zero3", 2, args=TWO)
    assert done.returncode != 0
    assert "ZeRO-3 loads the judge by the model's name" in done.stderr

"""Estimates: parameters are counted as they are, and memory follows from what is held at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from conftest import SHARED, tiny_llama
from self_judge.check.cost import comparisons_per_prompt, device_for
from self_judge.check.memory import GIB, GPUS, Setting, Work, memory
from self_judge.check.model_size import Kept, Size, empty_model, kept_activations, size_of
from self_judge.config.hardware import Machine
from self_judge.errors import ModelError
from self_judge.runtime import cache_name

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "llama tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16),
    "gemma2": Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=8),
    "phi": PhiConfig(**COMMON),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "opt": OPTConfig(**{**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "mixtral": MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=4),
}


def saved(config: PretrainedConfig, folder: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_has_the_parameters_of_the_real_one(family: str, tmp_path: Any) -> None:
    real = saved(FAMILIES[family], tmp_path)
    empty = empty_model(str(tmp_path))
    assert all(p.device.type == "meta" for p in empty.parameters())
    size = size_of(empty)
    assert size.parameters == sum(p.numel() for p in real.parameters())
    assert size.weight_bytes == sum(p.numel() * p.element_size() for p in real.parameters())
    assert size == size_of(real)


def test_an_adapter_is_counted_as_peft_counts_it() -> None:
    model = tiny_llama(100)
    config = LoraConfig(task_type="CAUSAL_LM", r=4)
    before = size_of(model)
    adapted = get_peft_model(model, config)
    size = size_of(adapted)
    trainable, every = adapted.get_nb_trainable_parameters()
    assert (size.trainable, size.parameters) == (trainable, every)
    assert before.trainable == before.parameters == every - trainable


def test_matrices_are_what_every_token_is_multiplied_with() -> None:
    size = size_of(tiny_llama(100))
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert size.matrix == 2 * (attention + 3 * 32 * 64)
    assert size.head == 100 * 32
    # Two layers, keys and values, two heads of eight, float32.
    assert size.cache_bytes == 2 * 2 * 2 * 8 * 4
    mixtral = size_of(AutoModelForCausalLM.from_config(FAMILIES["mixtral"]))
    gate = 3 * 4 * 32
    experts = 3 * 2 * 3 * 32 * 64  # two of the four
    assert mixtral.matrix == 3 * (32 * 32 * 2 + 32 * 16 * 2) + gate + experts


def test_the_cache_is_as_large_as_said() -> None:
    model = tiny_llama(100)
    output = model(torch.arange(10, device=model.device)[None], use_cache=True)
    cache = output[cache_name(model)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * size_of(model).cache_bytes


@pytest.mark.parametrize("lora", [False, True])
def test_what_autograd_keeps_is_what_a_real_pass_keeps(lora: bool) -> None:
    model: Any = tiny_llama(100).train()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    inner = model.get_base_model() if lora else model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mask = torch.zeros(2, 1, 24, 24, device=model.device)
        ids = torch.zeros(2, 24, dtype=torch.long, device=model.device)
        inner.model(input_ids=ids, attention_mask=mask)
    kept = kept_activations(model, 2, 24)
    assert kept.counted
    assert kept.kept == pytest.approx(sum(s.nbytes() for s in seen.values()), rel=0.02)
    # The model that was followed is as it was.
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert kept.checkpoints < kept.kept
    assert kept_activations(model, 4, 24).kept == pytest.approx(2 * kept.kept, rel=0.05)


def test_a_pass_that_cannot_be_followed_falls_back_and_says_so() -> None:
    class Choosing(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("which expert?")

    model: Any = tiny_llama(100)
    model.model.layers[0].mlp = Choosing()
    kept = kept_activations(model, 1, 10)
    assert not kept.counted
    assert kept.kept == 34 * 10 * 32 * 2 * 2


def test_a_name_without_a_model_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="cannot read the model configuration"):
        empty_model(str(tmp_path))


SIZE = Size(
    parameters=7 * 10**9,
    trainable=7 * 10**9,
    weight_bytes=28 * 10**9,
    trainable_bytes=28 * 10**9,
    matrix=6 * 10**9,
    head=10**8,
    layers=32,
    hidden=4096,
    vocabulary=32_000,
    context=4096,
    cache_bytes=524_288,
)
KEPT = Kept(kept=8 * GIB, checkpoints=GIB, layer=GIB // 4, counted=True)
WORK = Work(tokens=10_000, largest=(4, 500), largest_scored=1_000)
FULL = Setting(bf16=False, checkpointing=False)


def test_full_training_holds_weights_gradients_and_two_moments() -> None:
    held = memory(SIZE, KEPT, WORK, FULL, GPUS["h100"])
    assert held.weights == held.gradients == 28 * 10**9
    assert held.optimizer == 56 * 10**9
    assert held.peak == held.held + held.activations + held.head
    small = dataclasses.replace(FULL, optimizer="adamw_8bit")
    assert memory(SIZE, KEPT, WORK, small, GPUS["h100"]).optimizer == 14 * 10**9


def test_sharding_divides_what_it_shards() -> None:
    def of(**changes: Any) -> Any:
        setting = dataclasses.replace(FULL, bf16=True, processes=8, **changes)
        return memory(SIZE, KEPT, WORK, setting, GPUS["h100"])

    zero2, zero3 = of(sharding="zero2"), of(sharding="zero3")
    # DeepSpeed: bfloat16 weights, float32 weights and moments in the optimizer.
    assert zero2.weights == 14 * 10**9
    assert zero2.optimizer == zero3.optimizer == 12 * 7 * 10**9 // 8
    assert zero3.weights < zero2.weights / 4
    assert of(sharding="fsdp").gradients == 28 * 10**9 // 8


def test_checkpointing_keeps_less_of_the_forward_pass() -> None:
    checkpointed = dataclasses.replace(FULL, checkpointing=True)
    less = memory(SIZE, KEPT, WORK, checkpointed, GPUS["h100"])
    more = memory(SIZE, KEPT, WORK, FULL, GPUS["h100"])
    assert less.activations < more.activations / 4


def test_the_judge_of_a_full_training_is_a_second_copy_of_the_weights() -> None:
    held = memory(SIZE, KEPT, WORK, dataclasses.replace(FULL, reference=True), GPUS["h100"])
    alone = memory(SIZE, KEPT, WORK, FULL, GPUS["h100"])
    assert (held.reference, alone.reference) == (28 * 10**9, 0)
    assert held.peak - alone.peak == 28 * 10**9


def test_sampling_holds_the_cache_of_those_that_are_sampled_together() -> None:
    work = dataclasses.replace(WORK, sampled_at_once=64, sampled_length=300.0)
    sampling = memory(SIZE, KEPT, work, FULL, GPUS["h100"]).cache
    assert sampling == 64 * (300 * 524_288 + 32_000 * 16)
    twice = dataclasses.replace(work, sampled_at_once=32)
    assert memory(SIZE, KEPT, twice, FULL, GPUS["h100"]).cache == sampling / 2
    longer = dataclasses.replace(work, sampled_length=3000.0)
    held = memory(SIZE, KEPT, longer, FULL, GPUS["h100"])
    assert held.largest_phase == "sampling"
    assert held.peak == held.held + held.cache


@pytest.mark.parametrize(("name", "gib"), [("rtx-3090", 24), ("a100-40gb", 40), ("h200", 141)])
def test_the_memory_of_a_gpu_is_known_by_its_name(name: str, gib: int) -> None:
    assert device_for(name, Machine()).memory == gib * GIB
    with pytest.raises(ValueError, match=f"--gpu {name}x: unknown GPU; known GPUs: rtx-3090"):
        device_for(f"{name}x", Machine())


@pytest.mark.parametrize(
    ("responses", "selection", "count"), [(2, "best_worst", 1), (4, "best_random", 4)]
)
def test_comparisons_are_counted_by_playing(responses: int, selection: Any, count: int) -> None:
    assert count - 1 <= comparisons_per_prompt(responses, selection) <= count


@pytest.mark.skipif(
    not (SHARED.parent / "smollm2").is_dir(), reason="SmolLM2 is not beside the project"
)
def test_smollm2_is_counted_as_its_file_has_it() -> None:
    from safetensors import safe_open

    folder = SHARED.parent / "smollm2"
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    counted = size_of(empty_model(str(folder)))
    assert counted.parameters == sum(torch.Size(s).numel() for s in shapes)
    assert counted.vocabulary == AutoConfig.from_pretrained(folder).vocab_size

"""Before the first step, a run shows that what it will save is what it will have trained."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig

from conftest import Make, same, tiny_llama, weights
from self_judge.errors import ModelError
from self_judge.models import load_model
from self_judge.training.identity import mixin
from self_judge.training.identity.saved_weights import check_saved
from self_judge.training.jsft.trainer import JSFTTrainer

IDS = torch.tensor([[5, 60, 70, 80, 90]])


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits.float().cpu()


@pytest.fixture
def taught(tmp_path: Path, tokenizer: Any) -> Any:
    """Builds a JSFTTrainer, whose adapter nothing but its files has to fit."""

    def build(model: Any, **changes: Any) -> JSFTTrainer:
        settings = {"max_steps": 1, "save_strategy": "no", "report_to": "none", **changes}
        row = {"input_ids": [5, 60, 70, 80], "labels": [5, 60, 70, 80]}
        return JSFTTrainer(
            model,
            SFTConfig(str(tmp_path / "run"), max_length=None, bf16=False, **settings),
            train_dataset=Dataset.from_list([row] * 8),
            processing_class=tokenizer,
        )

    return build


def refused(trainer: Any, told: str) -> None:
    """A run that ends before its first step, with its weights as they were."""
    before = weights(trainer.model)
    with pytest.raises(ModelError, match=told) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.state.global_step == 0
    assert same(weights(trainer.model), before)


# -- adapters --------------------------------------------------------------------------------------


def drawn(seed: int) -> LoraConfig:
    """LoRA by settings that change how its weights are read, drawn at random."""
    draw = random.Random(seed)
    modules = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]
    chosen = draw.sample(modules, draw.randint(1, 4))
    return lora(
        r=draw.choice([1, 3, 8]),
        target_modules=chosen,
        lora_alpha=draw.choice([1, 8, 64]),
        use_rslora=draw.random() < 0.5,
        use_dora=draw.random() < 0.3,
        rank_pattern={draw.choice(chosen): 2},
        alpha_pattern={draw.choice(chosen): 5},
        bias=draw.choice(["none", "none", "lora_only", "all"]),
        layers_to_transform=None if "embed_tokens" in chosen else [1],
    )


@pytest.mark.parametrize(
    "config",
    [
        *map(drawn, range(6)),
        lora(trainable_token_indices=[3, 4]),
        lora(modules_to_save=["norm", "lm_head"]),
        lora(modules_to_save=["embed_tokens"]),
        lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
        lora(layer_replication=[[0, 2], [0, 2]]),
        lora(init_lora_weights="pissa"),
        VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda config: str(config.peft_type.value),
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_its_file_gives_back_is_trained(
    tied: bool, config: Any, taught: Any, tokenizer: Any, tmp_path: Path
) -> None:
    if tied and config.peft_type == "LORA" and config.trainable_token_indices:
        pytest.skip("refused, see below")
    tiny_llama(len(tokenizer), tie_word_embeddings=tied, attention_bias=True).save_pretrained(
        tmp_path / "base"
    )
    trainer = taught(get_peft_model(load_model(tmp_path / "base"), config), learning_rate=0.01)
    trainer.train()
    trainer.save_model()
    if isinstance(config, PromptTuningConfig):
        return
    expected, found = logits(trainer.model), logits(load_model(tmp_path / "run"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_added_tokens_do_not_reach_a_tied_head(taught: Any, tokenizer: Any) -> None:
    adapter = get_peft_model(
        tiny_llama(len(tokenizer), tie_word_embeddings=True), lora(trainable_token_indices=[3, 4])
    )
    refused(taught(adapter), "trainable_token_indices would not reach the head")


def unfreeze(model: Any) -> None:
    model.base_model.model.model.norm.weight.requires_grad_(True)


def scale(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 3.0)


def second(model: Any) -> None:
    model.add_adapter("other", lora(target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "other"])


def renamed(model: Any) -> None:
    model.add_adapter("mine", lora())
    model.set_adapter("mine")
    model.delete_adapter("default")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (unfreeze, r"norm\.weight is trained, but it is not part of the adapter"),
        (scale, "another one after it is saved and loaded"),
        (second, "the active adapters are default, other, but only the adapter 'default'"),
        (renamed, "the active adapters are mine, but only the adapter 'default'"),
    ],
)
def test_an_adapter_that_its_file_does_not_give_back_is_not_trained(
    edit: Any, told: str, taught: Any, model: Any
) -> None:
    adapter = get_peft_model(model, lora())
    edit(adapter)
    refused(taught(adapter), told)


@pytest.mark.parametrize("trainer", ["jsft", "self_judge"])
def test_a_merge_that_is_wrong_shows_in_a_new_adapter(
    trainer: str, taught: Any, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose product is zero, until something changes it."""
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda *given: 1.5 * right(*given))
    if trainer == "jsft":
        refused(taught(get_peft_model(model, lora())), "another one after it is saved and loaded")
    else:
        refused(make(peft_config=lora()), "another one after it is saved and loaded")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_is_the_same_to_the_bit_without_its_rehearsal(
    adapter: bool, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> dict[str, torch.Tensor]:
        config = lora(lora_dropout=0.5) if adapter else None
        trainer = make(model=copy.deepcopy(model), peft_config=config)
        trainer.train()
        return weights(trainer.model)

    rehearsed = trained()
    monkeypatch.setattr(mixin, "rehearse_saving", lambda model: None)
    assert same(trained(), rehearsed)


# -- full models -----------------------------------------------------------------------------------


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def tie_layers(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def add_bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.ones(model.config.vocab_size, device=model.device))


def cut(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def stretch(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def swap(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def describe_otherwise(model: Any) -> None:
    model.config.rms_norm_eps = 1.0


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (tie, r"embed_tokens\.weight and lm_head\.weight are the same weights in memory alone"),
        (tie_layers, r"layers\.1\.mlp\.up_proj\.weight are the same weights in memory alone"),
        (add_bias, r"it has unexpected weights: lm_head\.bias"),
        (cut, r"it lacks weights: model\.layers\.1\."),
        (stretch, "another one after it is saved and loaded"),
        (swap, "another one after it is saved and loaded"),
        (describe_otherwise, "another one after it is saved and loaded"),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_its_configuration_does_not_give_back_is_not_trained(
    adapter: bool, edit: Any, told: str, taught: Any, model: Any
) -> None:
    edit(model)
    refused(taught(get_peft_model(model, lora()) if adapter else model), told)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_was_resized_or_untied_is_trained_and_saved(
    tied: bool, taught: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    model.resize_token_embeddings(len(tokenizer) + 7)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    trainer = taught(model, learning_rate=0.01)
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(load_model(tmp_path / "run")), logits(trainer.model))


@pytest.mark.parametrize("lost", [None, "removed", "changed"])
def test_experts_that_are_stored_in_pieces_are_compared_too(
    lost: str | None, tmp_path: Path
) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    experts = MixtralForCausalLM(config)
    experts.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    [*_, name] = [name for name in state if "experts.1" in name]
    assert name not in experts.state_dict()
    if lost == "removed":
        del state[name]
    elif lost:
        state[name][0, 0] += 0.1
    save_file(state, file, {"format": "pt"})
    if lost is None:
        check_saved(experts, tmp_path)
    else:
        with pytest.raises(ModelError, match=r"not saved correctly: \d weights in memory .*mlp"):
            check_saved(experts, tmp_path)


# -- the base of an adapter ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_base_that_was_edited_in_any_of_its_weights_is_no_base(
    seed: int, taught: Any, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    edited = load_model(tmp_path / "base")
    name, weight = random.Random(seed).choice([*edited.named_parameters()])
    with torch.no_grad():
        weight[0] += 0.1
    refused(taught(get_peft_model(edited, lora())), rf"differs from the weights saved.*{name}")


def test_a_base_of_the_hub_is_compared_with_its_files(
    taught: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "org" / "base")
    edited = load_model(tmp_path / "org" / "base")
    edited.name_or_path = edited.config._name_or_path = "org/base"
    with torch.no_grad():
        edited.lm_head.weight += 0.1
    adapter = get_peft_model(edited, lora())
    assert isinstance(adapter, PeftModel)
    trainer = taught(adapter)
    monkeypatch.chdir(tmp_path)  # as if the Hub's cache were here
    refused(trainer, "the adapter would name org/base as its base")

"""The model that is loaded, judged by, and saved is the one that was named and trained."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTConfig

from conftest import CHATML, DEVICE, ROOT, SMALL, TEMPLATES, Make, tiny_llama, weights
from letter_models import gpt2
from self_judge import Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.adapters import fingerprint, merged
from self_judge.check.check import check
from self_judge.cli import main
from self_judge.commands.tournament import TournamentJob
from self_judge.config.self_training import SamplingSettings
from self_judge.errors import CheckpointError, ModelError
from self_judge.judging.choice import JudgeChoice
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting import chat_encoder
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import load_judge_settings, save_judge_settings
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.training.fault_tolerance import NotFiniteError
from self_judge.training.identity.reference import active_reference
from self_judge.training.jsft.trainer import JSFTTrainer

IDS = torch.tensor([[5, 60, 70, 80, 90]])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.to(DEVICE)(IDS.to(DEVICE)).logits.float().cpu()


def randomized(model: Any, scale: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.device))
    return model


# -- loading ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A saved model with its tokenizer."""
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edited(folder: Path, edit: Any) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("seed", range(4))
def test_a_weight_that_is_missing_is_named(folder: Path, seed: int) -> None:
    names = sorted(load_file(folder / "model.safetensors"))
    lost = random.Random(seed).choice(names)
    edited(folder, lambda state: state.pop(lost))
    with pytest.raises(ModelError, match=f"lacks weights: {lost}"):
        load_model(folder)


def test_weights_without_a_place_are_named(folder: Path) -> None:
    edited(folder, lambda state: state.update({"score.weight": torch.zeros(2, 2)}))
    with pytest.raises(ModelError, match=r"has unexpected weights: score\.weight"):
        load_model(folder)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_a_configuration_of_another_depth_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=r"weights: model\.layers\.\d"):
        load_model(folder)


@pytest.mark.parametrize("changes", [{"intermediate_size": 40}, {"vocab_size": 99}])
def test_a_configuration_of_another_width_is_one_line_that_names_weights(
    folder: Path, changes: dict[str, Any]
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    named = "mlp" if "intermediate_size" in changes else "embed_tokens"
    with pytest.raises(ModelError, match=f"has other shapes of weights: .*{named}") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_folder_with_the_weights_of_two_saves_is_refused(folder: Path, tokenizer: Any) -> None:
    """Transformers would read the older file, and none of the shards."""
    later = tiny_llama(len(tokenizer), seed=4)
    later.save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(ModelError, match="has two sets of weights"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(load_model(folder)), logits(later))


def test_commands_name_missing_weights_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    encoder = ChatEncoder(load_tokenizer(folder))
    templates = JudgeTemplates(TEMPLATES)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Hi", "response_a": "a", "response_b": "b"}\n')
    assert main(["judge", str(pairs), str(tmp_path / "out.jsonl"), "--model", str(folder)]) != 0
    assert "lacks weights: model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_both_trainers_and_the_check_name_missing_weights_before_training(
    folder: Path, tmp_path: Path, queries: Any, data: dict[str, Path]
) -> None:
    lost = "model.layers.0.input_layernorm.weight"
    edited(folder, lambda state: state.pop(lost))
    rows = Dataset.from_list(queries)
    with pytest.raises(ModelError, match=lost):
        SelfJudgeTrainer(str(folder), judge_templates=TEMPLATES, train_dataset=rows)
    with pytest.raises(ModelError, match=lost):
        JSFTTrainer(str(folder), SFTConfig(str(tmp_path / "sft"), bf16=False), train_dataset=rows)
    overrides = [
        f"model.model_name_or_path={folder}", f"dataset.sources=[{{path: {data['hh']}}}]",
        "dataset.eval=[]", f"training_args.output_dir={folder}",
    ]  # fmt: skip
    report = check(ROOT / "configs/hh_jsft.yaml", overrides)
    problems = [f.text for f in report.findings if f.level == "problem"]
    assert any(lost in text for text in problems)
    assert any("would overwrite the input" in text for text in problems)


def test_tied_weights_are_not_missing(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


# -- the Hub, as its cache on this machine ---------------------------------------------------------


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts folders into a cache of the Hub, one commit per call."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))

    def put(folder: Path, name: str, revision: str = "main") -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        commits = repository / "snapshots"
        commit = f"{len(list(commits.glob('*'))) + 1:040x}"
        shutil.copytree(folder, commits / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)

    return put


def test_a_judge_and_its_adapter_are_loaded_by_their_names_on_the_hub(
    folder: Path, tmp_path: Path, publish: Any
) -> None:
    publish(folder, "org/base")
    base = load_model("org/base")
    adapter = randomized(get_peft_model(copy.deepcopy(base), LoraConfig(**LORA)))
    expected = logits(adapter.eval())
    adapter.peft_config["default"].base_model_name_or_path = "org/base"
    adapter.save_pretrained(str(tmp_path / "adapter"))
    encoder = ChatEncoder(load_tokenizer("org/base"))
    templates = JudgeTemplates(TEMPLATES)
    letters = encoder.letter_ids(templates)
    save_judge_settings(tmp_path / "adapter", encoder, templates, letters)
    publish(tmp_path / "adapter", "org/judge")
    assert load_judge_settings("org/judge") is not None
    assert load_judge_settings("org/base") is None
    judge = Judge.from_pretrained("org/judge", device="cpu")
    torch.testing.assert_close(logits(judge.model), expected, rtol=1e-4, atol=1e-5)
    trainable = load_model("org/judge", merge=False)
    assert isinstance(trainable, PeftModel)
    assert any(p.requires_grad for p in trainable.parameters())
    # Other weights under the same name are another model.
    before = fingerprint("org/judge")
    publish(tmp_path / "adapter", "org/judge")
    assert before is not None
    assert fingerprint("org/judge") != before


def test_an_adapter_gets_the_revision_of_its_base(
    folder: Path, tmp_path: Path, tokenizer: Any, publish: Any
) -> None:
    publish(folder, "org/base", "v1")
    tiny_llama(len(tokenizer), seed=9).save_pretrained(folder)
    publish(folder, "org/base", "main")
    old = load_model("org/base", revision="v1")
    assert not torch.equal(logits(old), logits(load_model("org/base")))
    adapter = randomized(get_peft_model(old, LoraConfig(**LORA, revision="v1")))
    expected = logits(adapter.eval())
    adapter.save_pretrained(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["revision"] == "v1"
    torch.testing.assert_close(
        logits(load_model(tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_trainer_takes_weights_tokenizer_and_templates_from_one_revision(
    folder: Path, tmp_path: Path, queries: Any, publish: Any
) -> None:
    encoder = ChatEncoder(load_tokenizer(folder))
    for revision, name in (("v1", "kind"), ("main", "brief")):
        templates = JudgeTemplates({name: next(iter(TEMPLATES.values()))})
        save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
        publish(folder, "org/judge", revision)
    trainer = SelfJudgeTrainer(
        "org/judge",
        args=SelfJudgeConfig(
            str(tmp_path / "run"), max_steps=1, model_init_kwargs={"revision": "v1"}, **SMALL
        ),
        train_dataset=Dataset.from_list(queries),
    )
    assert list(trainer.judge_templates) == ["kind"]


# -- adapters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}])
def test_an_adapter_with_added_tokens_brings_them_along(
    folder: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    base = load_model(folder)
    base.resize_token_embeddings(len(load_tokenizer(folder)) + 3, mean_resizing=False)
    adapter = randomized(get_peft_model(base, LoraConfig(**LORA, **how)))
    expected = logits(adapter.eval())
    adapter.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    found = logits(load_model(tmp_path / "adapter"))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def damaged(folder: Path, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    names = sorted(state)
    if how == "empty":
        state = {}
    elif how == "renamed":
        state = {name.replace("lora_A", "lora_C"): tensor for name, tensor in state.items()}
    elif how == "surplus":
        state["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    else:
        state = {name: state[name] for name in names if "layers.1." not in name}
    save_file(state, file)


@pytest.mark.parametrize("how", ["a layer less", "surplus", "renamed"])
def test_an_adapter_with_other_weights_than_it_says_is_refused(
    how: str, folder: Path, tmp_path: Path
) -> None:
    adapter = randomized(get_peft_model(load_model(folder), LoraConfig(**LORA)))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    damaged(tmp_path / "adapter", how)
    with pytest.raises(
        ModelError, match=r"the adapter .* (lacks|has unexpected) weights: base_model"
    ):
        load_model(tmp_path / "adapter")


def test_an_adapter_of_other_layers_than_its_file_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = get_peft_model(load_model(folder), LoraConfig(**LORA))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["o_proj"]}))
    with pytest.raises(ModelError, match="lacks weights"):
        load_model(tmp_path / "adapter")


def test_adapters_on_positions_leave_the_vocabulary(tmp_path: Path) -> None:
    gpt2(64, positions=32).save_pretrained(tmp_path / "base")
    adapter = get_peft_model(
        load_model(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", target_modules=["wpe"])
    )
    adapter = randomized(adapter)
    ids = torch.tensor([[5, 6, 7]])
    expected = adapter.eval()(ids).logits
    adapter.save_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(load_model(tmp_path / "adapter")(ids).logits, expected)


def test_what_cannot_be_merged_is_one_line(folder: Path, tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load_model(folder), prompts).save_pretrained(str(tmp_path / "prompts"))
    with pytest.raises(ModelError, match="cannot be merged: its virtual tokens"):
        load_model(tmp_path / "prompts")
    biased = get_peft_model(load_model(folder), LoraConfig(**LORA, lora_bias=True))
    with pytest.raises(ModelError, match=r"cannot be merged: lora_bias needs a bias, and .*q_proj"):
        merged(biased)


@pytest.mark.parametrize("depth", [1, 2])
def test_an_adapter_trained_on_an_adapter_is_loaded_with_it(
    depth: int, folder: Path, tmp_path: Path, make: Make
) -> None:
    start = folder
    for level in range(depth):
        adapter = randomized(get_peft_model(load_model(start), LoraConfig(**LORA)))
        start = tmp_path / f"adapter{level}"
        adapter.save_pretrained(str(start))
    trainer = make(model=load_model(start), peft_config=LoraConfig(**LORA), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    config = json.loads((tmp_path / "policy/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(start)
    torch.testing.assert_close(
        logits(load_model(tmp_path / "policy")), logits(trainer.model.eval()), rtol=1e-3, atol=1e-4
    )


def last_norm(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight += 0.1
    return model


@pytest.mark.parametrize("edit", [randomized, last_norm])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_adapter_is_not_trained_on_a_base_that_its_name_does_not_lead_to(
    shards: int, edit: Any, folder: Path, tmp_path: Path, make: Make
) -> None:
    whole, base = load_model(folder), tmp_path / "base"
    size = sum(p.nbytes for p in whole.parameters())
    whole.save_pretrained(base, max_shard_size=size // shards + 1)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shards > 1)
    edited_model = edit(load_model(base))
    with pytest.raises(ModelError, match="in memory differs from the weights saved there"):
        make(model=edited_model, peft_config=LoraConfig(**LORA)).train()


def test_an_adapter_that_is_its_own_base_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = get_peft_model(load_model(folder), LoraConfig(**LORA))
    adapter.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_model_name_or_path": str(tmp_path / "adapter")}))
    with pytest.raises(ModelError, match="its chain of base models never ends"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("merge_on_loading", [False, True])
def test_merging_into_tied_weights_leaves_the_others_as_they_are(
    how: dict[str, Any], merge_on_loading: bool, tmp_path: Path, tokenizer: Any
) -> None:
    tiny_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    adapter = get_peft_model(
        load_model(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", r=4, **how)
    )
    expected = logits(randomized(adapter).eval())
    if merge_on_loading:
        adapter.save_pretrained(str(tmp_path / "adapter"))
        plain = load_model(tmp_path / "adapter")
    else:
        plain = merged(adapter)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-3, atol=1e-4)
    plain.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged")), expected, rtol=1e-3, atol=1e-4
    )


# -- the frozen judge ------------------------------------------------------------------------------

SETTLED = [
    LoraConfig(**LORA),
    LoraConfig(**LORA, use_dora=True),
    LoraConfig(**LORA, modules_to_save=["lm_head"]),
    IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
              feedforward_modules=["down_proj"]),
    LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    BOFTConfig(task_type="CAUSAL_LM", boft_block_size=4, target_modules=["q_proj"]),
]  # fmt: skip


@pytest.mark.parametrize("config", SETTLED, ids=lambda c: f"{c.peft_type} {c.task_type}")
def test_an_adapter_that_can_be_turned_off_leaves_the_judge_as_it_was(
    config: Any, make: Make, model: Any
) -> None:
    before = logits(model)
    trainer = make(peft_config=config, save_strategy="steps", save_steps=1)
    trainer.train()
    with active_reference(trainer):
        assert torch.equal(logits(trainer.model), before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_whose_biases_stay_when_it_is_off_is_refused_by_name(
    bias: str, make: Make, tokenizer: Any
) -> None:
    model = tiny_llama(len(tokenizer), attention_bias=True)
    before = weights(model)
    trainer = make(model=model, peft_config=LoraConfig(**LORA, bias=bias))
    with pytest.raises(ModelError, match=r"the judge would change .*_proj.*bias"):
        trainer.train()
    after = {k.replace("base_layer.", ""): v for k, v in weights(trainer.model).items()}
    for name, value in before.items():  # restored to the bit
        assert torch.equal(after[f"base_model.model.{name}"], value)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_that_was_trained_before_is_trained_again_against_what_it_is_now(
    adapter: bool, make: Make, model: Any
) -> None:
    make(model=model).train()
    now = logits(model)
    trainer = make(model=model, peft_config=LoraConfig(**LORA) if adapter else None, max_steps=3)
    trainer.train()
    with active_reference(trainer):
        judge = trainer.ref_model if trainer.ref_model is not None else trainer.model
        torch.testing.assert_close(logits(judge), now, rtol=0, atol=0)


def test_a_judge_that_shares_weights_with_the_policy_is_refused(make: Make, model: Any) -> None:
    trainer = make(model=model)
    trainer.ref_model.lm_head.weight = trainer.model.lm_head.weight
    trainer.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"it uses lm_head\.weight, which is trained"):
        trainer.train()


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_judge_that_moves_during_training_is_an_error_not_a_model(
    strategy: str, make: Make, tmp_path: Path
) -> None:
    trainer = make(save_strategy=strategy, save_steps=1)

    class Moves(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                trainer.ref_model.lm_head.weight.mul_(1.5)

    trainer.add_callback(Moves())
    with pytest.raises(ModelError, match="the judge has changed during training"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*"))
    with pytest.raises(ModelError, match="the judge has changed during training"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


# -- what is saved ---------------------------------------------------------------------------------


def test_a_model_with_broken_weights_is_never_written(make: Make, tmp_path: Path) -> None:
    trainer = make(learning_rate=1e-2)
    trainer.train()
    with torch.no_grad():
        next(iter(trainer.model.parameters()))[0, 0] = math.inf
    with pytest.raises(NotFiniteError, match="nothing is saved"):
        trainer.save_model()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_could_not_be_saved_for_its_weights_is_not_trained(
    make: Make, model: Any
) -> None:
    """A row of a token that no example has shows in no loss."""
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] = math.nan
    trainer = make(model=model)
    with pytest.raises(ModelError, match=r"contains NaN or infinity .*embed_tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "beta", "num_train_epochs"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_settings_that_are_not_finite_are_refused(name: str, value: float, make: Make) -> None:
    with pytest.raises(ValueError, match=name):
        make(**{name: value}).train()


def test_no_clipping_and_masked_tokens_are_no_faults(make: Make, model: Any) -> None:
    class Masks(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if output.get("logits") is not None:
                output.logits[..., 7] = torch.finfo(output.logits.dtype).min
                output.logits[..., 8] = -math.inf
            return output

    masking = Masks(model.config)
    masking.load_state_dict(model.state_dict())
    make(model=masking, max_grad_norm=math.inf, packing="off", max_steps=1).train()


def test_a_whole_model_replaces_an_earlier_adapter_in_its_folder(
    make: Make, tmp_path: Path, model: Any
) -> None:
    first = make(model=copy.deepcopy(model), peft_config=LoraConfig(**LORA), max_steps=1)
    first.train()
    first.save_model()
    second = make(model=copy.deepcopy(model), max_steps=1)
    second.train()
    second.save_model()
    run = Path(second.args.output_dir)
    assert not (run / "adapter_config.json").exists()
    assert torch.equal(logits(load_model(run)), logits(second.model))


def test_a_generation_config_that_cannot_be_saved_is_found_before_the_first_step(
    make: Make, model: Any
) -> None:
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    trainer = make(model=model)
    with pytest.raises(ModelError, match=r"could not be saved: .*temperature.*generation_config"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_adapter_saves_no_generation_config_and_may_have_any(make: Make, model: Any) -> None:
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    make(model=model, peft_config=LoraConfig(**LORA), max_steps=1).train()


def test_weights_that_were_saved_wrong_are_not_sealed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(save_strategy="steps", save_steps=1)
    save = trainer._save

    def damaged(output_dir: str, state_dict: Any = None) -> None:
        save(output_dir, state_dict)
        edited(Path(output_dir), lambda state: state["model.norm.weight"].add_(1e-3))

    monkeypatch.setattr(trainer, "_save", damaged)
    with pytest.raises(ModelError, match=r"not saved correctly: model\.norm\.weight differs"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*/manifest.json"))


def trained_here(make: Make, folder: Path, **changes: Any) -> Any:
    trainer = make(output_dir=str(folder), save_strategy="steps", save_steps=1, **changes)
    trainer.train()
    return trainer


def test_a_resume_on_another_base_is_refused(make: Make, tokenizer: Any, tmp_path: Path) -> None:
    trained_here(make, tmp_path, peft_config=LoraConfig(**LORA), max_steps=1)
    other = make(
        model=tiny_llama(len(tokenizer), seed=5), output_dir=str(tmp_path),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="the weights of the initial model have changed"):
        other.train(resume_from_checkpoint=True)


STORED_OTHERWISE = ["mixtral", "qwen3-moe", "gpt-neox"]  # experts in pieces; other names


def kept_otherwise(name: str, vocabulary: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    config: Any = {
        "mixtral": lambda: hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4),
        "qwen3-moe": lambda: hf.Qwen3MoeConfig(
            **sizes,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            head_dim=8,
        ),
        "gpt-neox": lambda: hf.GPTNeoXConfig(**sizes),
    }[name]()
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config)


def wider(model: Any, tokenizer: Any, folder: Path) -> Any:
    """The model with rows for more tokens than its base has, to which it leads by its name."""
    model.save_pretrained(folder)
    loaded = load_model(folder)
    loaded.resize_token_embeddings(len(tokenizer) + 8)
    return loaded


def same_run(make: Make, model: Any, folder: Path, **changes: Any) -> None:
    """A run and one that resumes from its middle end with the same weights."""
    ends = []
    for i, resume in enumerate([None, str(folder / "0" / "checkpoint-1")]):
        trainer = make(model=copy.deepcopy(model), output_dir=str(folder / str(i)),
                       save_strategy="steps", save_steps=1, **changes)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        ends.append(weights(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_a_model_that_is_stored_under_other_names_is_resumed(
    name: str, make: Make, tokenizer: Any, tmp_path: Path
) -> None:
    same_run(make, kept_otherwise(name, len(tokenizer)), tmp_path)


class Worsening(TrainerCallback):
    """Makes the first evaluation the best one."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_the_best_model_is_loaded_with_all_its_weights(
    name: str, make: Make, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = make(
        model=kept_otherwise(name, len(tokenizer)), eval_dataset=Dataset.from_list(queries),
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
        callbacks=[Worsening()],
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert torch.equal(logits(trainer.model.eval()), logits(load_model(best)))


def test_adapters_whose_checkpoints_hold_embeddings_are_resumed(
    make: Make, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    embeddings = LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "q_proj"]})
    same_run(make, model, tmp_path / "adapted", peft_config=embeddings)
    added = wider(model, tokenizer, tmp_path / "base")
    same_run(make, added, tmp_path / "added", peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("file", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", "global_step2"])
def test_a_checkpoint_of_fsdp_or_deepspeed_is_not_resumed_without_it(
    file: str, make: Make, tmp_path: Path
) -> None:
    make(save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / file).mkdir()
    with pytest.raises(CheckpointError, match=r"saved with .*, but this run uses one process"):
        make(output_dir=str(tmp_path / "on")).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"r": 8}, r"is \(4, 32\) in its adapter, but \(8, 32\) in this run"),
        ({"target_modules": ["q_proj"]}, "but None in this run"),
        ({"lora_alpha": 32}, "lora_alpha=8, but this run uses 32"),
        ({"use_rslora": True}, "use_rslora=None, but this run uses True"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern=None, but this run"),
    ],
    ids=str,
)
def test_a_resume_with_another_adapter_is_refused_by_name(
    changes: dict[str, Any], told: str, make: Make, model: Any, tmp_path: Path
) -> None:
    own = copy.deepcopy(model)
    trained_here(make, tmp_path, model=own, peft_config=LoraConfig(**LORA), max_steps=1)
    other = make(output_dir=str(tmp_path), peft_config=LoraConfig(**{**LORA, **changes}))
    with pytest.raises(CheckpointError, match=told):
        other.train(resume_from_checkpoint=True)


def test_a_resume_with_other_data_says_so(
    make: Make, model: Any, queries: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, rows: Any) -> None:
        data = Dataset.from_list(rows)
        own = copy.deepcopy(model)
        trained_here(make, tmp_path, model=own, train_dataset=data, max_steps=steps)

    run(1, queries)
    one_other = [*queries[:-1], {**queries[-1], next(iter(queries[-1])): queries[0]["prompt"]}]
    for steps, rows, said in ((2, queries, False), (3, one_other, True)):
        caplog.clear()
        make(
            model=copy.deepcopy(model), output_dir=str(tmp_path), save_strategy="steps",
            save_steps=1, max_steps=steps, train_dataset=Dataset.from_list(rows),
        ).train(resume_from_checkpoint=True)  # fmt: skip
        assert ("the training data has changed since" in caplog.text) == said


def test_a_checkpoint_without_an_optimizer_is_no_place_to_resume(
    make: Make, tmp_path: Path
) -> None:
    trained_here(make, tmp_path, max_steps=1, save_only_model=True)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        make(output_dir=str(tmp_path)).train(resume_from_checkpoint=True)


# -- outputs and inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["same", "relative", "dotted", "link"])
def test_no_run_is_written_over_the_model_that_it_starts_from(
    way: str, folder: Path, tmp_path: Path, tokenizer: Any, queries: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    output = {
        "same": str(folder),
        "relative": "model",
        "dotted": str(tmp_path / "link" / ".." / "model"),
        "link": "link",
    }[way]
    before = (folder / "model.safetensors").read_bytes()
    for given in (str(folder), load_model(folder)):
        with pytest.raises(ValueError, match="would overwrite the input"):
            SelfJudgeTrainer(
                model=given,
                args=SelfJudgeConfig(output, max_steps=1, **SMALL),
                processing_class=load_tokenizer(folder),
                judge_templates=TEMPLATES,
                train_dataset=Dataset.from_list(queries),
            ).train()
    assert (folder / "model.safetensors").read_bytes() == before


def test_no_run_is_written_over_the_adapter_or_the_checkpoint_that_it_starts_from(
    folder: Path, tmp_path: Path, queries: Any
) -> None:
    adapter = get_peft_model(load_model(folder), LoraConfig(**LORA))
    for name in ("adapter", "run/checkpoint-2"):
        adapter.save_pretrained(str(tmp_path / name))
        load_tokenizer(folder).save_pretrained(tmp_path / name)
        output = tmp_path / name.split("/")[0]
        with pytest.raises(ValueError, match="would overwrite the input"):
            SelfJudgeTrainer(
                str(tmp_path / name), args=SelfJudgeConfig(str(output), max_steps=1, **SMALL),
                judge_templates=TEMPLATES, train_dataset=Dataset.from_list(queries),
            )  # fmt: skip


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_no_command_writes_over_its_input_by_a_link(
    link: str, saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Hi", "response_a": "a", "response_b": "b"}\n')
    other = tmp_path / "other.jsonl"
    if link == "hard":
        os.link(pairs, other)
    else:
        other.symlink_to(pairs)
    assert main(["judge", str(pairs), str(other), "--model", str(saved_judge)]) != 0
    assert "would overwrite the input" in capsys.readouterr().err
    assert pairs.read_text().count("\n") == 1


@pytest.mark.parametrize("command", ["judge", "tournament"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_no_command_writes_over_a_part_of_its_model(
    command: str, file: str, saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Hi", "responses": ["a", "b"]}\n')
    (tmp_path / "link").symlink_to(saved_judge)
    before = (saved_judge / file).read_bytes()
    target = str(tmp_path / "link" / file)
    assert main([command, str(pairs), target, "--model", str(saved_judge), "--overwrite"]) != 0
    assert "would overwrite the input" in capsys.readouterr().err
    assert (saved_judge / file).read_bytes() == before
    inside = str(saved_judge / "out.jsonl")
    assert main([command, str(pairs), inside, "--model", str(saved_judge)]) == 0


def test_a_report_is_not_written_over_what_it_shows(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n')
    assert main(["eval", str(data), "--model", str(saved_judge), "--output", str(run)]) == 0
    before = (run / "results.json").read_bytes()
    for given in (run, run / "results.json"):
        assert main(["report", str(given), "--output", str(run / "results.json")]) != 0
        assert "would overwrite the input" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before


def test_an_evaluation_is_not_written_over_its_data(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "results.json"
    data.write_text('[{"prompt": "Hi", "chosen": "a", "rejected": "b"}]')
    arguments = ["eval", str(data), "--model", str(saved_judge), "--output", str(tmp_path)]
    assert main(arguments) != 0
    assert "would overwrite the input" in capsys.readouterr().err
    assert json.loads(data.read_text())[0]["chosen"] == "a"


@pytest.mark.parametrize("date", [None, "2026-03-01"])
def test_bulk_work_is_not_resumed_with_another_date_in_its_prompts(
    date: str | None, model: Any, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    encoder = ChatEncoder(dated, chat_template_kwargs=date and {"strftime_now": date})
    templates = JudgeTemplates(TEMPLATES)
    judge = tmp_path / "judge"
    model.save_pretrained(judge)
    dated.save_pretrained(judge)
    file = save_judge_settings(judge, encoder, templates, encoder.letter_ids(templates))
    if date is None:  # taught by something that saves no date
        saved = json.loads(file.read_text())
        file.write_text(json.dumps({**saved, "chat_template_kwargs": {}}))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Hi", "response_a": "a", "response_b": "b"}\n')
    command = ["judge", str(pairs), str(tmp_path / "out.jsonl"), "--model", str(judge)]
    assert main(command) == 0

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 1, 1)

    monkeypatch.setattr(chat_encoder.datetime, "date", Tomorrow)
    assert (main(command) == 0) == (date is not None)
    assert ("different settings (date" in capsys.readouterr().err) == (date is None)


def test_a_tournament_names_the_dates_of_its_judge_and_of_its_policy(
    saved_judge: Path, tokenizer: Any, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(saved_judge, policy)
    (policy / "judge.json").unlink()
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    dated.save_pretrained(policy)
    job = TournamentJob(
        JudgeChoice(str(saved_judge)), SamplingSettings(max_new_tokens=4), str(policy)
    )
    settings = job.settings()
    assert "date" not in settings
    assert settings["policy_date"] == datetime.date.today().isoformat()
    assert "policy_date" not in TournamentJob(job.judge, job.sampling).settings()

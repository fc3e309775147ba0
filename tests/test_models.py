"""Models in and out: what is saved comes back, and the reference is what stood in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from conftest import DEVICE, byte_bpe, tiny_llama, wrap
from self_judge.adapters import merged
from self_judge.errors import ModelError
from self_judge.models import check_vocabulary, load_model, load_tokenizer
from self_judge.runtime import (
    float32_logits,
    in_evaluation_mode,
    own_device,
    unwrapped,
    without_cudnn_attention,
)
from self_judge.training.identity.reference import frozen_reference

IDS = torch.tensor([[5, 60, 70, 80, 90]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.to(DEVICE)(IDS.to(DEVICE)).logits.cpu()


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings)).eval()


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    """A saved base model, as an adapter names it."""
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    adapted(load_model(base)).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


# -- models ----------------------------------------------------------------------------------------


def test_a_saved_model_comes_back(base: Path, model: Any) -> None:
    loaded = load_model(base)
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_model_is_loaded_in_the_dtype_asked_for(base: Path, dtype: Any) -> None:
    assert load_model(base, dtype=dtype).dtype == torch.bfloat16


def test_an_adapter_is_loaded_with_its_base_and_merged(adapter: Path, tokenizer: Any) -> None:
    expected = logits(adapted(tiny_llama(len(tokenizer))))
    loaded = load_model(adapter)
    assert isinstance(loaded, LlamaForCausalLM)
    assert not isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tiny_llama(len(tokenizer))), atol=1e-2)


def test_an_adapter_can_be_continued_from(adapter: Path) -> None:
    loaded = load_model(adapter, merge=False)
    assert isinstance(loaded, PeftModel)
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    loaded.eval()
    torch.testing.assert_close(logits(loaded), logits(load_model(adapter)), rtol=1e-4, atol=1e-5)


def test_a_merged_adapter_is_a_plain_model_that_can_be_saved(adapter: Path, tmp_path: Path) -> None:
    plain = load_model(adapter)
    assert all(p.requires_grad for p in plain.parameters()), "it can be trained on"
    plain.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(plain))


def test_merging_a_plain_model_gives_the_model_itself(model: Any) -> None:
    assert merged(model) is model


def test_a_model_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"from .*nowhere: there is no such folder") as caught:
        load_model(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_an_adapter_whose_base_is_gone_names_the_base(adapter: Path, base: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(ModelError, match=f"cannot load a model from {base}"):
        load_model(adapter)


def test_an_adapter_that_names_no_base_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base"):
        load_model(adapter)


# -- where a model stands --------------------------------------------------------------------------


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that seems to have four GPUs, where Accelerate was not set up yet."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    PartialState._reset_state()
    return monkeypatch


def test_each_process_of_a_launch_computes_on_a_gpu_of_its_own(
    four_gpus: pytest.MonkeyPatch,
) -> None:
    assert own_device() == torch.device("cuda", 0)
    for process, gpu in ((1, 1), (3, 3), (5, 1)):
        four_gpus.setenv("LOCAL_RANK", str(process))
        assert own_device() == torch.device("cuda", gpu)
    assert not PartialState._shared_state, "asking where to compute sets no processes up"


def test_a_run_that_was_told_to_use_the_cpu_computes_there(four_gpus: pytest.MonkeyPatch) -> None:
    four_gpus.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device() == torch.device("cpu")
    four_gpus.delenv("ACCELERATE_USE_CPU")
    PartialState(cpu=True)  # as a training with use_cpu does
    assert own_device() == torch.device("cpu")


def test_a_model_is_loaded_to_where_it_samples(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("self_judge.models.own_device", lambda: torch.device("meta"))
    there, left = load_model(base, device="auto"), load_model(base)
    assert {p.device.type for p in there.parameters()} == {"meta"}
    assert {p.device.type for p in left.parameters()} == {"cpu"}, "a trainer places it"


def test_an_adapter_is_read_to_where_its_base_stands(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_gpu() -> str:
        raise AssertionError("PEFT chose a device")

    monkeypatch.setattr("peft.peft_model.infer_device", first_gpu)
    assert load_model(adapter).device.type == "cpu"


# -- the frozen reference --------------------------------------------------------------------------


def test_the_reference_stays_while_the_model_is_trained(model: Any) -> None:
    model.train()
    reference = frozen_reference(model)
    before = logits(model.eval())
    assert torch.equal(logits(reference), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(reference), before)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_reference_is_the_model_in_memory_not_the_one_its_name_leads_to(adapter: Path) -> None:
    in_memory = load_model(adapter)
    assert in_memory.config.name_or_path == str(adapter)
    with torch.no_grad():
        in_memory.lm_head.weight[3] += 1.0  # an edit that is on no disk
    reference = frozen_reference(in_memory)
    assert torch.equal(logits(reference), logits(in_memory))
    assert not torch.allclose(logits(reference), logits(load_model(adapter)), atol=1e-2)


def test_the_reference_of_an_adapter_has_the_adapter(model: Any) -> None:
    with_adapter = adapted(model)
    expected = logits(with_adapter)
    reference = frozen_reference(with_adapter)
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert torch.equal(logits(reference), expected)
    assert not torch.allclose(logits(with_adapter), expected, atol=1e-2)


def test_tied_weights_stay_tied_in_the_reference(tokenizer: Any) -> None:
    reference = frozen_reference(tiny_llama(len(tokenizer), tie_word_embeddings=True))
    assert reference.lm_head.weight is reference.model.embed_tokens.weight


def test_evaluation_mode_is_left_as_it_was_entered_module_by_module(model: Any) -> None:
    model.train()
    model.lm_head.eval()
    with in_evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]


# -- tokenizers ------------------------------------------------------------------------------------


def test_a_tokenizer_without_padding_pads_with_its_end_of_sequence(tmp_path: Path) -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_a_tokenizers_own_padding_stays(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<pad>"


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused(tmp_path: Path) -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"from .*nowhere: there is no such folder") as caught:
        load_tokenizer(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_fits_when_every_token_has_an_embedding(model: Any, tokenizer: Any) -> None:
    check_vocabulary(model, tokenizer)
    check_vocabulary(adapted(model), tokenizer)
    check_vocabulary(tiny_llama(len(tokenizer) + 5), tokenizer)
    with pytest.raises(ModelError, match="resize_token_embeddings"):
        check_vocabulary(tiny_llama(len(tokenizer) - 1), tokenizer)


def test_logits_for_judging_are_not_rounded_to_the_models_own_type(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("self_judge.runtime._HEAD_ROWS", 50)  # several parts
    half = model.to(torch.bfloat16)
    with torch.no_grad():
        states = half.model(IDS.to(half.device)).last_hidden_state
        expected = states.double() @ half.lm_head.weight.double().T
        with float32_logits(half):
            found = half(IDS.to(half.device)).logits
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert logits(half).dtype == torch.bfloat16  # afterwards as before


def test_a_float32_head_computes_as_before(model: Any) -> None:
    plain = logits(model)
    with float32_logits(model):
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "adapter", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_a_head_with_an_adapter_gives_float32_logits_too(model: Any, adapter: Any) -> None:
    wrapped = adapted(model.to(torch.bfloat16), **adapter)
    with torch.no_grad():
        with torch.autocast(DEVICE, torch.bfloat16):
            states = unwrapped(wrapped).model(IDS.to(DEVICE)).last_hidden_state.float()
        expected = copy.deepcopy(wrapped).float().get_output_embeddings()(states)
        with float32_logits(wrapped), torch.autocast(DEVICE, torch.bfloat16):
            found = wrapped(IDS.to(DEVICE)).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert logits(wrapped).dtype == torch.bfloat16  # afterwards as before


def test_a_float64_head_keeps_its_precision(model: Any) -> None:
    plain = logits(model.double())
    with float32_logits(model):
        assert torch.equal(logits(model), plain)


def test_attention_keeps_from_cudnn_until_the_outermost_block_ends() -> None:
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    assert allowed()
    with without_cudnn_attention():
        with without_cudnn_attention():
            assert not allowed()
        assert not allowed()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert allowed()

"""QLoRA: a base in 4 bits below an adapter; what needs bitsandbytes is skipped without it.

`make test-extras` builds an environment with it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bad_input import JSFT, TRAIN, Place
from conftest import TEMPLATES, tiny_llama
from self_judge import ChatEncoder, Comparison, Judge, JudgeTemplates
from self_judge.check.model_size import empty_model, size_of
from self_judge.cli import main
from self_judge.config.schema import load_run
from self_judge.data import synthetic
from self_judge.errors import ConfigError, ModelError
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.judge_json import save_judge_settings

with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ADAPTER = "peft_config={r: 2, target_modules: [q_proj, v_proj], task_type: CAUSAL_LM}"
PAIRS = [Comparison("what is it?", "yes", "no, it is not"), Comparison("who?", "he", "she is")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model whose layers are as wide as a block of the quantization, which is 64."""
    folder = tmp_path / "base"
    tokenizer = synthetic.tiny_tokenizer()
    tiny_llama(
        len(tokenizer), hidden_size=64, intermediate_size=128, max_position_embeddings=4096
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def taught(base: Path, tmp_path: Path) -> Path:
    """The same with judge.json."""
    folder = Path(shutil.copytree(base, tmp_path / "taught"))
    encoder, templates = ChatEncoder(load_tokenizer(folder)), JudgeTemplates(TEMPLATES)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    return folder


def test_weights_in_4_bits_want_an_adapter() -> None:
    with pytest.raises(ConfigError, match=r"load_in_4bit is true but peft_config is not set"):
        load_run(JSFT, ["model.load_in_4bit=true", "peft_config=null"], "jsft")
    run = load_run(JSFT, ["model.load_in_4bit=true", ADAPTER], "jsft")
    assert run.model.bnb_4bit_quant_type == "nf4"


def test_without_bitsandbytes_the_package_is_named(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(ModelError, match=r"requires bitsandbytes.*install 'self-judge\[qlora\]'"):
        load_model(base, load_in_4bit=True)


def test_an_estimate_counts_frozen_layers_in_4_bits_and_the_rest_as_it_is(base: Path) -> None:
    model: Any = empty_model(str(base), dtype="float32")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    linear = sum(
        p.numel() for n, p in adapted.named_parameters() if "proj" in n and not p.requires_grad
    )
    usual, plain, nested = (size_of(adapted, kept) for kept in ("no", "plain", "nested"))  # type: ignore[arg-type]
    assert usual.weight_bytes - plain.weight_bytes == round(linear * (4 - 0.5625))
    assert usual.weight_bytes - nested.weight_bytes == round(linear * (4 - 0.515625))
    assert plain.parameters == usual.parameters


@with_bitsandbytes
def test_a_judge_in_4_bits_decides_alike_packed_and_not(taught: Path) -> None:
    judges = [
        Judge.from_pretrained(
            taught, load_in_4bit=True, dtype="float32", packing=packing, device="cpu"
        )
        for packing in ("auto", "off")
    ]
    assert judges[0].model.is_loaded_in_4bit
    assert judges[0].packing.decision.route == "tree"
    full = Judge.from_pretrained(taught, dtype="float32", device="cpu")
    packed, plain, exact = (j.compare(PAIRS) for j in (*judges, full))
    for one, other, unrounded in zip(packed, plain, exact, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.probabilities), torch.tensor(other.probabilities), rtol=1e-4, atol=1e-6
        )
        assert one.probabilities != unrounded.probabilities


@with_bitsandbytes
def test_an_adapter_is_not_merged_into_4_bits(base: Path, tmp_path: Path) -> None:
    model: Any = load_model(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="4-bit weights: merge it first"):
        load_model(tmp_path, load_in_4bit=True)
    kept = load_model(tmp_path, load_in_4bit=True, merge=False)
    assert isinstance(kept, PeftModel)


@with_bitsandbytes
def test_jsft_below_an_adapter_gives_a_whole_model_and_self_training_goes_on_from_it(
    place: Place,
) -> None:
    four = ("model.load_in_4bit=true", ADAPTER)
    assert (
        main(place.run(*four, "training_args.max_steps=2", "training_args.learning_rate=0.05")) == 0
    )
    taught = place.folder / "run"
    # Merged in full: the base as it was saved, and what was learned on top of it.
    weights, before = (load_model(f).state_dict() for f in (taught, place.base))
    assert all(w.dtype == torch.float32 for w in weights.values())
    changed = {n for n in weights if not torch.equal(weights[n], before[n])}
    assert changed
    assert all("q_proj" in n or "v_proj" in n for n in changed)
    for name in changed:
        assert torch.linalg.matrix_rank(weights[name] - before[name], rtol=1e-3) <= 2

    policy = place.folder / "policy"
    asked = place.run(
        *four, f"training_args.output_dir={policy}", f"model.model_name_or_path={taught}",
        "training_args.max_steps=2", "training_args.logging_steps=1", config=TRAIN,
    )  # fmt: skip
    assert main(asked) == 0
    logged = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    assert any(entry.get("grad_norm", 0) > 0 for entry in logged)
    assert (policy / "adapter_model.safetensors").is_file()
    model = load_model(policy)  # the adapter on the whole base, merged
    assert Judge(model, load_tokenizer(taught), TEMPLATES).compare(PAIRS)

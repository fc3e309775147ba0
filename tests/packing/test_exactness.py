"""Exactness: what is not exact for a model is found by a trial, and said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model

from families import (
    SIZES,
    build,
    sharing,
)
from self_judge.packing import exactness
from self_judge.packing import passes as packed_passes
from self_judge.packing.packing import Packing, needs_one_pass
from self_judge.packing.passes import (
    tree_mask,
)


def test_a_recurrent_model_takes_no_tree_mask_and_says_so() -> None:
    with pytest.raises(ValueError, match="packing=tree cannot be used: its layers keep a state"):
        Packing(build("mamba 2, recurrent", "eager"), "tree")


def test_alibi_takes_no_tree_mask_and_says_so() -> None:
    with pytest.raises(ValueError, match="packing=tree cannot be used: ALiBi"):
        Packing(build("falcon, ALiBi"), "tree")


def test_a_boolean_mask_with_eager_attention_is_caught_by_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_passes, "_dense_mask", lambda inner, ends: tree_mask(ends))
    with pytest.raises(ValueError, match="in a trial, logits differed by"):
        Packing(build("llama", "eager"), "tree")
    assert Packing(build("llama", "eager")).decision.route == "cache"


def test_a_mask_that_lets_branches_see_each_other_is_caught_by_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        packed_passes, "tree_mask", lambda ends: torch.ones_like(tree_mask(ends)).tril()
    )
    with pytest.raises(ValueError, match="in a trial, logits differed by"):
        Packing(build("llama"), "tree")


def test_a_sequence_beyond_the_window_goes_another_way() -> None:
    decision = Packing(build("mistral with a window")).decision
    assert (decision.route, decision.longest, decision.beyond) == ("tree", 10, "cache")


def test_rope_that_stretches_with_the_pass_bounds_the_sequences() -> None:
    config = hf.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    decision = Packing(hf.AutoModelForCausalLM.from_config(config)).decision
    assert decision.longest == 128


def test_a_prompt_learning_adapter_is_left_unpacked() -> None:
    model = get_peft_model(
        build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    decision = Packing(model).decision
    assert decision.route == "off"
    assert "virtual tokens" in decision.reason
    with pytest.raises(ValueError, match="virtual tokens"):
        Packing(model, "padding").decision  # noqa: B018


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="packing must be one of auto, tree, cache, padding, off"):
        Packing(build("llama"), "trees")  # type: ignore[arg-type]


def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = build("bloom, ALiBi", "eager")
    with caplog.at_level("INFO", logger="self_judge.packing.packing"):
        for _ in range(3):
            list(Packing(model).next_token_logits([[3, 4, 5], [3, 4, 6]]))
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("packing of BloomForCausalLM: cache; no tree: ")


def test_models_whose_processes_must_keep_step_make_one_pass() -> None:
    assert needs_one_pass("FSDP")
    assert needs_one_pass("DEEPSPEED")
    assert not needs_one_pass("MULTI_GPU")
    packing = Packing(build("mistral with a window"), one_pass=True)
    sequences = sharing(8)
    wanted = [np.arange(len(s)) for s in sequences]
    assert len(list(packing.passes(sequences, wanted))) == 1  # some are longer than the window


def test_a_pass_of_a_trial_copies_nothing_from_the_cpu_that_a_graph_could_not_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inside = build("llama"), []
    measure = exactness._multiplies_exactly

    def watched(device: torch.device) -> bool:
        inside.append(passing)
        return measure(device)

    passing = False

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal passing
        passing = True
        logits = exactness.padded_logits(model, [[5, 6, 7]])[0]
        passing = False
        return logits, logits

    monkeypatch.setattr(exactness, "_multiplies_exactly", watched)
    assert exactness.why_inexact(model, run) is None
    assert inside == [False]

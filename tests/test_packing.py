"""Packing: the same numbers as a separate pass per sequence, or a refusal; each token once."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.attention import flex_attention

from conftest import DEVICE, on_test_device
from self_judge.packing import packing as packing_module
from self_judge.packing import passes as packed_passes
from self_judge.packing.chunked_prefill import PrefixIndex, plan_chunks
from self_judge.packing.fused_head import pack_fused_head
from self_judge.packing.packing import Packing, needs_one_pass
from self_judge.packing.passes import (
    Pass,
    Shape,
    Wanted,
    cache_passes,
    hidden_states_at,
    tree_mask,
    tree_passes,
)
from self_judge.packing.prefix_tree import shared_length
from self_judge.packing.segment_passes import chunked_passes, segment_passes

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {
    k: SIZES[k] for k in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": lambda: hf.MistralConfig(**SIZES, sliding_window=10),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=8),
    "gemma 2, windows in turn": lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=10),
    "phi": lambda: hf.PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
    "gpt2": lambda: hf.GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                                  bos_token_id=1, eos_token_id=2, attn_pdrop=0, resid_pdrop=0,
                                  embd_pdrop=0),
    "granite, scaled logits": lambda: hf.GraniteConfig(**SIZES, logits_scaling=8.0),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=4),
    "bloom, ALiBi": lambda: hf.BloomConfig(**SMALL, n_layer=2, n_head=4, hidden_dropout=0,
                                           attention_dropout=0),
    "falcon, ALiBi": lambda: hf.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4,
                                             alibi=True, new_decoder_architecture=False),
    "mamba 2, recurrent": lambda: hf.Mamba2Config(**SMALL, num_hidden_layers=2, state_size=8,
                                                  num_heads=8, head_dim=8, n_groups=1,
                                                  chunk_size=8, pad_token_id=0),
}  # fmt: skip
# What `auto` takes, by family.
ROUTES = dict.fromkeys(CONFIGS, "tree") | {
    "bloom, ALiBi": "cache",
    "falcon, ALiBi": "cache",
    "mamba 2, recurrent": "cache",
}
CASES = [
    (name, attention)
    for name in CONFIGS
    for attention in ("sdpa", "eager")
    if attention == "eager" or name not in ("bloom, ALiBi", "mamba 2, recurrent")
]
FUSED = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="needs the fused LM head of TRL 1.16"
)


def build(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if name.startswith("gemma 2"):
        attention = "eager"  # soft-capped scores are not in SDPA
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention)
    for parameter in model.parameters():  # initial weights are so small that logits hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return on_test_device(model.eval())


def sharing(seed: int, longest_prefix: int = 9) -> list[list[int]]:
    """Sequences with prefixes in common, on two levels, of lengths from 1."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 120) for _ in range(draw.randint(least, most))]

    sequences = []
    for _ in range(4):
        root = tokens(1, longest_prefix)
        for _ in range(2):
            branch = root + tokens(0, 4)
            sequences += [branch + tokens(0, 6) for _ in range(draw.randint(1, 3))]
    draw.shuffle(sequences)
    return [*sequences, sequences[0]]


def fresh() -> int:
    return random.SystemRandom().randrange(10**6)


def alone(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_next_token_logits_are_those_of_a_separate_pass(name: str, attention: str) -> None:
    seed = fresh()
    model, sequences = build(name, attention, seed), sharing(seed)
    packing = Packing(model, batch_tokens=40)
    assert packing.decision.route == ROUTES[name], packing.decision
    found: dict[int, torch.Tensor] = {}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert sorted(found) == list(range(len(sequences)))
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4, msg=f"seed {seed}, {i}")


@pytest.mark.parametrize("name", [n for n, route in ROUTES.items() if route == "tree"])
def test_under_a_mask_logits_are_those_of_a_separate_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    test_next_token_logits_are_those_of_a_separate_pass(name, "sdpa")


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name", [n for n, route in ROUTES.items() if route == "tree" and "gemma 2" not in n]
)
def test_trees_are_attended_run_by_run_and_walked_in_small_steps(name: str) -> None:
    seed = fresh()
    model, sequences = build(name, seed=seed), sharing(seed)
    packing = Packing(model, batch_tokens=7)
    assert packing.decision.by_segments, packing.decision
    window = packing.decision.longest
    found: dict[int, torch.Tensor] = {}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert window is not None or len(found) == len(sequences)
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4, msg=f"seed {seed}, {i}")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.cpu
def test_what_is_remembered_is_not_computed_again() -> None:
    model = build("llama")
    computed: list[int] = []
    packing = Packing(model, batch_tokens=40)
    list(packing.next_token_logits([[3, 4], [3, 5]]))  # tries the model once
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context, first, second, third = list(range(3, 33)), [40, 41], [50, 51, 52], [60]
    rounds = [[context + first + second, context + second + first], [context + first + third]]
    with packing.prefix_cache():
        found = [
            row for own in rounds for _, rows in packing.next_token_logits(own) for row in rows
        ]
        # Both orders share the context; the second round takes up context and first response.
        assert sum(computed) == len(context) + 2 * (len(first) + len(second)) + len(third)
        list(packing.next_token_logits(rounds[0]))  # the last token at least is computed again
        assert sum(computed[-2:]) <= 2 + len(third)
    model.model._forward_pre_hooks.clear()
    asked = [sorted(rounds[0])[0], sorted(rounds[0])[1], rounds[1][0]]
    for row, sequence in zip(found, asked, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, alone(model, sequence)[-1], rtol=0, atol=1e-4)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    computed.clear()
    list(packing.next_token_logits(rounds[1]))
    assert computed == [len(rounds[1][0])]  # nothing is remembered beyond the block


def test_a_small_memory_forgets_and_gives_the_same_numbers() -> None:
    seed = fresh()
    model, draw = build("llama", seed=seed), random.Random(seed)
    packing = Packing(model, batch_tokens=16)
    sequences = sharing(seed)
    with packing.prefix_cache(limit=2000):
        for _ in range(4):
            own = [[*s, draw.randrange(3, 120)] for s in draw.sample(sequences, 5)]
            for indices, logits in packing.next_token_logits(own):
                for i, row in zip(indices, logits, strict=True):
                    with torch.no_grad():
                        expected = alone(model, own[i])[-1]
                    torch.testing.assert_close(row, expected, rtol=0, atol=1e-4, msg=f"{seed}")


def test_a_consumer_that_stops_early_leaves_no_path_without_its_states() -> None:
    model, draw = build("llama"), random.Random(2)
    packing = Packing(model, batch_tokens=16)
    sequences = [[draw.randrange(3, 120) for _ in range(12)] for _ in range(6)]
    with packing.prefix_cache():
        next(iter(packing.next_token_logits(sequences)))
        found = dict(
            pair
            for indices, logits in packing.next_token_logits(sequences)
            for pair in zip(indices, logits, strict=True)
        )
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            torch.testing.assert_close(found[i], alone(model, sequence)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", ["tree", "cache", "padding"])
def test_every_way_that_can_be_forced_gives_the_same_numbers(choice: Any) -> None:
    model = build("llama")
    sequences = [*sharing(3), [7], [8]]  # the last two share nothing
    packing = Packing(model, choice)
    assert packing.decision.route == choice
    for indices, logits in packing.next_token_logits(sequences):
        for i, row in zip(indices, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(row, alone(model, sequences[i])[-1], rtol=0, atol=1e-4)


def test_a_shared_token_is_computed_once_and_only_last_positions_reach_the_head() -> None:
    model = build("llama")
    prefix = list(range(3, 43))
    packing = Packing(model)
    assert packing.decision.route == "tree"
    list(packing.next_token_logits([[3, 4], [3, 5]]))  # tries the model once
    computed: list[int] = []
    scored: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda _, args: scored.append(args[0].shape[1]))
    list(packing.next_token_logits([[*prefix, 50, 51], [*prefix, 51, 50]]))
    assert sum(computed) == len(prefix) + 4
    assert sum(scored) == 2


def test_under_a_mask_a_tournament_round_goes_through_a_cache_and_a_comparison_through_a_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    model, draw = build("llama"), random.Random(6)

    def prompts(branches: int) -> list[list[int]]:
        prefix = [draw.randrange(3, 120) for _ in range(40)]
        return [prefix + [draw.randrange(3, 120) for _ in range(20)] for _ in range(branches)]

    sequences = [*prompts(16), *prompts(2)]
    packing = Packing(model, batch_tokens=200)
    kinds = {True: 0, False: 0}
    found = {}
    for this in packing.passes(sequences, [np.array([59])] * 18):
        kinds[this.prefix is not None] += len(this.wanted)
    assert kinds == {True: 16, False: 2}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert len(found) == 18
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "tree", "cache", "padding"])
def test_no_packed_pass_and_no_prefix_of_one_attends_through_cudnn(choice: Any) -> None:
    model = build("llama")
    packing = Packing(model, choice)
    assert packing.decision.route != "off"
    allowed: list[bool] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    list(packing.next_token_logits(sharing(4)))
    assert allowed
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


# -- how much is computed --------------------------------------------------------------------------


def computed_of(this: Pass) -> int:
    """Tokens of a pass, padding (which has the id 0) left out."""
    ids = [this.inputs["input_ids"], *([this.prefix["input_ids"]] if this.prefix else [])]
    return sum(int((i != 0).sum()) for i in ids)


def pairs_up_to(longest: int, count: int, draw: random.Random) -> list[list[int]]:
    """Pairs of sequences with a beginning of any length in common, the first token their own."""
    sequences = []
    for first in range(3, 3 + count):
        lengths = draw.randint(1, longest), draw.randint(1, longest)
        shared = [first, *draw.choices(range(3, 120), k=draw.randint(0, min(lengths)))]
        sequences += [(shared + draw.choices(range(3, 120), k=n))[:n] for n in lengths]
    return list(map(list, dict.fromkeys(map(tuple, sequences))))


def nodes(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens of sequences with each shared one counted once."""
    ordered = [np.array(s) for s in sorted(map(tuple, sequences))]
    shared = itertools.starmap(shared_length, itertools.pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


LAYOUTS = {
    "segments": segment_passes,
    "chunks": chunked_passes,
    "tree mask": tree_passes,
    "block mask": tree_passes,
    "cache": cache_passes,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.sampled_from([60, 600, 2048, 3000]),
    st.sampled_from([1, 1024, 16_384]),
)
def test_shared_tokens_of_pairs_of_any_length_are_computed_once(
    layout: str, seed: int, count: int, longest: int, batch_tokens: int
) -> None:
    model, sequences = build("llama"), pairs_up_to(longest, count, random.Random(seed))
    last = [np.array([len(s) - 1]) for s in sequences]
    asked = Wanted.all_of(sequences, last)
    with pytest.MonkeyPatch.context() as patch:
        if layout == "block mask":
            model.config._attn_implementation = "flex_attention"
            patch.setattr(flex_attention, "create_block_mask", lambda *_, **__: None)
        if layout == "chunks":
            chunks = plan_chunks(sequences, batch_tokens, PrefixIndex())
            assert sum(len(chunk.token_ids) for chunk in chunks) == nodes(sequences)
            return
        passes = list(LAYOUTS[layout](model, Shape(batch_tokens), asked))
    found = sum(map(computed_of, passes))
    # A branch of a cache has a token, also where its whole sequence is the beginning of the other.
    again = count if layout == "cache" else 0
    assert nodes(sequences) <= found <= 1.05 * nodes(sequences) + again
    assert sorted(n for this in passes for n in this.wanted.tolist()) == [*range(len(sequences))]


def test_a_cache_is_divided_between_pairs_and_within_one_only_where_memory_was_full() -> None:
    model, prefix = build("llama"), [7] * 16_000
    sequences = [prefix + [8 + i] * 1000 for i in range(3)]
    asked = Wanted.all_of(sequences, [np.array([len(s) - 1]) for s in sequences])
    found = [computed_of(this) for this in cache_passes(model, Shape(1024), asked)]
    assert sorted(found) == [17_000, 18_000]
    split = Shape(1024, split_pairs=True)
    assert [computed_of(this) for this in cache_passes(model, split, asked)] == [17_000] * 3


LONG = {"max_position_embeddings": 2048, "num_hidden_layers": 1}


@FUSED
@pytest.mark.parametrize("by_segments", [True, False])
@pytest.mark.parametrize("choice", ["tree", "cache"])
@pytest.mark.parametrize("batch_tokens", [1024, 16_384])
def test_two_sequences_of_900_that_share_500_compute_1300_tokens(
    choice: Any, batch_tokens: int, by_segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    if not by_segments:  # as on a GPU
        monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **LONG}))
    draw = random.Random(fresh())
    prefix = draw.choices(range(3, 120), k=500)
    sequences = [[*prefix, own, *draw.choices(range(3, 120), k=399)] for own in (3, 4)]
    add_fused_lm_head(model)
    judging = Packing(model, choice, batch_tokens=batch_tokens)
    training = pack_fused_head(model, choice, batch_tokens=batch_tokens)
    assert training is not None
    assert (
        judging.decision.by_segments
        == training.decision.by_segments
        == (by_segments and choice == "tree")
    )
    computed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(int((kwargs["input_ids"] != 0).sum())),
        with_kwargs=True,
    )
    list(judging.next_token_logits(sequences))
    assert sum(computed) == 1300
    computed.clear()
    batch = batch_of([[*s, 5] for s in sequences], 0)  # the last token is a target only
    model(**batch, fused_lm_head=True).log_probs.sum().backward()  # the update
    assert sum(computed) == 1300
    computed.clear()
    with torch.no_grad():
        model(**batch, fused_lm_head=True)  # the reference
    assert sum(computed) == 1300


def test_trees_of_unlike_lengths_leave_little_padding_under_a_mask() -> None:
    draw = random.Random(fresh())
    lengths = [1500, 900, 800, 600, 500, 400, 200, 100]
    sequences = [[i, *draw.choices(range(3, 120), k=n - 1)] for i, n in enumerate(lengths, 3)]
    asked = Wanted.all_of(sequences, [np.arange(len(s)) for s in sequences])
    passes = list(tree_passes(build("llama"), Shape(16_384), asked))
    assert sum(this.inputs["input_ids"].numel() for this in passes) <= 1.05 * sum(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_share_one_mask_for_their_backward_passes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    model, length = build("llama"), 37  # no multiple of 8
    asked = Wanted.all_of([[5] * length, [5] * 20 + [6]], [np.arange(length), np.arange(21)])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    masks: set[int] = set()

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape[-2:] == (38, 38):
            assert saved.dtype == dtype
            masks.add(saved.untyped_storage().data_ptr())
        return saved

    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        (this,) = tree_passes(model, Shape(100), asked)
        assert this.inputs["attention_mask"].stride(2) % 8 == 0  # else CUDA's kernels copy it
        with hidden_states_at(model, this) as inputs:
            logits = model(**inputs).logits
    assert logits.requires_grad
    assert len(masks) == 1


# -- what is refused -------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="a trial was off by"):
        Packing(build("llama", "eager"), "tree")
    assert Packing(build("llama", "eager")).decision.route == "cache"


def test_a_mask_that_lets_branches_see_each_other_is_caught_by_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        packed_passes, "tree_mask", lambda ends: torch.ones_like(tree_mask(ends)).tril()
    )
    with pytest.raises(ValueError, match="a trial was off by"):
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


# -- training --------------------------------------------------------------------------------------


def batch_of(sequences: Sequence[Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """TRL's batch: padded on the right, labels where a loss falls."""
    draw = random.Random(seed)
    longest = max(map(len, sequences)) + 2
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, sequence in enumerate(sequences):
        n = len(sequence)
        ids[row, :n], mask[row, :n] = torch.tensor(sequence), 1
        start = draw.randint(0, n)
        labels[row, start:n] = ids[row, start:n]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def relative(found: Any, expected: Any) -> float:
    """Norm of the difference of all gradients over the norm of the expected ones."""
    pairs = list(zip(found.parameters(), expected.parameters(), strict=True))
    kept = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    assert all(a is not None for a, _ in kept)
    off = sum(((a - b).double() ** 2).sum() for a, b in kept)
    size = sum((b.double() ** 2).sum() for _, b in kept)
    return float((off / size).sqrt())


@FUSED
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_log_probabilities_and_gradients_are_those_of_separate_passes(
    name: str, attention: str
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    seed = fresh()
    model = build(name, attention, seed)
    plain = copy.deepcopy(model)
    fields = ("log_probs", "entropy", "mean_logits", "is_top1")
    add_fused_lm_head(model, outputs=fields)
    packing = pack_fused_head(model)
    assert packing is not None
    expected_route = "padding" if name.startswith("mamba") else ROUTES[name]
    assert packing.decision.route == expected_route, packing.decision
    batch = batch_of(sharing(seed), seed)
    output = model(**batch, fused_lm_head=True)
    weight = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.to(output.log_probs.device)
    (output.log_probs * weight).sum().backward()
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        logits = alone(plain, batch["input_ids"][row, :length])[:-1]
        targets = batch["labels"][row, 1:length]
        scored = targets != -100
        log_probs = logits.log_softmax(-1)
        own = log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * scored
        (own * weight[row, : length - 1]).sum().backward()
        expected = {
            "log_probs": own,
            "entropy": -(log_probs.exp() * log_probs).sum(-1) * scored,
            "mean_logits": logits.mean(-1) * scored,
        }
        for field, value in expected.items():
            found = getattr(output, field)[row]
            assert not found[length - 1 :].any()
            torch.testing.assert_close(
                found[: length - 1], value, rtol=0, atol=1e-4, msg=f"{field}, seed {seed}"
            )
        right = (logits.argmax(-1) == targets) & scored
        assert output.is_top1[row, : length - 1].tolist() == right.tolist()
    assert relative(model, plain) < 1e-5, f"seed {seed}"


def fused_pair(model: Any, **lora: Any) -> tuple[Any, Any]:
    """The same model twice, with TRL's fused head: packed, and as it is."""
    from trl.trainer.utils import add_fused_lm_head

    twins = []
    for packed in (True, False):
        own = copy.deepcopy(model)
        add_fused_lm_head(own)
        if lora:
            torch.manual_seed(1)
            own = get_peft_model(
                own, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
            )
        if packed:
            assert pack_fused_head(own) is not None
        twins.append(own.train())
    return twins[0], twins[1]


@FUSED
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bloom, ALiBi"])
def test_gradient_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    packed, plain = fused_pair(build(name, "eager"))
    for model in (packed, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        batch = batch_of(sharing(11), 11)
        model(**batch, fused_lm_head=True).log_probs.sum().backward()
    assert relative(packed, plain) < 1e-5


@FUSED
def test_an_adapter_trains_the_same_and_can_be_switched_off() -> None:
    packed, plain = fused_pair(build("llama"), r=4, target_modules=["q_proj", "v_proj"])
    batch = batch_of(sharing(12), 12)
    computed: list[int] = []
    for model in (packed, plain):
        model(**batch, fused_lm_head=True)  # tries the model once
        model.get_base_model().model.register_forward_pre_hook(
            lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        model(**batch, fused_lm_head=True)
    assert sum(computed[:-1]) < computed[-1]  # packed, for all that the adapter hands on
    found = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    for log_probs in found:
        log_probs.sum().backward()
    assert relative(packed, plain) < 1e-5
    with packed.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        off = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    torch.testing.assert_close(*off, rtol=0, atol=1e-4)
    assert (off[0] - found[0]).abs().max() > 1e-2


@FUSED
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_reaches_the_packed_rows(attention: str) -> None:
    packed, plain = fused_pair(build("llama", attention))
    batch = batch_of(sharing(13), 13)
    with torch.autocast("cpu", torch.bfloat16):
        found = [m(**batch, fused_lm_head=True).log_probs for m in (packed, plain)]
    exact = plain(**batch, fused_lm_head=True).log_probs
    off = [(f.float() - exact).abs().max().item() for f in found]
    assert 0 < off[0] < 2 * off[1] + 1e-3  # as far from float32 as unpacked rows are


@FUSED
def test_a_batch_without_targets_gives_zeros_that_are_connected_to_the_model() -> None:
    packed, _ = fused_pair(build("llama"))
    batch = batch_of(sharing(14), 14)
    batch["labels"][:] = -100
    output = packed(**batch, fused_lm_head=True)
    assert not output.log_probs.any()
    output.log_probs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in packed.parameters())


@FUSED
def test_rows_without_targets_are_not_computed() -> None:
    packed, _ = fused_pair(build("llama"))
    batch = batch_of([[5, 6, 7, 8], [9, 10, 11, 12]], 0)
    batch["labels"][:] = -100
    batch["labels"][0, 3] = 8
    packed(**batch, fused_lm_head=True)  # tries the model once
    computed: list[int] = []
    packed.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    packed(**batch, fused_lm_head=True)
    assert computed == [3]  # the last token is a target only


@FUSED
def test_a_batch_that_cannot_be_packed_goes_to_the_model_as_it_is() -> None:
    packed, plain = fused_pair(build("mixtral"))
    batch = batch_of(sharing(15), 15)
    found = packed(**batch, fused_lm_head=True, output_router_logits=True)
    expected = plain(**batch, fused_lm_head=True, output_router_logits=True)
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(found.aux_loss, expected.aux_loss)


@FUSED
def test_every_other_call_of_the_model_is_as_before() -> None:
    packed, plain = fused_pair(build("llama"))
    ids = torch.tensor([[5, 6, 7]], device=packed.device)
    assert torch.equal(packed.eval()(ids).logits, plain.eval()(ids).logits)
    made = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (packed, plain)]
    assert torch.equal(*made)

"""Passes: each shared token once, within the tokens of a pass."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from conftest import DEVICE
from families import (
    FUSED,
    SIZES,
    batch_of,
    build,
    fresh,
)
from self_judge.packing import packing as packing_module
from self_judge.packing.chunked_prefill import PrefixIndex, plan_chunks
from self_judge.packing.fused_head import pack_fused_head
from self_judge.packing.packing import Packing
from self_judge.packing.passes import (
    Pass,
    Shape,
    Wanted,
    cache_passes,
    hidden_states_at,
    tree_passes,
)
from self_judge.packing.prefix_tree import shared_length
from self_judge.packing.segment_passes import chunked_passes, segment_passes


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
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16)
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

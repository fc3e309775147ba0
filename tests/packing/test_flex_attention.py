"""FlexAttention over trees: the numbers of plain attention, few graphs, and never uncompiled."""

from __future__ import annotations

import copy
import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface

from families import SIZES, alone, build, fresh, sharing
from self_judge.packing.flex_attention import (
    NAME,
    ROW_MULTIPLE,
    UnfusedError,
    refusal,
    tree_attention,
    tree_blocks,
)
from self_judge.packing.packing import Packing
from self_judge.packing.passes import stacked, tree_mask
from self_judge.packing.prefix_tree import joined, prefix_rows

COMPILES = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None,
        reason="torch.compile needs a C++ compiler on a CPU",
    ),
]


def compiles(test: Any) -> Any:
    for mark in COMPILES:
        test = mark(test)
    return test


@pytest.fixture
def no_graphs() -> Any:
    """A process in which nothing has been compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def llama(heads: int, shared: int, size: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    changes = {
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": 1024,
    }
    model = hf.AutoModelForCausalLM.from_config(
        hf.LlamaConfig(**{**SIZES, **changes}), attn_implementation=NAME
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval().to(dtype)


def conversation(draw: random.Random) -> list[list[int]]:
    """Continuations of one prefix, any number of them and of any length."""

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, 120) for _ in range(draw.randint(1, most))]

    root = tokens(300)
    return [root + tokens(100) for _ in range(draw.randint(1, 9))]


def last_logits(packing: Packing, sequences: list[list[int]]) -> torch.Tensor:
    found = {}
    for indices, logits in packing.next_token_logits(sequences):
        found.update(zip(indices, logits, strict=True))
    return torch.stack([found[i] for i in range(len(sequences))])


def states(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


# -- blocks ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(100, 900))
def test_blocks_are_what_the_dense_mask_of_the_row_has_in_them(
    seed: int, count: int, row_tokens: int
) -> None:
    draw = random.Random(seed)
    trees = [
        [draw.randrange(2) for _ in range(draw.randint(1, 120))] * draw.randint(1, 3)
        for _ in range(count)
    ]
    (row, *_) = joined(prefix_rows(trees, row_tokens), 2000)
    _, _, ends = stacked([row], ROW_MULTIPLE)
    blocks, dense = tree_blocks(ends[0]), tree_mask(ends)[0, 0]
    length = len(dense)
    by_block = dense.view(length // 128, 128, length // 128, 128).transpose(1, 2).flatten(2)
    some, every = by_block.any(-1), by_block.all(-1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), some)
    # In a full block nothing is masked, in the others `mask_mod` says what is.
    full = torch.zeros_like(every)
    for i, (n, columns) in enumerate(
        zip(blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0], strict=True)
    ):
        full[i, columns[:n]] = True
    assert torch.equal(full, every)
    place = torch.arange(length)
    assert torch.equal(blocks.mask_mod(0, 0, place[:, None], place[None, :]), dense)


# -- numbers ---------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("heads", "shared", "dtype"),
    [
        (4, 2, torch.float32),
        (9, 3, torch.float32),  # as SmolLM2-135M has them: no power of two
        (9, 3, torch.bfloat16),
    ],
)
def test_trees_give_what_each_sequence_gives_alone(
    heads: int, shared: int, dtype: torch.dtype
) -> None:
    model, seed = llama(heads, shared, dtype=dtype), fresh()
    packing = Packing(model)
    assert packing.decision.route == "tree", packing.decision
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    sequences = conversation(random.Random(seed))
    with torch.no_grad():
        expected = torch.stack([alone(exact, s)[-1] for s in sequences])
        usual = torch.stack([alone(plain, s)[-1] for s in sequences])
    off = (last_logits(packing, sequences) - expected).abs().max().item()
    if dtype == torch.float32:
        assert off < 1e-4, seed
    else:  # as far from the truth as half precision is anyway
        assert off < 3 * (usual - expected).abs().max().item(), seed


@compiles
@pytest.mark.parametrize("name", ["qwen3", "gemma", "phi", "granite, scaled logits"])
def test_other_families_attend_over_trees_too(name: str) -> None:
    model, seed = build(name, NAME), fresh()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    packing, sequences = Packing(model), sharing(seed)
    assert packing.decision.route == "tree", packing.decision
    with torch.no_grad():
        expected = torch.stack([alone(plain, s)[-1] for s in sequences])
    torch.testing.assert_close(
        last_logits(packing, sequences), expected, rtol=0, atol=1e-4, msg=f"{name} {seed}"
    )


@compiles
def test_several_trees_stand_in_one_row_and_a_row_is_a_pass() -> None:
    model, draw = llama(4, 2), random.Random(0)
    sequences = [s for _ in range(4) for s in conversation(draw)]
    packing = Packing(model, batch_tokens=2000)
    shapes = [p.inputs["input_ids"].shape for p in packing.passes(sequences, _last(sequences))]
    assert all(rows == 1 for rows, _ in shapes)
    assert len(shapes) < 4
    assert all(width % ROW_MULTIPLE == 0 for _, width in shapes)


def _last(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array([len(s) - 1]) for s in sequences]


# -- graphs ----------------------------------------------------------------------------------------


@compiles
def test_a_model_costs_at_most_two_graphs_whatever_its_passes_hold(no_graphs: Any) -> None:
    draw = random.Random(fresh())
    for heads, shared in ((4, 2), (9, 3)):
        before = counters["stats"]["unique_graphs"]
        model, passes = llama(heads, shared), 0
        while passes < 20:
            # The trials of the ways to share are counted with them.
            packing = Packing(model, batch_tokens=draw.choice([200, 700, 2000]))
            assert packing.decision.route == "tree"
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=draw.random() < 0.3):
                passes += sum(1 for _ in packing.next_token_logits(conversation(draw)))
        assert 1 <= counters["stats"]["unique_graphs"] - before <= 2


@compiles
def test_more_kinds_of_models_than_pytorch_compiles_for_is_an_error(no_graphs: Any) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        assert Packing(llama(4, 2)).decision.route == "tree"
        with pytest.raises(
            UnfusedError,
            match=r"recompile_limit while compiling for this model",
        ):
            _ = Packing(llama(9, 3)).decision


def test_where_nothing_is_compiled_attention_is_refused_not_unfused(no_graphs: Any) -> None:
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(
            UnfusedError, match=r"torch.compile, which is disabled here: set model.attn_implem"
        ),
    ):
        _ = Packing(build("llama", NAME)).decision


def test_a_missing_compiler_is_one_line_with_what_to_do(no_graphs: Any, monkeypatch: Any) -> None:
    def absent(*args: Any, **kwargs: Any) -> Any:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", absent)
    uncached = torch._inductor.config.patch(force_disable_caches=True)
    with uncached, pytest.raises(UnfusedError, match=r"compiled here .*sdpa$") as caught:
        _ = Packing(build("llama", NAME)).decision
    assert "\n" not in str(caught.value)


# -- what it does not do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0}, "soft-capped scores"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 256, 256)}, "position biases"),
    ],
)
def test_what_its_kernel_would_leave_out_is_refused(asked: dict[str, Any], what: str) -> None:
    query, key = states(1, 4, 256, 16), states(1, 2, 256, 16)
    blocks = tree_blocks(torch.full((256,), 256))
    with torch.no_grad(), pytest.raises(ValueError, match=f"not support {what}: set"):
        tree_attention(nn.Module(), query, key, key, blocks, **asked)


def test_training_on_a_cpu_is_refused_in_one_line() -> None:
    query, key = states(1, 4, 256, 16).requires_grad_(), states(1, 2, 256, 16)
    blocks = tree_blocks(torch.full((256,), 256))
    with pytest.raises(ValueError, match=r"no backward pass on a CPU: set .*: sdpa$"):
        tree_attention(nn.Module(), query, key, key, blocks)


def test_heads_too_small_for_cuda_are_told_before_anything_is_compiled() -> None:
    model = build("llama", NAME)  # heads of 8
    assert refusal(model, torch.device("cpu")) is None
    assert refusal(model, torch.device("cuda")) == (
        "FlexAttention on CUDA requires a head size of at least 16, got 8"
    )
    assert refusal(llama(9, 3), torch.device("cuda")) is None


def test_masks_of_transformers_own_go_transformers_way(monkeypatch: Any) -> None:
    assert AttentionInterface()[NAME] is tree_attention
    given: list[Any] = []
    monkeypatch.setattr(
        "self_judge.packing.flex_attention.flex_attention_forward",
        lambda *tensors, **others: given.append((tensors, others)) or "theirs",
    )
    query, module = states(1, 4, 256, 16), nn.Module()
    causal = create_block_mask(lambda b, h, q, k: k <= q, 1, None, 256, 256, device="cpu")
    kept = {"scaling": 0.5, "softcap": 30.0, "dropout": 0.0, "kernel_options": {"BLOCK_M": 64}}
    for mask in (causal, states(1, 1, 256, 256), None):
        assert tree_attention(module, query, query, query, mask, **kept) == "theirs"
        assert given.pop() == ((module, query, query, query, mask), kept)

"""Attention by segments: what a dense mask gives, for any tree and any grouping of heads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_chunked_prefill import seen
from test_prefix_tree import SEQUENCES, slow_mask
from torch import nn

from conftest import DEVICE
from self_judge.packing.chunked_prefill import PrefixIndex, plan_chunks, segments_of
from self_judge.packing.prefix_tree import joined, prefix_rows
from self_judge.packing.segment_attention import Attending, attending, segment_attention

CPU = torch.device("cpu")
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])  # heads, and heads of keys


def states(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Softmax over the keys that the mask `(L, keys)` shows, written out; `(1, L, H, D)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (s.repeat_interleave(groups, dim=1) for s in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def by_segments(*tensors: torch.Tensor, segments: list[Attending], **others: Any) -> torch.Tensor:
    attended, weights = segment_attention(
        nn.Module(), *tensors, None, prefix_segments=segments, **others
    )
    assert weights is None
    assert attended.is_contiguous()
    return attended


@given(SEQUENCES, st.integers(1, 40), HEADS, st.integers(0, 999), st.floats(0.1, 2.0))
def test_a_row_of_trees_is_attended_to_as_through_its_dense_mask(
    sequences: list[list[int]],
    row_tokens: int,
    heads: tuple[int, int],
    seed: int,
    scaling: float,
) -> None:
    rows = prefix_rows(sequences, row_tokens)
    for row in joined(rows, 3 * row_tokens):
        query = states(seed, 1, heads[0], len(row), 8)
        key, value = (
            states(seed + 1, 1, heads[1], len(row), 8),
            states(seed + 2, 1, heads[1], len(row), 6),
        )
        segments = attending(segments_of(row), CPU)
        found = by_segments(query, key, value, segments=segments, scaling=scaling)
        expected = plainly(query, key, value, torch.from_numpy(slow_mask(row)), scaling)
        torch.testing.assert_close(found, expected)
        # The masks are made once and serve every layer.
        again = by_segments(query, key, value, segments=segments, scaling=scaling)
        assert torch.equal(found, again)


@given(SEQUENCES, st.integers(1, 20), HEADS, st.integers(0, 999))
def test_a_step_of_a_walk_is_attended_to_after_the_keys_of_earlier_steps(
    sequences: list[list[int]], chunk_tokens: int, heads: tuple[int, int], seed: int
) -> None:
    for chunk in plan_chunks(sequences, chunk_tokens, PrefixIndex()):
        own, keys = len(chunk.token_ids), len(chunk.past) + len(chunk.token_ids)
        query = states(seed, 1, heads[0], own, 8)
        key, value = states(seed + 1, 1, heads[1], keys, 8), states(seed + 2, 1, heads[1], keys, 8)
        mask = torch.cat([torch.from_numpy(seen(segment, keys)) for segment in chunk.segments])
        found = by_segments(query, key, value, segments=attending(chunk.segments, CPU), scaling=0.3)
        torch.testing.assert_close(found, plainly(query, key, value, mask, 0.3))


def test_a_long_run_is_attended_to_in_pieces_that_meet_no_key_after_them() -> None:
    [row] = prefix_rows([list(range(300)), [*range(150), *range(500, 800)]], 10_000)
    segments = attending(segments_of(row), CPU)
    assert max(segment.queries.stop - segment.queries.start for segment in segments) == 128
    met = sum(
        (segment.queries.stop - segment.queries.start) * sum(k.stop - k.start for k in segment.keys)
        for segment in segments
    )
    assert met < 0.75 * len(row) ** 2
    query, key, value = (states(i, 1, 2, len(row), 8) for i in range(3))
    expected = plainly(query, key, value, torch.from_numpy(slow_mask(row)), 8**-0.5)
    torch.testing.assert_close(by_segments(query, key, value, segments=segments), expected)


def gradients(attend: Any, tensors: Sequence[torch.Tensor], pull: torch.Tensor) -> list[Any]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    return [*torch.autograd.grad((attend(*leaves) * pull).sum(), leaves)]


def drawn_row(seed: int, dtype: torch.dtype, heads: tuple[int, int] = (9, 3)) -> Any:
    """A random row of trees with long segments and single tokens, its states, a pull, its mask."""
    numbers = random.Random(seed)
    sequences: list[list[int]] = [[1]]
    for _ in range(8):
        path = numbers.choice(sequences)
        length = numbers.choice([1, 2, 30, 300])
        sequences.append([*path[: numbers.randrange(len(path) + 1)], *range(9, 9 + length)])
    [row] = joined(prefix_rows(sequences, 10_000), 10_000)
    query = states(seed, 1, heads[0], len(row), 16).to(dtype)
    key, value = (states(seed + i, 1, heads[1], len(row), 16).to(dtype) for i in (1, 2))
    pull = states(seed + 3, 1, len(row), heads[0], 16).to(dtype)
    return attending(segments_of(row), CPU), (query, key, value), pull, torch.tensor(slow_mask(row))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@given(SEQUENCES, HEADS, st.integers(0, 999))
def test_gradients_are_those_of_dense_attention(
    sequences: list[list[int]], heads: tuple[int, int], seed: int
) -> None:
    for row in joined(prefix_rows(sequences, 40), 100):
        tensors = [states(seed + i, 1, heads[i > 0], len(row), 8) for i in range(3)]
        pull = states(seed + 3, 1, len(row), heads[0], 8)
        segments, mask = attending(segments_of(row), CPU, piece=2), torch.from_numpy(slow_mask(row))
        torch.testing.assert_close(
            gradients(partial(by_segments, segments=segments, scaling=0.5), tensors, pull),
            gradients(partial(plainly, mask=mask, scaling=0.5), tensors, pull),
        )


@given(SEQUENCES, st.integers(1, 20), HEADS, st.integers(0, 999))
def test_gradients_reach_the_keys_of_earlier_steps(
    sequences: list[list[int]], chunk_tokens: int, heads: tuple[int, int], seed: int
) -> None:
    for chunk in plan_chunks(sequences, chunk_tokens, PrefixIndex()):
        own, keys = len(chunk.token_ids), len(chunk.past) + len(chunk.token_ids)
        tensors = [states(seed, 1, heads[0], own, 8)]
        tensors += [states(seed + i, 1, heads[1], keys, 8) for i in (1, 2)]
        pull = states(seed + 3, 1, own, heads[0], 8)
        segments = attending(chunk.segments, CPU)
        mask = torch.cat([torch.from_numpy(seen(segment, keys)) for segment in chunk.segments])
        torch.testing.assert_close(
            gradients(partial(by_segments, segments=segments, scaling=0.3), tensors, pull),
            gradients(partial(plainly, mask=mask, scaling=0.3), tensors, pull),
        )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_as_near_to_float64_as_with_a_node_for_each_run(
    dtype: torch.dtype, limit: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments, tensors, pull, mask = drawn_row(seed, dtype)
    expected = gradients(
        partial(plainly, mask=mask, scaling=0.25), [t.double() for t in tensors], pull.double()
    )
    found = gradients(partial(by_segments, segments=segments), tensors, pull)
    monkeypatch.setattr("self_judge.packing.segment_attention._in_one_node", lambda *_: False)
    by_nodes = gradients(partial(by_segments, segments=segments), tensors, pull)
    for one, many, exact in zip(found, by_nodes, expected, strict=True):
        assert one.dtype == dtype
        assert off(one, exact) < limit
        assert off(one, exact) < 1.1 * off(many, exact) + 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_same_with_and_without_gradients(dtype: torch.dtype) -> None:
    segments, tensors, _, _ = drawn_row(0, dtype)
    with torch.no_grad():
        expected = by_segments(*tensors, segments=segments)
    found = by_segments(*(t.clone().requires_grad_() for t in tensors), segments=segments)
    assert found.grad_fn is not None
    assert torch.equal(found, expected)


def test_autocast_computes_in_its_own_type_and_gives_gradients_in_that_of_the_states() -> None:
    segments, tensors, pull, _ = drawn_row(0, torch.float32)
    query, key, value = tensors
    mixed = (query, key, value.bfloat16())  # rotary embeddings leave float32, a projection does not
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(partial(by_segments, segments=segments), mixed, pull)
        values = by_segments(*mixed, segments=segments)
    half = [t.bfloat16() for t in tensors]
    assert torch.equal(values, by_segments(*half, segments=segments))
    assert [g.dtype for g in found] == [t.dtype for t in mixed]
    expected = gradients(partial(by_segments, segments=segments), half, pull)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_survive_checkpointing_and_a_second_use(reentrant: bool) -> None:
    segments, tensors, pull, _ = drawn_row(1, torch.float32, (4, 2))

    def twice(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        first = by_segments(query, key, value, segments=segments)
        return by_segments(first.transpose(1, 2), key, value, segments=segments)

    def checkpointed(*states: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(twice, *states, use_reentrant=reentrant)

    if reentrant:  # which goes with `backward` alone
        leaves = [t.clone().requires_grad_() for t in tensors]
        (checkpointed(*leaves) * pull).sum().backward()
        found = [leaf.grad for leaf in leaves]
    else:
        found = gradients(checkpointed, tensors, pull)
    for one, other in zip(found, gradients(twice, tensors, pull), strict=True):
        assert torch.equal(one, other)


def test_keys_and_values_are_kept_once_for_the_backward_pass() -> None:
    segments, tensors, _, _ = drawn_row(0, torch.float32)
    kept: list[torch.Tensor] = []
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attended = by_segments(*leaves, segments=segments)
    sums = attended[..., 0].numel()
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in (*tensors, attended)) + sums


def test_attention_is_without_dropout_unless_asked_for() -> None:
    [row] = prefix_rows([list(range(40))], 100)
    tensors = [states(i, 1, 2, len(row), 8) for i in range(3)]
    segments = attending(segments_of(row), CPU)
    assert torch.equal(
        by_segments(*tensors, segments=segments), by_segments(*tensors, segments=segments)
    )
    dropped = by_segments(*tensors, segments=segments, dropout=0.5)
    assert not torch.allclose(dropped, by_segments(*tensors, segments=segments))
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.manual_seed(0)
    expected = by_segments(*tensors, segments=segments, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(by_segments(*leaves, segments=segments, dropout=0.5), expected)


@pytest.mark.parametrize(
    "unlike",
    [{"prefix_segments": None}, {"softcap": 30.0}, {"position_bias": torch.zeros(1, 2, 3, 3)}],
    ids=lambda unlike: next(iter(unlike)),
)
def test_what_plain_attention_does_not_do_is_refused_rather_than_left_out(
    unlike: dict[str, Any],
) -> None:
    [row] = prefix_rows([[1, 2, 3]], 100)
    tensors = [states(i, 1, 2, 3, 8) for i in range(3)]
    given_runs = {"prefix_segments": attending(segments_of(row), CPU), **unlike}
    with pytest.raises(ValueError, match="does not support segment attention"):
        segment_attention(nn.Module(), *tensors, None, **given_runs)

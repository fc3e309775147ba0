"""Prefix trees: nothing is lost, shared tokens stand once, a token sees its ancestors only."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from self_judge.packing.prefix_tree import (
    Row,
    batches,
    joined,
    prefix_groups,
    prefix_rows,
    shared_length,
)

TOKENS = st.integers(0, 2)  # few, so that prefixes are shared often
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=12), min_size=1, max_size=14)


def read_back(rows: Sequence[Row]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows:
        for i, places in row.places.items():
            assert i not in found
            found[i] = row.token_ids[places].tolist()
    return found


def slow_mask(row: Row) -> np.ndarray:
    """Token q sees token k if some sequence has both, and k not after q."""
    mask = np.zeros((len(row), len(row)), dtype=bool)
    for places in row.places.values():
        for n, q in enumerate(places):
            mask[q, places[: n + 1]] = True
    return mask


def fast_mask(row: Row) -> np.ndarray:
    q, k = np.arange(len(row))[:, None], np.arange(len(row))
    return (k <= q) & (q < row.subtree_ends)


@given(SEQUENCES, st.integers(1, 40), st.sampled_from([0.0, 0.01, 1.0]))
def test_every_sequence_comes_back(
    sequences: list[list[int]], row_tokens: int, cost: float
) -> None:
    rows = prefix_rows(sequences, row_tokens, cost)
    assert read_back(rows) == dict(enumerate(sequences))
    assert read_back(joined(rows, row_tokens)) == dict(enumerate(sequences))


@given(SEQUENCES, st.integers(1, 40), st.sampled_from([0.0, 0.01, 1.0]))
def test_a_token_stands_at_its_depth_and_sees_its_ancestors_only(
    sequences: list[list[int]], row_tokens: int, cost: float
) -> None:
    rows = prefix_rows(sequences, row_tokens, cost)
    for row in [*rows, *joined(rows, row_tokens)]:
        assert (fast_mask(row) == slow_mask(row)).all()
        for places in row.places.values():
            assert row.positions[places].tolist() == list(range(len(places)))


@given(SEQUENCES)
def test_every_unique_prefix_stands_once(sequences: list[list[int]]) -> None:
    rows = prefix_rows(sequences, row_tokens=10_000)
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert sum(len(r) for r in rows) == len(prefixes)


@given(SEQUENCES, st.integers(1, 40), st.sampled_from([0.0, 0.01, 1.0]), st.booleans())
def test_no_row_is_longer_than_allowed_but_for_a_sequence_or_a_pair_that_is(
    sequences: list[list[int]], row_tokens: int, cost: float, split_pairs: bool
) -> None:
    rows = prefix_rows(sequences, row_tokens, cost, split_pairs=split_pairs)
    for row in rows:
        members = len({tuple(p) for p in row.places.values()})
        assert len(row) <= row_tokens or members <= (1 if split_pairs else 2)
    longest = max(map(len, rows))
    assert max(map(len, joined(rows, row_tokens))) <= max(row_tokens, longest)


@given(SEQUENCES, st.integers(1, 30), st.booleans())
def test_an_oversized_tree_is_split_so_that_the_fewest_tokens_are_computed(
    sequences: list[list[int]], row_tokens: int, split_pairs: bool
) -> None:
    ordered = sorted(set(map(tuple, sequences)))
    whole = 1 if split_pairs else 2

    def tokens(stretch: Sequence[tuple[int, ...]]) -> int:
        return len({s[: n + 1] for s in stretch for n in range(len(s))})

    least = [0]
    for end in range(1, len(ordered) + 1):
        stretches = [(start, tokens(ordered[start:end])) for start in range(end)]
        fitting = [(s, n) for s, n in stretches if n <= row_tokens or s >= end - whole]
        least.append(min(least[s] + n for s, n in fitting))
    rows = prefix_rows(sequences, row_tokens, split_pairs=split_pairs)
    assert sum(len(r) for r in rows) == least[-1]


def pairs(draw: random.Random, count: int, longest: int) -> list[list[int]]:
    """Pairs of sequences with a prefix of any length in common, from a prompt of their own."""
    found = []
    for number in range(count):
        a, b = (draw.randint(1, longest) for _ in range(2))
        prefix = [number, *draw.choices(range(100, 10_000), k=draw.randint(0, min(a, b)))]
        found += [(prefix + draw.choices(range(100, 10_000), k=n))[:n] for n in (a, b)]
    return found


def unique_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Nodes of the one prefix tree, counted without it."""
    ordered = [np.array(s) for s in sorted(map(tuple, sequences))]
    shared = itertools.starmap(shared_length, itertools.pairwise(ordered))
    return sum(map(len, ordered)) - sum(shared)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.sampled_from([300, 2048, 4096]),
    st.sampled_from([1, 1024, 16_384]),
    st.sampled_from([0.0, 1e-4, 2e-3, 1.0]),
)
def test_pairs_are_never_split_by_a_limit_nor_by_what_attention_costs(
    seed: int, count: int, longest: int, row_tokens: int, cost: float
) -> None:
    sequences = pairs(random.Random(seed), count, longest)
    rows = prefix_rows(sequences, row_tokens, cost)
    assert sum(map(len, rows)) <= 1.05 * unique_tokens(sequences)


def test_two_sequences_of_900_that_share_500_stand_in_one_row_of_1300() -> None:
    prefix = list(range(500))
    sequences = [prefix + [own] * 400 for own in (1, 2)]
    for row_tokens, cost in ((1, 0.0), (1024, 1.0), (16_384, 1e-4)):
        assert [len(row) for row in prefix_rows(sequences, row_tokens, cost)] == [1300]
    split = prefix_rows(sequences, 1299, split_pairs=True)  # as after full memory
    assert [len(row) for row in split] == [900, 900]


def test_branches_are_kept_apart_where_attention_across_them_costs_more_than_the_prefix() -> None:
    sequences = [[0, *range(10, 40)], [0, *range(50, 80)]]
    assert len(prefix_rows(sequences, 1000, attention_cost=0.0)) == 1
    assert len(prefix_rows(sequences, 1000, attention_cost=0.1)) == 2


def test_a_row_too_long_by_itself_keeps_no_others_from_sharing() -> None:
    rows = prefix_rows([[0] * 12, [1, 2], [1, 3]], 5)
    assert [len(row) for row in rows] == [12, 3]


def in_lengths(*lengths: int) -> list[Row]:
    """One row of a single sequence for each length; nothing in them is shared."""
    return [prefix_rows([[100 * n + i for i in range(n)]], n)[0] for n in lengths]


def test_trees_are_joined_longest_first_where_they_leave_the_least_room() -> None:
    assert [len(row) for row in joined(in_lengths(4, 4, 6, 6), 10)] == [10, 10]
    # The tree of 2 goes to 10 + 8 of 20, where it leaves nothing, not to 13.
    rows = joined(in_lengths(2, 8, 13, 10), 20)
    assert [row.token_ids.tolist().count(200) for row in rows] == [0, 1]
    assert [len(row) for row in rows] == [13, 20]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 30))
def test_no_two_joined_rows_could_be_one(lengths: list[int], row_tokens: int) -> None:
    sizes = sorted(len(row) for row in joined(in_lengths(*lengths), row_tokens))
    assert len(sizes) == 1 or sizes[0] + sizes[1] > row_tokens


@given(SEQUENCES)
def test_prefix_groups_leave_the_fewest_tokens_to_compute(sequences: list[list[int]]) -> None:
    ordered = sorted(map(tuple, sequences))

    def tokens(run: Sequence[tuple[int, ...]]) -> int:
        if len(run) == 1:
            return len(run[0])
        prefix = min(len(s) for s in run) - 1
        while len({s[:prefix] for s in run}) > 1:
            prefix -= 1
        return prefix + sum(len(s) - prefix for s in run)

    least = [0]
    for end in range(1, len(ordered) + 1):
        least.append(min(least[s] + tokens(ordered[s:end]) for s in range(end)))
    computed = sum(
        group.prefix + sum(len(sequences[i]) - group.prefix for i in group.members)
        for group in prefix_groups(sequences)
    )
    assert computed == least[-1]


def test_a_sequence_alone_has_no_prefix_to_compute_for_others() -> None:
    def groups(*sequences: list[int]) -> set[tuple[int, tuple[int, ...]]]:
        return {(g.prefix, tuple(sorted(g.members))) for g in prefix_groups(sequences)}

    assert groups([1, 2, 3], [7, 8, 9], [7, 8, 4]) == {(0, (0,)), (2, (1, 2))}
    assert groups([9, 2, 3], [7, 8, 9], [7, 8, 4]) == {(0, (0,)), (2, (1, 2))}


def test_a_prefix_group_has_64_members_at_most() -> None:
    sequences = [[1] * 50 + [i] for i in range(65)]
    groups = prefix_groups(sequences)
    assert sorted(len(g.members) for g in groups) == [1, 64]
    assert [len(g.members) for g in prefix_groups(sequences[:64])] == [64]


@given(SEQUENCES)
def test_prefix_groups_cover_all_and_leave_every_sequence_a_token(
    sequences: list[list[int]],
) -> None:
    groups = prefix_groups(sequences)
    assert sorted(i for g in groups for i in g.members) == list(range(len(sequences)))
    for group in groups:
        heads = {tuple(sequences[i][: group.prefix]) for i in group.members}
        assert len(heads) == 1
        assert all(len(sequences[i]) > group.prefix for i in group.members)


COSTS = st.sampled_from([None, 0.0, 1e-3, 1.0])


@given(SEQUENCES, st.integers(1, 60), COSTS, st.booleans())
def test_batches_keep_all_trees_within_their_limit(
    sequences: list[list[int]], batch_tokens: int, cost: float | None, one: bool
) -> None:
    rows = prefix_rows(sequences, 10, 1.0)
    batched = batches(rows, batch_tokens, cost, one=one)
    assert read_back([row for batch in batched for row in batch]) == dict(enumerate(sequences))
    assert sum(len(row) for batch in batched for row in batch) == sum(map(len, rows))
    assert len(batched) == 1 or not one
    for batch in batched:
        longest = max(map(len, batch))
        assert len(batch) * longest <= batch_tokens or len(batch) == 1 or one
        assert longest <= batch_tokens or longest <= max(map(len, rows))
        for row in batch:
            assert (fast_mask(row) == slow_mask(row)).all()


def in_batches(lengths: Sequence[int], *limits: Any, **how: Any) -> list[list[int]]:
    return [[len(row) for row in b] for b in batches(in_lengths(*lengths), *limits, **how)]


def test_rows_of_like_lengths_are_one_pass_where_trees_cannot_be_joined() -> None:
    # Twelve rows of 40 would be one pass; 2 × 40 and 10 × 8 compute a third of that.
    assert in_batches([40, 38, *[8] * 10], 480) == [[40, 38], [8] * 10]
    # A pass has a price: three tokens of padding are less.
    assert in_batches([10, 9, 8], 480) == [[10, 9, 8]]
    assert in_batches([10, 9, 8], 20) == [[10], [9, 8]]
    assert in_batches([10, 9, 8], 1) == [[10], [9], [8]]
    assert in_batches([10, 2], 1, one=True) == [[10, 2]]


def test_a_pass_that_would_leave_a_device_idle_is_filled_before_padding_is_saved() -> None:
    rows = [40, 38, *[8] * 10]  # 160 tokens in two passes, 480 in one
    assert in_batches(rows, 480, busy_tokens=160) == [[40, 38], [8] * 10]
    assert in_batches(rows, 480, busy_tokens=480) == [rows]
    assert in_batches(rows, 100, busy_tokens=480) == in_batches(rows, 100)  # a pass is full


def test_short_trees_stand_where_there_would_be_padding_under_a_mask() -> None:
    assert in_batches([10, 6, 4, 5, 5], 480, 1e-3) == [[10, 10, 10]]
    # Longer rows cost attention, padding costs tokens.
    assert in_batches([10, 9, 1, 9, 1], 480, 1.0) == [[10, 10, 10]]
    assert in_batches([9, 9, 9, 9, 9], 480, 1.0) == [[9, 9, 9, 9, 9]]
    assert in_batches([10, 6, 6, 6, 2], 480, 1e-4) == [[30]]
    assert in_batches([10, 6, 6, 6, 2], 20, 1.0, one=True) == [[10, 8, 6, 6]]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_one_pass_of_many_trees_is_little_padded_where_attention_is_cheap(
    lengths: list[int],
) -> None:
    ((*rows,),) = in_batches(lengths, 5000, 0.0, one=True)
    assert len(rows) * max(rows) == sum(lengths)


def test_shared_length_counts_from_the_start() -> None:
    array = np.array
    assert shared_length(array([1, 2, 3]), array([1, 2, 4])) == 2
    assert shared_length(array([1, 2]), array([1, 2, 4])) == 2
    assert shared_length(array([5]), array([1])) == 0


def test_what_cannot_be_laid_out_is_named() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        prefix_rows([[1], []], 8)
    with pytest.raises(ValueError, match="row_tokens must be at least 1"):
        prefix_rows([[1]], 0)

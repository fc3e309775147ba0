"""Prefix trees: sequences that share a prefix, laid out in rows in which every token stands once.

Pure: token ids in, layouts out. It knows no model, no attention and no torch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """One or more prefix trees in depth-first order; L tokens.

    Token q descends from token k, or is it, exactly if `k <= q < subtree_ends[k]`: one number per
    token says all of the attention mask.

    Attributes:
        token_ids: the ids, shape `(L,)`.
        positions: how deep each token stands, which is its position in its sequences, `(L,)`.
        subtree_ends: the place after each token's last descendant, `(L,)`.
        places: by index of a sequence, where its tokens stand in the row, in their order.
    """

    token_ids: Ints
    positions: Ints
    subtree_ends: Ints
    places: dict[int, Ints]

    def __len__(self) -> int:
        return len(self.token_ids)


def shared_length(a: Ints, b: Ints) -> int:
    """How many tokens two sequences have in common from their start."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


# A pair that shares one part in so many of its tokens stays in one row: a shorter prefix, repeated,
# adds less than 5 %.
_LEAST_SHARED = 20


def prefix_rows(
    sequences: Sequence[Sequence[int]],
    row_tokens: int,
    attention_cost: float = 0.0,
    *,
    split_pairs: bool = False,
) -> list[Row]:
    """One tree per row, so that the rows together cost least.

    Sequences are sorted, so that a tree is a stretch of neighbours, and the stretches are chosen by
    dynamic programming: a row of L tokens costs `L + attention_cost · L²`. Where two neighbours are
    put into different rows, the prefix they share is computed once more: that is how a tree that
    would be too large, or whose attention across branches would cost more than the prefix, is
    split. Two sequences that share a twentieth of their tokens or more have a row of their own
    rather than two rows, whatever its length and its attention cost.

    Args:
        sequences: token ids, each with at least one token. Equal ones share all their places.
        row_tokens: tokens of a row at most; a pair, or a single sequence, may be longer.
        attention_cost: what one more key costs a token, in units of all its other work.
        split_pairs: whether the limit and the cost hold for pairs as well.

    Raises:
        ValueError: a sequence without tokens, or `row_tokens` below 1.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, got {row_tokens}")
    numbers: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequence {i} has no tokens")
        numbers.setdefault(tuple(sequence), []).append(i)
    ordered = sorted(numbers)
    arrays = [np.array(s, dtype=np.int64) for s in ordered]
    shared = _shared_with_previous(arrays)
    lengths = [len(a) for a in arrays]
    alone = [n + attention_cost * n * n for n in lengths]
    best, start_of = [0.0], [0]
    for end in range(1, len(arrays) + 1):
        cheapest, begins, tokens = float("inf"), end - 1, 0
        for start in range(end - 1, -1, -1):
            # A row that starts one earlier has that sequence's own tokens more.
            follows = shared[start + 1] if start + 1 < end else 0
            tokens += lengths[start] - follows
            pair = start == end - 2 and not split_pairs
            if tokens > row_tokens and start < end - 1 and not pair:
                break
            cost = tokens + attention_cost * tokens * tokens
            if pair and follows * _LEAST_SHARED >= tokens:
                # Never dearer than two rows, less the tokens that are saved.
                cost = min(cost, alone[start] + alone[start + 1] - follows)
            cost += best[start]
            if cost < cheapest:
                cheapest, begins = cost, start
        best.append(cheapest)
        start_of.append(begins)
    rows, end = [], len(arrays)
    while end:
        start = start_of[end]
        own = [numbers[s] for s in ordered[start:end]]
        rows.append(_row(arrays[start:end], shared[start:end], own))
        end = start
    return rows[::-1]


def _shared_with_previous(arrays: Sequence[Ints]) -> list[int]:
    return [0, *(shared_length(a, b) for a, b in itertools.pairwise(arrays))]


def _row(arrays: Sequence[Ints], shared: Sequence[int], numbers: Sequence[Sequence[int]]) -> Row:
    """The tree of sorted sequences; the first one's own prefix counts as its own."""
    tokens: list[Ints] = []
    positions: list[Ints] = []
    path = np.empty(0, dtype=np.int64)  # where the last sequence's tokens stand
    closed: list[tuple[Ints, int]] = []
    places: dict[int, Ints] = {}
    length = 0
    for i, array in enumerate(arrays):
        common = shared[i] if i else 0
        closed.append((path[common:], length))  # nothing more descends from these
        tokens.append(array[common:])
        positions.append(np.arange(common, len(array)))
        own = np.arange(length, length + len(array) - common)
        path = np.concatenate([path[:common], own])
        length += len(own)
        places.update(dict.fromkeys(numbers[i], path))
    closed.append((path, length))
    ends = np.empty(length, dtype=np.int64)
    for where, end in closed:
        ends[where] = end
    return Row(np.concatenate(tokens), np.concatenate(positions), ends, places)


def joined(rows: Iterable[Row], row_tokens: int) -> list[Row]:
    """Several trees per row, by best-fit decreasing: no tree sees another.

    No row gets longer than `row_tokens`, but for one that is longer already.
    """
    trees = sorted(rows, key=len, reverse=True)
    return [
        _one_after_the_other([trees[i] for i in own])
        for own in _bins([len(tree) for tree in trees], row_tokens)
    ]


def _bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which of some lengths, sorted from the longest, go into one bin; by best fit."""
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # sorted: the room left in a bin, and its number
    for i, length in enumerate(lengths):
        tightest = bisect.bisect_left(left, (length, -1))
        if tightest < len(left):
            rest, number = left.pop(tightest)
            bins[number].append(i)
        else:
            rest, number = room, len(bins)
            bins.append([i])
        bisect.insort(left, (rest - length, number))
    return bins


def _one_after_the_other(trees: Sequence[Row]) -> Row:
    if len(trees) == 1:
        return trees[0]
    starts = np.cumsum([0, *(len(t) for t in trees)]).tolist()
    return Row(
        np.concatenate([t.token_ids for t in trees]),
        np.concatenate([t.positions for t in trees]),
        np.concatenate([t.subtree_ends + s for t, s in zip(trees, starts, strict=False)]),
        {i: p + s for t, s in zip(trees, starts, strict=False) for i, p in t.places.items()},
    )


# What a pass costs beyond its tokens, as a part of the tokens that keep a device busy: between the
# 1/40 by which the matrices are slower at half as many, and the 1/12 measured for a whole model on
# two CPU cores.
_PRICE_OF_A_PASS = 1 / 16


def batches(
    rows: Iterable[Row],
    batch_tokens: int,
    attention_cost: float | None = None,
    *,
    one: bool = False,
) -> list[list[Row]]:
    """Rows of like lengths together, longest first, so that all passes cost least with padding.

    Where trees may be joined, a pass holds rows of one length, and shorter trees stand one after
    the other where there would be padding: under a dense mask they cost the same there.

    Args:
        rows: one tree each.
        batch_tokens: tokens of a pass at most, padding included; a longer row has a pass of its
            own.
        attention_cost: of a dense mask, see `prefix_rows`; `None`: rows are not joined.
        one: whether everything goes into one pass, whatever its size. Then no row is joined to
            more than `batch_tokens`.
    """
    ordered = sorted(rows, key=len, reverse=True)
    lengths = [len(row) for row in ordered]
    cuts = [(0, len(ordered))] if one else _stretches(lengths, batch_tokens, attention_cost)
    stretches = [ordered[start:end] for start, end in cuts]
    if attention_cost is None:
        return stretches
    return [_filled(own, batch_tokens, attention_cost, one=one) for own in stretches]


def _stretches(
    lengths: Sequence[int], batch_tokens: int, attention_cost: float | None
) -> list[tuple[int, int]]:
    """Sorted lengths, cut into passes that together cost least, by dynamic programming."""
    price = _PRICE_OF_A_PASS * batch_tokens
    longest = np.array(lengths, dtype=np.int64)
    tokens = np.concatenate([[0], longest.cumsum()])
    # From here on, rows are so short that two of them fit into one as long as the first.
    halves = np.searchsorted(-longest, -(longest // 2))
    best, start_of = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    for end in range(1, len(tokens)):
        first = min(end - 1, int(np.searchsorted(tokens, tokens[end] - batch_tokens)))
        here = slice(first, end)
        count = end - np.arange(first, end)
        if attention_cost is not None:
            count = np.minimum(count, halves[here] - np.arange(first, end))
        padded = np.maximum(tokens[end] - tokens[here], count * longest[here])
        cost = best[here] + padded * (1 + (attention_cost or 0.0) * longest[here]) + price
        cost[:-1][padded[:-1] > batch_tokens] = np.inf
        start_of[end] = first + int(cost.argmin())
        best[end] = cost.min()
    cuts, end = [], len(lengths)
    while end:
        cuts.append((int(start_of[end]), end))
        end = int(start_of[end])
    return cuts[::-1]


def _filled(
    trees: Sequence[Row], batch_tokens: int, attention_cost: float, *, one: bool
) -> list[Row]:
    """Trees in rows of the length at which these cost least; one row of all has no padding."""
    lengths = [len(tree) for tree in trees]
    total, longest = sum(lengths), lengths[0]
    most = max(longest, min(total, batch_tokens) if one else total)
    cheapest, chosen = float("inf"), [list(range(len(trees)))]
    room = longest
    while total * (1 + attention_cost * room) < cheapest:
        bins = _bins(lengths, room)
        length = max(sum(lengths[i] for i in own) for own in bins)
        padded = length * len(bins)
        cost = padded * (1 + attention_cost * length)
        if cost < cheapest and (one or padded <= batch_tokens or len(bins) == 1):
            cheapest, chosen = cost, bins
        if room == most:
            break
        room = min(most, room + max(1, room // 10))
    return [_one_after_the_other([trees[i] for i in own]) for own in chosen]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences (by index) whose first `prefix` tokens are the same; each has more of its own."""

    prefix: int
    members: tuple[int, ...]


# A group's branches are rows of one batch: more of them than this do not save noticeably more.
_LARGEST_GROUP = 64


def prefix_groups(sequences: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """One level of sharing: groups whose prefixes computed once leave the fewest tokens to compute.

    Every sequence keeps at least one token of its own. The groups' members cover all sequences,
    equal ones included.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    arrays = [np.array(sequences[i], dtype=np.int64) for i in order]
    shared = _shared_with_previous(arrays)
    best, start_of, prefix_of = [0], [0], [0]
    for end in range(1, len(arrays) + 1):
        cheapest: tuple[int, int, int] | None = None
        prefix = len(arrays[end - 1]) - 1
        for start in range(end - 1, max(-1, end - 1 - _LARGEST_GROUP), -1):
            follows = shared[start + 1] if start + 1 < end else prefix
            prefix = min(prefix, follows, len(arrays[start]) - 1)
            # Fewest tokens are computed where the most are saved.
            found = (best[start] - (end - start - 1) * prefix, start, prefix)
            cheapest = found if cheapest is None or found < cheapest else cheapest
        assert cheapest is not None
        best.append(cheapest[0])
        start_of.append(cheapest[1])
        prefix_of.append(cheapest[2])
    groups, end = [], len(arrays)
    while end:
        start = start_of[end]
        prefix = prefix_of[end] if end - start > 1 else 0
        groups.append(PrefixGroup(prefix, tuple(order[start:end])))
        end = start
    return groups[::-1]

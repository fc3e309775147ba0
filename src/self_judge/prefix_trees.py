"""Prefix trees: sequences that share a prefix, laid out in rows in which every token stands once.

Pure: token ids in, layouts out. It knows no model, no attention and no torch.
"""

from __future__ import annotations

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


def prefix_rows(
    sequences: Sequence[Sequence[int]], row_tokens: int, attention_cost: float = 0.0
) -> list[Row]:
    """One tree per row, so that the rows together cost least.

    Sequences are sorted, so that a tree is a run of neighbours, and the runs are chosen by dynamic
    programming: a row of L tokens costs `L + attention_cost · L²`. Where two neighbours are put
    into different rows, the prefix they share is computed once more: that is how a tree that would
    be too large, or whose attention across branches would cost more than the prefix, is split.

    Args:
        sequences: token ids, each with at least one token. Equal ones share all their places.
        row_tokens: tokens of a row at most; a longer sequence has a row of its own.
        attention_cost: what one more key costs a token, in units of all its other work.

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
    best, start_of = [0.0], [0]
    for end in range(1, len(arrays) + 1):
        cheapest, begins, tokens = float("inf"), end - 1, 0
        for start in range(end - 1, -1, -1):
            # A row that starts one earlier has that sequence's own tokens more.
            follows = shared[start + 1] if start + 1 < end else 0
            tokens += lengths[start] - follows
            if tokens > row_tokens and start < end - 1:
                break
            cost = best[start] + tokens + attention_cost * tokens * tokens
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
    """Several trees per row, by best-fit decreasing: for attention that skips what no token sees.

    No row gets longer than `row_tokens`, but for one that is longer already.
    """
    bins: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        fitting = [i for i, left in enumerate(room) if left >= len(row)]
        if fitting:
            tightest = min(fitting, key=lambda i: room[i])
            bins[tightest].append(row)
            room[tightest] -= len(row)
        else:
            bins.append([row])
            room.append(row_tokens - len(row))
    return [_one_after_the_other(trees) for trees in bins]


def _one_after_the_other(trees: Sequence[Row]) -> Row:
    starts = np.cumsum([0, *(len(t) for t in trees)]).tolist()
    return Row(
        np.concatenate([t.token_ids for t in trees]),
        np.concatenate([t.positions for t in trees]),
        np.concatenate([t.subtree_ends + s for t, s in zip(trees, starts, strict=False)]),
        {i: p + s for t, s in zip(trees, starts, strict=False) for i, p in t.places.items()},
    )


def batches(rows: Iterable[Row], batch_tokens: int | None, batch_rows: int) -> list[list[Row]]:
    """Rows of like lengths together, longest first, at most so many rows and tokens with padding.

    A row longer than `batch_tokens` is a batch of its own; `None` sets no limit.
    """
    batched: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        last = batched[-1] if batched else []
        fits = batch_tokens is None or (last and (len(last) + 1) * len(last[0]) <= batch_tokens)
        if last and fits and len(last) < batch_rows:
            last.append(row)
        else:
            batched.append([row])
    return batched


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

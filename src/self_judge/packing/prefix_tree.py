"""Prefix trees merge sequences with shared prefixes into rows that contain each shared token once.

This module computes layouts from token ids. It does not depend on models, attention or torch.
"""

# This example shows three sequences, their tree, and the row with the tree in depth-first order:
#
#   0: p q A          p─┬─q─┬─A           index          0  1  2  3  4  5
#   1: p q B C          │   └─B─C         token_ids      p  q  A  B  C  s
#   2: p s              └─s               positions      0  1  2  2  3  1
#                                         subtree_ends   6  5  3  5  5  6
#   9 tokens          6 nodes             places         0: 0 1 2   1: 0 1 3 4   2: 0 5
#
# In the mask, query q (down) attends to key k (across) if `k <= q < subtree_ends[k]`. B attends to
# p and q but not to A, because the subtree of A ends at index 3. Each token therefore attends to
# the same tokens at the same positions as in its own sequence, and the results are the same.
#
#        p q A B C s
#   p    x
#   q    x x
#   A    x x x
#   B    x x . x
#   C    x x . x x
#   s    x . . . . x

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
    """One or more prefix trees with L tokens in depth-first order.

    Token q is token k or one of its descendants if and only if `k <= q < subtree_ends[k]`. One
    number per token therefore defines the whole attention mask.

    Attributes:
        token_ids: the token ids, shape `(L,)`.
        positions: the depth of each token, which is its position in its sequences, `(L,)`.
        subtree_ends: the index after the last descendant of each token, `(L,)`.
        places: maps each sequence index to the indices of its tokens in the row, in order.
    """

    token_ids: Ints
    positions: Ints
    subtree_ends: Ints
    places: dict[int, Ints]

    def __len__(self) -> int:
        return len(self.token_ids)


def shared_length(a: Ints, b: Ints) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


# Two sequences that share at least one twentieth of their tokens are kept in one row. Repeating a
# shorter prefix increases the number of tokens by less than 5%.
_LEAST_SHARED = 20


def prefix_rows(
    sequences: Sequence[Sequence[int]],
    row_tokens: int,
    attention_cost: float = 0.0,
    *,
    split_pairs: bool = False,
) -> list[Row]:
    """Lays out the sequences as rows with one tree each, at the lowest total cost.

    A row of L tokens costs `L + attention_cost · L²`. A tree is split into two rows if it would be
    too large, or if attention across its branches would cost more than repeating its prefix. Both
    rows then compute the shared prefix. Two sequences that share at least a twentieth of their
    tokens are kept in one row, regardless of its length and attention cost.

    Args:
        sequences: the token ids, at least one per sequence. Equal sequences share all their tokens.
        row_tokens: the maximum number of tokens in a row. A pair or a single sequence may be
            longer.
        attention_cost: the cost of one more key for a token, relative to the token's other work.
        split_pairs: whether the limit and the cost also apply to pairs.

    Raises:
        ValueError: a sequence has no tokens, or `row_tokens` is below 1.
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
    # In sorted order, the sequences in any tree are adjacent. A layout is therefore a list of cuts,
    # and dynamic programming finds the cheapest one: best[end] is the lowest cost for the first
    # `end` sequences, over every `start` at which the last row may begin.
    #
    #   sorted      pqA  pqBC  ps         attention_cost 0.2, split_pairs; best[3] is the least of
    #   one row     p q A B C s           best[0] + 6 + 0.2·36 = 13.2
    #   two rows    p q A B C | p s       best[2] + 2 + 0.2·4  = 10.0 + 2.8 = 12.8   <- p twice
    #   two rows    p q A | p q B C s     best[1] + 5 + 0.2·25 = 4.8 + 10.0 = 14.8
    #
    # With attention_cost 0.1, one row is cheaper. It costs 9.6, while `p q A B C | p s` costs
    # 7.5 + 2.4 = 9.9.
    best, start_of = [0.0], [0]
    for end in range(1, len(arrays) + 1):
        cheapest, begins, tokens = float("inf"), end - 1, 0
        for start in range(end - 1, -1, -1):
            # Starting one sequence earlier adds the tokens that this sequence does not share with
            # the next sequence.
            follows = shared[start + 1] if start + 1 < end else 0
            tokens += lengths[start] - follows
            pair = start == end - 2 and not split_pairs
            if tokens > row_tokens and start < end - 1 and not pair:
                break
            cost = tokens + attention_cost * tokens * tokens
            if pair and follows * _LEAST_SHARED >= tokens:
                # A pair never costs more than two rows minus the tokens that sharing saves.
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
    """Builds the tree of sorted sequences; the first sequence contributes all its tokens."""
    # For each sequence, append the tokens after its common prefix with the previous sequence. The
    # rest of the previous path is then complete, and its end is the current length of the row.
    #
    #   sequence   common   appended   path       closed (indices, end)
    #   pqA        0        p q A      0 1 2
    #   pqBC       2        B C        0 1 3 4    [2] ends at 3          (A)
    #   ps         1        s          0 5        [1 3 4] end at 5       (q B C)
    #   the end                                   [0 5] end at 6         (p s)
    tokens: list[Ints] = []
    positions: list[Ints] = []
    path = np.empty(0, dtype=np.int64)  # the row indices of the current sequence's tokens
    closed: list[tuple[Ints, int]] = []
    places: dict[int, Ints] = {}
    length = 0
    for i, array in enumerate(arrays):
        common = shared[i] if i else 0
        closed.append((path[common:], length))  # these tokens have no more descendants
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
    """Puts several trees into each row by best-fit decreasing; trees do not attend to each other.

    Rows do not exceed `row_tokens`, unless a single tree does.
    """
    trees = sorted(rows, key=len, reverse=True)
    return [
        _one_after_the_other([trees[i] for i in own])
        for own in _bins([len(tree) for tree in trees], row_tokens)
    ]


def _bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Packs lengths in descending order into bins by best fit; returns the indices in each bin."""
    # Each length goes to the fullest bin that still has room for it, or to a new bin.
    #
    #   lengths 6 5 3 2 2, room 8      6 -> bin 0 (2 left)    5 -> bin 1 (3 left)
    #   result [0 3] [1 2] [4]         3 -> bin 1 (0 left)    2 -> bin 0 (0 left)    2 -> bin 2
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # sorted pairs (room left in a bin, number of the bin)
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


# The fixed cost of a pass, as a fraction of the cost of `batch_tokens` tokens. Timing only the
# matrix products of a model, with all tokens and with half of them, gives 1/40. Timing a whole
# model on two CPU cores gives 1/12.
_PRICE_OF_A_PASS = 1 / 16


def batches(
    rows: Iterable[Row],
    batch_tokens: int,
    attention_cost: float | None = None,
    *,
    busy_tokens: int = 0,
    one: bool = False,
) -> list[list[Row]]:
    """Groups rows of similar length into passes, longest first, at the lowest padded cost.

    If trees may be joined, all rows in a pass have the same length, and short trees fill the space
    that would otherwise be padding. With a dense mask, the padding would cost as much as these
    trees.

    Args:
        rows: the rows, with one tree each.
        batch_tokens: the maximum number of tokens in a pass, including padding. A longer row gets
            its own pass.
        attention_cost: the attention cost with a dense mask (see `prefix_rows`), or `None` to keep
            rows separate.
        busy_tokens: the number of tokens below which a pass does not become cheaper (see
            `pass_size.busy_tokens`).
        one: whether to put all rows into one pass, regardless of its size. Rows are then joined
            only up to `batch_tokens`.
    """
    ordered = sorted(rows, key=len, reverse=True)
    lengths = [len(row) for row in ordered]
    whole = [(0, len(ordered))]
    cuts = whole if one else _stretches(lengths, batch_tokens, attention_cost, busy_tokens)
    stretches = [ordered[start:end] for start, end in cuts]
    if attention_cost is None:
        return stretches
    return [_filled(own, batch_tokens, attention_cost, one=one) for own in stretches]


def _stretches(
    lengths: Sequence[int], batch_tokens: int, attention_cost: float | None, busy_tokens: int
) -> list[tuple[int, int]]:
    """Cuts sorted lengths into passes at the lowest total cost; returns (start, end) per pass."""
    # This uses the same dynamic programming as `prefix_rows`. A pass from `start` to `end` is
    # padded to the length of its first row, which is the longest, and each pass adds a fixed price.
    #
    #   lengths 100 90 20 18 16, 200 tokens in a pass, no joining, price 200/16 = 12.5
    #   [100 90] [20 18 16]     2·100 + 3·20          = 260 + 2 passes = 285.0    <- chosen
    #   [100] [90 20] [18 16]   1·100 + 2·90 + 2·18   = 316 + 3 passes = 353.5
    #
    # If rows are joined, short rows fill the space of the padding. [90 20 18 16] then counts as
    # max(144, 1·90) tokens instead of 4·90, so [100] [90 20 18 16] costs 244 + 2 passes = 269.0 and
    # is chosen.
    #
    # With `busy_tokens` 150, [20 18 16] costs 150 instead of 60. [100] and [90 20 18 16] also cost
    # 150 each, so these two passes cost 325.0 in total.
    price = _PRICE_OF_A_PASS * batch_tokens
    longest = np.array(lengths, dtype=np.int64)
    tokens = np.concatenate([[0], longest.cumsum()])
    # For each row, the index of the first row that is at most half as long. From this row on, two
    # rows fit into one.
    halves = np.searchsorted(-longest, -(longest // 2))
    best, start_of = np.zeros(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
    for end in range(1, len(tokens)):
        first = min(end - 1, int(np.searchsorted(tokens, tokens[end] - batch_tokens)))
        here = slice(first, end)
        count = end - np.arange(first, end)
        if attention_cost is not None:
            count = np.minimum(count, halves[here] - np.arange(first, end))
        padded = np.maximum(tokens[end] - tokens[here], count * longest[here])
        work = padded * (1 + (attention_cost or 0.0) * longest[here])
        cost = best[here] + np.maximum(work, busy_tokens) + price
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
    """Packs trees into rows with the cheapest common length; a single row needs no padding."""
    # Try increasing row lengths, from the longest tree upward in steps of 10%. Trees of 4, 2 and 2
    # tokens fill two rows of 4, without padding and with less attention than in one row of 8.
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
    """The indices of sequences that share their first `prefix` tokens and are longer than that."""

    prefix: int
    members: tuple[int, ...]


# The maximum number of branches in a group. Larger groups hardly save more work.
_LARGEST_GROUP = 64


def prefix_groups(sequences: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Groups sequences by a shared prefix, so that as few tokens as possible are computed.

    Every sequence keeps at least one token of its own. The groups cover all sequences, including
    duplicates.
    """
    # A KV cache shares one prefix per group instead of a whole tree. The groups are also found by
    # dynamic programming. A group of n adjacent sequences with a common prefix of k tokens saves
    # (n - 1)·k tokens.
    #
    #   pqrA pqrB pD     {pqrA pqrB} + {pD} saves 1·3     {pqrA pqrB pD} saves 2·1
    #                    so: PrefixGroup(3, (0, 1)), PrefixGroup(0, (2,))
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
            # The lowest value saves the most tokens.
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

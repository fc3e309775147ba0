"""Chunked prefill computes the prefix tree of many sequences in chunks, each token only once.

This module computes layouts from token ids. `prefix_tree.py` puts whole trees into rows, while this
module cuts a tree of any size into chunks in depth-first order. The tokens in a chunk attend to
their ancestors in earlier chunks. This module does not depend on models, attention or torch.
"""

# This example shows the tree of `pqA`, `pqBC` and `ps` in chunks of at most 4 tokens. Tokens are
# numbered in the order in which they are computed. A token keeps its number in all chunks and
# calls.
#
#   p0─┬─q1─┬─A2           chunk 0     p0 q1 A2        past -        needed 0 1
#      │    └─B3─C4        chunk 1     B3 C4 s5        past 0 1      needed -
#      └─s5
#
# `past` lists the tokens in earlier chunks that a chunk attends to. Their keys and values precede
# those of the chunk. `needed` lists the tokens computed so far that later chunks attend to. The
# keys and values of all other tokens can be dropped. Chunk 1 has two segments. Its keys are p0 q1
# (the past), then B3 C4 s5 (its own tokens):
#
#                            key     0   1   2   3   4
#                                    p0  q1  B3  C4  s5
#   Segment(0, 2, 2, ((0, 2),))  B3  x   x   x
#                                C4  x   x   x   x
#   Segment(2, 3, 2, ((0, 1),))  s5  x   .   .   .   x

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from self_judge.packing.prefix_tree import Ints, Row, shared_length

_NOTHING: Ints = np.empty(0, dtype=np.int64)


class Segment(NamedTuple):
    """Consecutive tokens in a chunk, each of which follows the previous token in its sequence.

    The tokens attend to the keys in `before` and causally to each other. Key indices count the
    chunk's `past` keys first, then its own tokens.

    Attributes:
        start, stop: the range of the segment within the chunk's tokens.
        past: the number of keys that precede the chunk's own keys.
        before: the key ranges of the segment's ancestors.
    """

    start: int
    stop: int
    past: int
    before: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tree with L tokens in depth-first order.

    Attributes:
        token_ids, positions: the ids and depths of the tokens, each `(L,)`.
        first: the number of the chunk's first token, counted over all calls.
        past: the numbers of the tokens in earlier chunks that the chunk attends to, in order.
        segments: the segments, which define the keys that each token attends to.
        last: maps each sequence that ends in this chunk to the index of its last token.
        needed: the numbers of the tokens computed so far that later chunks attend to.
    """

    token_ids: Ints
    positions: Ints
    first: int
    past: Ints
    segments: tuple[Segment, ...]
    last: dict[int, int]
    needed: Ints


@dataclass(slots=True)
class PrefixIndex:
    """The sorted sequences computed so far, and the numbers of their tokens.

    Attributes:
        count: the number of tokens computed so far.
    """

    # After the example above:   pqA  [0 1 2]     pqBC  [0 1 3 4]     ps  [0 5]     count 6
    # In a sorted list, the sequence with the longest common prefix is always one of the new
    # sequence's two neighbors. The new sequence `pqBD` lies between `pqBC` and `ps`. It reuses
    # tokens 0 1 3 and computes D as token 6.

    sequences: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[Ints] = field(default_factory=list)
    count: int = 0

    def longest_shared(self, sequence: tuple[int, ...]) -> Ints:
        """Returns the token numbers of the longest prefix that has already been computed."""
        place = bisect.bisect_left(self.sequences, sequence)
        ids = np.array(sequence, dtype=np.int64)
        best = _NOTHING
        for near in (place - 1, place):
            if 0 <= near < len(self.sequences):
                known = np.array(self.sequences[near], dtype=np.int64)
                shared = shared_length(ids, known)
                if shared > len(best):
                    best = self.numbers[near][:shared]
        return best

    def add(self, sequences: Iterable[tuple[int, ...]], numbers: Iterable[Ints]) -> None:
        """Adds sequences with their token numbers, replacing the numbers of known sequences."""
        known = dict(zip(self.sequences, self.numbers, strict=True))
        known.update(zip(sequences, numbers, strict=True))
        self.sequences = sorted(known)
        self.numbers = [known[s] for s in self.sequences]

    def only(self, kept: Ints) -> None:
        """Drops every token whose number is not in `kept`, and all tokens that follow it."""
        # With `kept` 0 1 2 3, the index above becomes `p` [0], `pqA` [0 1 2], `pqB` [0 1 3].
        sequences, index = self.sequences, self.numbers
        self.sequences, self.numbers = [], []
        held = [np.isin(numbers, kept) for numbers in index]
        lengths = [len(h) if h.all() else int(h.argmin()) for h in held]
        whole = [(s[:n], p[:n]) for s, p, n in zip(sequences, index, lengths, strict=True) if n]
        self.add([s for s, _ in whole], [p for _, p in whole])


def plan_chunks(
    sequences: Sequence[Sequence[int]], chunk_tokens: int, index: PrefixIndex
) -> list[Chunk]:
    """Cuts the tree of the sequences into chunks of similar size; computed prefixes are left out.

    The last token of every sequence is always included, so that its hidden state is computed.

    Args:
        sequences: the token ids, at least one per sequence. Equal sequences share all their tokens.
        chunk_tokens: the maximum number of tokens in a chunk. A longer sequence gets its own chunk.
        index: the sequences computed so far. The new sequences are added to it.

    Raises:
        ValueError: a sequence has no tokens, or `chunk_tokens` is below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    indices: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequence {i} has no tokens")
        indices.setdefault(tuple(sequence), []).append(i)
    ordered = sorted(indices)
    first = index.count
    numbers: list[Ints] = []
    shared: list[int] = []
    ids = _NOTHING
    # Each sequence reuses the longer of two prefixes: the prefix that it shares with its
    # predecessor in this call, or the prefix that an earlier call computed. Its remaining tokens,
    # `own`, get new numbers.
    #   pqA: own 0 1 2      pqBC: path 0 1, own 3 4      ps: path 0, own 5
    for sequence in ordered:
        before, ids = ids, np.array(sequence, dtype=np.int64)
        path = numbers[-1][: shared_length(before, ids)] if numbers else _NOTHING
        known = index.longest_shared(sequence)
        path = (known if len(known) > len(path) else path)[: len(ids) - 1]
        own = np.arange(index.count, index.count + len(ids) - len(path))
        index.count += len(own)
        numbers.append(np.concatenate([path, own]))
        shared.append(len(path))
    index.add(ordered, numbers)
    lengths = [len(s) - n for s, n in zip(ordered, shared, strict=True)]
    chunks: list[Chunk] = []
    for start, stop in _stretches(lengths, chunk_tokens):
        chosen = range(start, stop)
        chunks.append(
            _chunk(
                [np.array(ordered[i][shared[i] :], dtype=np.int64) for i in chosen],
                numbers[start:stop],
                [indices[ordered[i]] for i in chosen],
                first,
            )
        )
        first += len(chunks[-1].token_ids)
    return _with_needed(chunks)


def _stretches(lengths: Sequence[int], most: int) -> Iterable[tuple[int, int]]:
    """Groups adjacent sequences into stretches of similar size with at most `most` tokens."""
    # The sequences contribute 3, 2 and 1 tokens: `pqA`, `BC` and `s`. With at most 4 tokens per
    # stretch, there are two stretches of about 3 tokens: [3] [2 1].

    def even(tokens: int) -> float:
        return tokens / max(1, -(-tokens // most))

    left = sum(lengths)
    target = even(left)
    start, size = 0, 0
    for i, length in enumerate(lengths):
        if size and (size + length > most or size + length / 2 > target):
            yield start, i
            # Spread the shortfall of one stretch over all following stretches.
            left -= size
            start, size, target = i, 0, even(left)
        size += length
    if start < len(lengths):
        yield start, len(lengths)


def _chunk(
    tokens: Sequence[Ints], numbers: Sequence[Ints], indices: Sequence[Sequence[int]], first: int
) -> Chunk:
    earlier = [n[: len(n) - len(own)] for n, own in zip(numbers, tokens, strict=True)]
    past = np.unique(np.concatenate([n[n < first] for n in earlier]))
    segments: list[Segment] = []
    positions: list[Ints] = []
    last: dict[int, int] = {}
    start = 0
    for own, path, all_numbers, members in zip(tokens, earlier, numbers, indices, strict=True):
        # Convert token numbers to key indices. The index of an earlier token is its rank in `past`,
        # and the chunk's own tokens follow. In chunk 1 above (first 3, past 0 1), tokens 0 1 become
        # keys 0 1 and tokens 3 4 5 become keys 2 3 4.
        keys = np.where(path < first, np.searchsorted(past, path), path - first + len(past))
        stop = start + len(own)
        ranges = _ranges(keys)
        if segments and ranges and ranges[-1][1] == len(past) + start:
            # The tokens continue the previous segment, so merge the two.
            begun = segments.pop()
            segments.append(Segment(begun.start, stop, len(past), begun.before))
        else:
            segments.append(Segment(start, stop, len(past), ranges))
        positions.append(np.arange(len(path), len(all_numbers)))
        last.update(dict.fromkeys(members, stop - 1))
        start = stop
    return Chunk(
        np.concatenate(tokens),
        np.concatenate(positions),
        first,
        past,
        tuple(segments),
        last,
        _NOTHING,
    )


def _with_needed(chunks: Sequence[Chunk]) -> list[Chunk]:
    # The loop goes from the last chunk to the first. `later` collects the `past` of later chunks.
    found: list[Chunk] = []
    later = _NOTHING
    for chunk in reversed(chunks):
        end = chunk.first + len(chunk.token_ids)
        found.append(
            Chunk(
                chunk.token_ids,
                chunk.positions,
                chunk.first,
                chunk.past,
                chunk.segments,
                chunk.last,
                later[later < end],
            )
        )
        later = np.union1d(later, chunk.past)
    return found[::-1]


def segments_of(row: Row) -> tuple[Segment, ...]:
    """Returns the segments that are equivalent to the mask of a row of whole trees."""
    # In depth-first order, a token that is one level deeper than the previous token is the child of
    # that token. Any other depth starts a segment. Row p q A B C s has depths 0 1 2 2 3 1, so its
    # segments are:
    #   p q A (before: nothing)      B C (before: keys 0 to 2, p q)      s (before: keys 0 to 1, p)
    starts = np.flatnonzero(np.diff(row.positions, prepend=-2) != 1).tolist()
    path = _NOTHING
    segments: list[Segment] = []
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        path = path[: row.positions[start]]
        segments.append(Segment(start, stop, 0, _ranges(path)))
        path = np.concatenate([path, np.arange(start, stop)])
    return tuple(segments)


def _ranges(places: Ints) -> tuple[tuple[int, int], ...]:
    # Converts indices to half-open ranges: 0 1 2 5 6 becomes (0, 3) (5, 7).
    if not len(places):
        return ()
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    starts = places[np.concatenate([[0], cuts])]
    stops = places[np.concatenate([cuts - 1, [len(places) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

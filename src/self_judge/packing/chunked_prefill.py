"""Chunked prefill: the one prefix tree of many sequences, in chunks, no token computed twice.

Pure: token ids in, layouts out. `prefix_tree.py` lays whole trees into rows; here a tree of any
size is cut into chunks depth first. A chunk reads the keys and values of its ancestors, which
earlier chunks computed. It knows no model, no attention and no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from self_judge.packing.prefix_tree import Ints, Row, shared_length

_NOTHING: Ints = np.empty(0, dtype=np.int64)


class Segment(NamedTuple):
    """Tokens of a chunk of which each is the only continuation of the one before it.

    They see the keys in `before`, and one another causally. Keys are counted through what the chunk
    was given (`past` of them), then through its own tokens.

    Attributes:
        start, stop: their places among the chunk's tokens.
        past: how many keys stand before the chunk's own.
        before: ranges of keys of their ancestors outside the segment.
    """

    start: int
    stop: int
    past: int
    before: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tokens of a tree, L of them, in depth-first order.

    Attributes:
        token_ids, positions: ids and depths, each `(L,)`.
        first: the number of the first of them among all tokens ever laid out.
        past: numbers of the earlier tokens that they see, in order.
        segments: what each of them sees.
        last: by index of a sequence that ends here, the place of its last token.
        needed: numbers of the tokens so far that later chunks see.
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
    """Sequences that were computed before, and the numbers of their tokens; sorted.

    Attributes:
        count: how many tokens were laid out so far.
    """

    sequences: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[Ints] = field(default_factory=list)
    count: int = 0

    def longest_shared(self, sequence: tuple[int, ...]) -> Ints:
        """The numbers of the longest prefix of a sequence that was computed before."""
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
        """Sequences with their tokens' numbers; one that is there already gets the new ones."""
        known = dict(zip(self.sequences, self.numbers, strict=True))
        known.update(zip(sequences, numbers, strict=True))
        self.sequences = sorted(known)
        self.numbers = [known[s] for s in self.sequences]

    def only(self, kept: Ints) -> None:
        """Forgets every token whose number is not in `kept`, and all that comes after it."""
        sequences, index = self.sequences, self.numbers
        self.sequences, self.numbers = [], []
        held = [np.isin(numbers, kept) for numbers in index]
        lengths = [len(h) if h.all() else int(h.argmin()) for h in held]
        whole = [(s[:n], p[:n]) for s, p, n in zip(sequences, index, lengths, strict=True) if n]
        self.add([s for s, _ in whole], [p for _, p in whole])


def plan_chunks(
    sequences: Sequence[Sequence[int]], chunk_tokens: int, index: PrefixIndex
) -> list[Chunk]:
    """The tree of some sequences, less what was computed before, in chunks of about equal size.

    The last token of every sequence is always laid out, so that its state can be had.

    Args:
        sequences: token ids, each with at least one token. Equal ones share all their places.
        chunk_tokens: tokens of a chunk at most; a longer sequence is a chunk of its own.
        index: what was computed before; afterwards these sequences as well.

    Raises:
        ValueError: a sequence without tokens, or `chunk_tokens` below 1.
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
    """Neighbours together, at most so many tokens, all stretches about equally long."""

    def even(tokens: int) -> float:
        return tokens / max(1, -(-tokens // most))

    left = sum(lengths)
    target = even(left)
    start, size = 0, 0
    for i, length in enumerate(lengths):
        if size and (size + length > most or size + length / 2 > target):
            yield start, i
            # What one stretch has too little is shared by those to come, not left for a last one.
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
        keys = np.where(path < first, np.searchsorted(past, path), path - first + len(past))
        stop = start + len(own)
        ranges = _ranges(keys)
        if segments and ranges and ranges[-1][1] == len(past) + start:
            # It goes on where the segment before it ends: one segment of both.
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
    """The segments of a row of one or more whole trees: it says as much as its attention mask."""
    # In depth-first order a token one deeper than its neighbour is that neighbour's child.
    starts = np.flatnonzero(np.diff(row.positions, prepend=-2) != 1).tolist()
    path = _NOTHING
    segments: list[Segment] = []
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        path = path[: row.positions[start]]
        segments.append(Segment(start, stop, 0, _ranges(path)))
        path = np.concatenate([path, np.arange(start, stop)])
    return tuple(segments)


def _ranges(places: Ints) -> tuple[tuple[int, int], ...]:
    if not len(places):
        return ()
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    starts = places[np.concatenate([[0], cuts])]
    stops = places[np.concatenate([cuts - 1, [len(places) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

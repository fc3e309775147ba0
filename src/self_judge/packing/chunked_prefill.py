"""Prefix walks: the one prefix tree of many sequences, in steps, no token of it computed twice.

Pure: token ids in, layouts out. Where `prefix_tree.py` lays whole trees into rows, a walk goes
through a tree of any size depth first and leans on what earlier steps computed: the keys and values
of a step's ancestors. It knows no model, no attention and no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from self_judge.packing.prefix_tree import Ints, Row, shared_length

_NOTHING: Ints = np.empty(0, dtype=np.int64)


class Run(NamedTuple):
    """Tokens of a step of which each is the only continuation of the one before it.

    They see the keys in `before`, and one another causally. Keys are counted through what the step
    was given (`past` of them), then through its own tokens.

    Attributes:
        start, stop: their places among the step's tokens.
        past: how many keys stand before the step's own.
        before: ranges of keys of their ancestors outside the run.
    """

    start: int
    stop: int
    past: int
    before: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """Some tokens of a tree, L of them, in depth-first order.

    Attributes:
        token_ids, positions: ids and depths, each `(L,)`.
        first: the number of the first of them among all tokens ever laid out.
        past: numbers of the earlier tokens that they see, in order.
        runs: what each of them sees.
        last: by index of a sequence that ends here, the place of its last token.
        needed: numbers of the tokens so far that later steps see.
    """

    token_ids: Ints
    positions: Ints
    first: int
    past: Ints
    runs: tuple[Run, ...]
    last: dict[int, int]
    needed: Ints


@dataclass(slots=True)
class Paths:
    """Sequences that were walked before, and the numbers of their tokens; sorted.

    Attributes:
        count: how many tokens were laid out so far.
    """

    sequences: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[Ints] = field(default_factory=list)
    count: int = 0

    def longest_shared(self, sequence: tuple[int, ...]) -> Ints:
        """The numbers of the longest prefix of a sequence that was walked before."""
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
        sequences, paths = self.sequences, self.numbers
        self.sequences, self.numbers = [], []
        held = [np.isin(numbers, kept) for numbers in paths]
        lengths = [len(h) if h.all() else int(h.argmin()) for h in held]
        whole = [(s[:n], p[:n]) for s, p, n in zip(sequences, paths, lengths, strict=True) if n]
        self.add([s for s, _ in whole], [p for _, p in whole])


def walk(sequences: Sequence[Sequence[int]], step_tokens: int, paths: Paths) -> list[Step]:
    """The tree of some sequences, less what was walked before, in steps of about equal size.

    The last token of every sequence is always laid out, so that its state can be had.

    Args:
        sequences: token ids, each with at least one token. Equal ones share all their places.
        step_tokens: tokens of a step at most; a longer sequence is a step of its own.
        paths: what was walked before; afterwards these sequences as well.

    Raises:
        ValueError: a sequence without tokens, or `step_tokens` below 1.
    """
    if step_tokens < 1:
        raise ValueError(f"step_tokens must be at least 1, got {step_tokens}")
    indices: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequence {i} has no tokens")
        indices.setdefault(tuple(sequence), []).append(i)
    ordered = sorted(indices)
    first = paths.count
    numbers: list[Ints] = []
    shared: list[int] = []
    ids = _NOTHING
    for sequence in ordered:
        before, ids = ids, np.array(sequence, dtype=np.int64)
        path = numbers[-1][: shared_length(before, ids)] if numbers else _NOTHING
        known = paths.longest_shared(sequence)
        path = (known if len(known) > len(path) else path)[: len(ids) - 1]
        own = np.arange(paths.count, paths.count + len(ids) - len(path))
        paths.count += len(own)
        numbers.append(np.concatenate([path, own]))
        shared.append(len(path))
    paths.add(ordered, numbers)
    lengths = [len(s) - n for s, n in zip(ordered, shared, strict=True)]
    steps: list[Step] = []
    for start, stop in _stretches(lengths, step_tokens):
        chosen = range(start, stop)
        steps.append(
            _step(
                [np.array(ordered[i][shared[i] :], dtype=np.int64) for i in chosen],
                numbers[start:stop],
                [indices[ordered[i]] for i in chosen],
                first,
            )
        )
        first += len(steps[-1].token_ids)
    return _with_needed(steps)


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


def _step(
    tokens: Sequence[Ints], numbers: Sequence[Ints], indices: Sequence[Sequence[int]], first: int
) -> Step:
    earlier = [n[: len(n) - len(own)] for n, own in zip(numbers, tokens, strict=True)]
    past = np.unique(np.concatenate([n[n < first] for n in earlier]))
    runs: list[Run] = []
    positions: list[Ints] = []
    last: dict[int, int] = {}
    start = 0
    for own, path, all_numbers, members in zip(tokens, earlier, numbers, indices, strict=True):
        keys = np.where(path < first, np.searchsorted(past, path), path - first + len(past))
        stop = start + len(own)
        ranges = _ranges(keys)
        if runs and ranges and ranges[-1][1] == len(past) + start:
            # It goes on where the run before it ends: one run of both.
            begun = runs.pop()
            runs.append(Run(begun.start, stop, len(past), begun.before))
        else:
            runs.append(Run(start, stop, len(past), ranges))
        positions.append(np.arange(len(path), len(all_numbers)))
        last.update(dict.fromkeys(members, stop - 1))
        start = stop
    return Step(
        np.concatenate(tokens), np.concatenate(positions), first, past, tuple(runs), last, _NOTHING
    )


def _with_needed(steps: Sequence[Step]) -> list[Step]:
    found: list[Step] = []
    later = _NOTHING
    for step in reversed(steps):
        end = step.first + len(step.token_ids)
        found.append(
            Step(
                step.token_ids,
                step.positions,
                step.first,
                step.past,
                step.runs,
                step.last,
                later[later < end],
            )
        )
        later = np.union1d(later, step.past)
    return found[::-1]


def runs_of(row: Row) -> tuple[Run, ...]:
    """The runs of a row of one or more whole trees: it says as much as its attention mask."""
    # In depth-first order a token one deeper than its neighbour is that neighbour's child.
    starts = np.flatnonzero(np.diff(row.positions, prepend=-2) != 1).tolist()
    path = _NOTHING
    runs: list[Run] = []
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        path = path[: row.positions[start]]
        runs.append(Run(start, stop, 0, _ranges(path)))
        path = np.concatenate([path, np.arange(start, stop)])
    return tuple(runs)


def _ranges(places: Ints) -> tuple[tuple[int, int], ...]:
    if not len(places):
        return ()
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    starts = places[np.concatenate([[0], cuts])]
    stops = places[np.concatenate([cuts - 1, [len(places) - 1]])] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))

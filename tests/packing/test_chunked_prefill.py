"""Prefix walks: every token of the tree once, whatever the chunks, and what each of them sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prefix_tree import SEQUENCES, slow_mask

from self_judge.packing.chunked_prefill import Chunk, PrefixIndex, Segment, plan_chunks, segments_of
from self_judge.packing.prefix_tree import joined, prefix_rows
from self_judge.packing.segment_attention import attending


def seen(segment: Segment, keys: int) -> np.ndarray:
    """What the tokens of a segment see, `(segment, keys)`."""
    mask = np.zeros((segment.stop - segment.start, keys), dtype=bool)
    for start, stop in segment.before:
        mask[:, start:stop] = True
    for n in range(segment.stop - segment.start):
        mask[n, segment.past + segment.start : segment.past + segment.start + n + 1] = True
    return mask


class Reader:
    """Follows chunks as attention does: keeps what they say is needed, and reads tokens by it."""

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[int, int]] = {}  # by number: id and depth
        self.laid_out = 0

    def read(self, chunks: Sequence[Chunk], *, forget: bool) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for chunk in chunks:
            own = np.arange(chunk.first, chunk.first + len(chunk.token_ids))
            assert chunk.first == self.laid_out
            self.laid_out += len(own)
            at_hand = [self.tokens[n] for n in chunk.past.tolist()]
            pairs = list(zip(chunk.token_ids.tolist(), chunk.positions.tolist(), strict=True))
            keys = at_hand + pairs
            mask = np.concatenate([seen(segment, len(keys)) for segment in chunk.segments])
            assert [r.stop for r in chunk.segments[:-1]] == [r.start for r in chunk.segments[1:]]
            assert len(mask) == len(own)
            for i, place in chunk.last.items():
                path = [keys[k] for k in mask[place].nonzero()[0]]
                assert [depth for _, depth in path] == list(range(len(path)))
                found[i] = [token for token, _ in path]
            self.tokens.update(zip(own.tolist(), pairs, strict=True))
            assert set(chunk.needed.tolist()) <= set(self.tokens)
            if forget:
                kept = set(chunk.needed.tolist())
                self.tokens = {n: t for n, t in self.tokens.items() if n in kept}
        return found


@given(SEQUENCES, st.integers(1, 40))
def test_every_sequence_is_read_back_through_what_its_last_token_sees(
    sequences: list[list[int]], chunk_tokens: int
) -> None:
    chunks = plan_chunks(sequences, chunk_tokens, PrefixIndex())
    assert Reader().read(chunks, forget=True) == dict(enumerate(sequences))


@given(SEQUENCES, st.integers(1, 40))
def test_every_unique_prefix_is_laid_out_once_whatever_the_steps(
    sequences: list[list[int]], chunk_tokens: int
) -> None:
    chunks = plan_chunks(sequences, chunk_tokens, PrefixIndex())
    prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
    assert sum(len(chunk.token_ids) for chunk in chunks) == len(prefixes)


@given(st.lists(SEQUENCES, min_size=2, max_size=4), st.integers(1, 20))
def test_what_was_walked_before_is_not_laid_out_again_but_for_last_tokens(
    calls: list[list[list[int]]], chunk_tokens: int
) -> None:
    index, reader = PrefixIndex(), Reader()
    known: set[tuple[int, ...]] = set()
    for sequences in calls:
        before = reader.laid_out
        chunks = plan_chunks(sequences, chunk_tokens, index)
        assert reader.read(chunks, forget=False) == dict(enumerate(sequences))
        prefixes = {tuple(s[: n + 1]) for s in sequences for n in range(len(s))}
        again = {tuple(s) for s in sequences} & known
        assert len(prefixes - known) <= reader.laid_out - before <= len(prefixes - known | again)
        known |= prefixes


@given(SEQUENCES, SEQUENCES, st.data())
def test_after_forgetting_only_whole_paths_are_taken_up(
    first: list[list[int]], second: list[list[int]], data: st.DataObject
) -> None:
    index, reader = PrefixIndex(), Reader()
    reader.read(plan_chunks(first, 100, index), forget=False)
    kept = data.draw(st.sets(st.sampled_from(sorted(reader.tokens))))
    reader.tokens = {n: t for n, t in reader.tokens.items() if n in kept}
    index.only(np.array(sorted(kept), dtype=np.int64))
    assert reader.read(plan_chunks(second, 100, index), forget=False) == dict(enumerate(second))


@given(SEQUENCES, st.integers(1, 40))
def test_no_step_is_too_large_but_for_a_single_sequence(
    sequences: list[list[int]], chunk_tokens: int
) -> None:
    for chunk in plan_chunks(sequences, chunk_tokens, PrefixIndex()):
        assert len(chunk.token_ids) <= chunk_tokens or len({*chunk.last.values()}) == 1


def test_steps_are_about_equally_long_rather_than_full_with_a_rest() -> None:
    def lengths(each: int, count: int, chunk_tokens: int) -> list[int]:
        unlike = [[i * 1000 + k for k in range(each)] for i in range(count)]
        return [len(chunk.token_ids) for chunk in plan_chunks(unlike, chunk_tokens, PrefixIndex())]

    assert lengths(10, 10, 60) == [50, 50]
    assert lengths(10, 10, 40) == [30, 40, 30]
    assert lengths(30, 2, 60) == [60]
    assert lengths(10, 5, 50) == [50]
    assert lengths(70, 2, 60) == [70, 70]
    # What two sequences share counts once.
    shared = list(range(40))
    both = plan_chunks([[*shared, *range(50, 55)], [*shared, *range(60, 65)]], 50, PrefixIndex())
    assert [len(chunk.token_ids) for chunk in both] == [50]


def test_only_tokens_forgotten_are_computed_again() -> None:
    index = PrefixIndex()
    [chunk] = plan_chunks([[1, 2, 3, 4], [7, 8]], 100, index)
    index.only(np.arange(len(chunk.token_ids)))
    assert index.sequences == [(1, 2, 3, 4), (7, 8)]
    # The second of three chunks is forgotten, and with it what leans on it.
    index.only(np.array([0, 2, 3, 4, 5]))
    assert index.sequences == [(1,), (7, 8)]
    assert [n.tolist() for n in index.numbers] == [[0], [4, 5]]
    [again] = plan_chunks([[1, 2, 3], [7, 8, 9]], 100, index)
    assert again.token_ids.tolist() == [2, 3, 9]


@given(SEQUENCES, st.integers(1, 40))
def test_the_runs_of_a_row_say_what_its_mask_says(
    sequences: list[list[int]], row_tokens: int
) -> None:
    rows = prefix_rows(sequences, row_tokens)
    for row in [*rows, *joined(rows, 3 * row_tokens)]:
        mask = np.concatenate([seen(segment, len(row)) for segment in segments_of(row)])
        assert (mask == slow_mask(row)).all()


def test_what_cannot_be_walked_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        plan_chunks([[1], []], 10, PrefixIndex())
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        plan_chunks([[1]], 0, PrefixIndex())


def test_keys_that_follow_each_other_are_one_slice() -> None:
    segments = [Segment(0, 3, 4, ((0, 2), (2, 4))), Segment(3, 5, 4, ((0, 2), (4, 6)))]
    first, second = attending(segments, torch.device("cpu"))
    assert first.keys == (slice(0, 7),)
    assert second.keys == (slice(0, 2), slice(4, 6), slice(7, 9))
    assert second.mask is not None
    assert second.mask.tolist() == [[True] * 5 + [False], [True] * 6]

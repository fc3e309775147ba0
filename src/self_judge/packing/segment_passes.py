"""Forward passes with segment attention, for trees in one row and for chunks.

As in `passes.py`, the caller chooses the packing mode, and `packing.py` checks whether it is exact.
Chunks also use keys and values from earlier passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from self_judge.packing.chunked_prefill import Chunk, PrefixIndex, Segment, plan_chunks, segments_of
from self_judge.packing.passes import Pass, Shape, Wanted, pass_over, pass_tokens, stacked
from self_judge.packing.prefix_tree import Ints, joined, prefix_rows
from self_judge.packing.segment_attention import attending
from self_judge.runtime import cache_name, device_of, to_device


def segment_passes(inner: Any, shape: Shape, asked: Wanted) -> Iterator[Pass]:
    """Yields passes like `tree_passes`, but with segments, so trees can share rows for free."""
    most = pass_tokens(inner, shape)
    rows = prefix_rows(asked.sequences, most, split_pairs=shape.split_pairs)
    together = sum(map(len, rows)) if shape.one_pass else most
    for row in joined(rows, together):
        ids, positions, _ = stacked([row])
        yield pass_over(_inputs(inner, ids, positions, segments_of(row)), [row], asked)


def _inputs(
    inner: Any, ids: torch.Tensor, positions: torch.Tensor, segments: Sequence[Segment]
) -> dict[str, Any]:
    device = device_of(inner)
    return {
        "input_ids": to_device(ids, device),
        "position_ids": to_device(positions, device),
        "prefix_segments": attending(segments, device),
    }


# -- chunks ----------------------------------------------------------------------------------------
#
# The chunks from `chunked_prefill.py`, and the keys and values that are kept after each chunk:
#
#   chunk   uses (past)    computes   then keeps (no prefix cache)   then keeps (prefix cache)
#   0       -              0 1 2      0 1   (needed)                 0 1 2
#   1       0 1            3 4 5      -                              0 1 2 3 4 5
#
# Without a prefix cache, only tokens that later chunks attend to are kept. With a prefix cache, all
# tokens are kept for the next call, up to the cache's limit in bytes. Beyond this limit, a new
# chunk keeps only its `needed` tokens.


class _Block(NamedTuple):
    numbers: Ints
    layers: list[tuple[torch.Tensor, torch.Tensor]]


class KeysAndValues:
    """The keys and values in every layer, by token number (see `chunked_prefill.Chunk`)."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    @property
    def numbers(self) -> Ints:
        """The numbers of all stored tokens, in order."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(b.numbers for b in self._blocks)])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for b in self._blocks for layer in b.layers for t in layer)

    def cache(self, numbers: Ints) -> DynamicCache:
        """Returns a cache with the given tokens, in order, to which a model appends new tokens."""
        parts = [p for p in (_chosen(b, numbers) for b in self._blocks) if len(p.numbers)]
        found = sum(len(p.numbers) for p in parts)
        if found != len(numbers):
            raise RuntimeError(f"{len(numbers)} earlier tokens are needed, but {found} are stored")
        cache = DynamicCache()
        for layer, states in enumerate(zip(*(p.layers for p in parts), strict=True)):
            keys, values = (torch.cat(own, dim=2) for own in zip(*states, strict=True))
            cache.update(keys, values, layer)
        return cache

    def add(self, cache: DynamicCache, numbers: Ints) -> None:
        """Stores the tokens that the model has appended to a cache."""
        layers = [(k, v) for k, v, *_ in cache]
        count = len(numbers)
        if count < layers[0][0].shape[2]:
            # Copy them, because a view would keep the whole cache in memory.
            layers = [(k[:, :, -count:].clone(), v[:, :, -count:].clone()) for k, v in layers]
        self._blocks.append(_Block(numbers, layers))

    def only(self, numbers: Ints) -> None:
        """Drops all tokens except the given ones."""
        chosen = [_chosen(b, numbers) for b in self._blocks]
        self._blocks = [b for b in chosen if len(b.numbers)]


def _chosen(block: _Block, numbers: Ints) -> _Block:
    held = np.isin(block.numbers, numbers)
    if held.all():
        return block
    places = to_device(torch.from_numpy(held.nonzero()[0]), block.layers[0][0].device)
    own = [(k.index_select(2, places), v.index_select(2, places)) for k, v in block.layers]
    return _Block(block.numbers[held], own)


@dataclass(slots=True)
class PrefixCache:
    """Stores keys and values from earlier calls for later sequences that share a prefix.

    Attributes:
        limit: the maximum number of bytes of keys and values to keep. The rest is recomputed when
            needed.
    """

    limit: int
    index: PrefixIndex = field(default_factory=PrefixIndex)
    states: KeysAndValues = field(default_factory=KeysAndValues)


def chunked_passes(
    inner: Any, shape: Shape, asked: Wanted, prefix_cache: PrefixCache | None = None
) -> Iterator[Pass]:
    """Yields the passes for all chunks; only the last position in a sequence can be requested.

    Args:
        prefix_cache: the results of earlier calls. The new sequences are added to it.
    """
    index = PrefixIndex() if prefix_cache is None else prefix_cache.index
    states = KeysAndValues() if prefix_cache is None else prefix_cache.states
    chunks = plan_chunks(asked.sequences, pass_tokens(inner, shape), index)
    if prefix_cache is not None and states.nbytes > prefix_cache.limit:
        states.only(np.unique(np.concatenate([chunk.past for chunk in chunks])))
    try:
        for chunk in chunks:
            inputs = _chunk_inputs(inner, chunk)
            cache = states.cache(chunk.past)
            stored = prefix_cache is not None or len(chunk.past) > 0 or len(chunk.needed) > 0
            if stored:
                inputs[cache_name(inner)] = cache
            yield Pass(
                inputs,
                to_device(torch.tensor(list(chunk.last.values())), device_of(inner)),
                torch.tensor([asked.offsets[i] for i in chunk.last]),
            )
            held = states.numbers
            if stored:
                states.add(cache, np.arange(chunk.first, chunk.first + len(chunk.token_ids)))
            if prefix_cache is None:
                states.only(chunk.needed)
            elif states.nbytes > prefix_cache.limit:
                states.only(np.union1d(held, chunk.needed))
    finally:
        # If the consumer stops early, the index must not contain tokens that were not computed.
        index.only(states.numbers)


def _chunk_inputs(inner: Any, chunk: Chunk) -> dict[str, Any]:
    ids, positions = torch.from_numpy(chunk.token_ids), torch.from_numpy(chunk.positions)
    return _inputs(inner, ids[None], positions[None], chunk.segments)

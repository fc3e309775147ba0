"""Segment attention skips most of the scores that the mask of a prefix tree would discard.

With a dense mask, a kernel computes a score for every pair of tokens in a row and discards most of
the scores. Here, each segment of a tree (`chunked_prefill.Segment`) attends to its ancestors and
itself in one call to PyTorch's scaled dot-product attention. The model is called with the segments,
and Transformers' attention interface passes them on to this module. `packing.py` tests whether a
model supports this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from self_judge.packing.chunked_prefill import Segment

NAME = "self_judge_segments"

# This example uses the row from `prefix_tree.py` (`pqA`, `pqBC`, `ps`). It has three segments and
# therefore three calls, each with its own queries and keys. With a dense mask, 36 scores are
# computed. The three calls compute 19:
#
#   key       p q A B C s      call   queries   keys            mask of the call
#   query p   x . .            1      p q A     p q A           x . .
#         q   x x .                                             x x .
#         A   x x x                                             x x x
#         B   x x   x .        2      B C       p q, then B C   x x x .
#         C   x x   x x                                         x x x x
#         s   x         x      3      s         p, then s       none, as s attends to all keys
#
# (x: computed and used, dot: computed and masked, blank: not computed.) In every call, the last
# keys are the queries themselves, so the mask always consists of the last rows of a triangular
# mask.

# PyTorch's kernel skips masked scores in blocks of 512 keys, so it skips few scores in a segment
# with a few hundred tokens. Cutting a segment into pieces of `_PIECE` tokens avoids computing
# scores with the keys of later pieces. For example, a segment of 300 tokens becomes queries 0-127
# with keys 0-127, 128-255 with keys 0-255 and 256-299 with keys 0-299.
_PIECE = 128


@dataclass(frozen=True, slots=True)
class Attending:
    """A piece of a segment, prepared for attention.

    Attributes:
        queries: the range of the piece within the row's tokens.
        keys: the ranges of the keys that the piece attends to. The piece's own range comes last.
        mask: the keys that each token attends to, `(queries, keys)`; `None` for a single token.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None
    _added: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def rows(self, groups: int) -> slice:
        """Returns the range of the piece's query rows: one row per token and head in a group."""
        return slice(groups * self.queries.start, groups * self.queries.stop)

    def added(self, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the mask as an additive bias, with one row per token and head in a group."""
        if self.mask is None:
            return None
        if (groups, dtype) not in self._added:
            forbidden = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            forbidden.masked_fill_(~self.mask, -torch.inf)
            self._added[groups, dtype] = forbidden.repeat_interleave(groups, 0)
        return self._added[groups, dtype]


def attending(
    segments: Sequence[Segment], device: torch.device, piece: int = _PIECE
) -> list[Attending]:
    """Prepares each segment for attention, once for all layers.

    Args:
        piece: the maximum number of queries in one call.
    """
    found = []
    for segment in segments:
        before = [slice(*seen) for seen in segment.before]
        for start in range(segment.start, segment.stop, piece):
            stop = min(start + piece, segment.stop)
            keys = _merged((*before, slice(segment.past + segment.start, segment.past + stop)))
            size = sum(k.stop - k.start for k in keys)
            mask = None
            if stop - start > 1:
                mask = torch.ones(stop - start, size, dtype=torch.bool, device=device)
                mask = mask.tril(size - (stop - start))
            found.append(Attending(slice(start, stop), keys, mask))
    return found


def _merged(places: Sequence[slice]) -> tuple[slice, ...]:
    """Merges adjacent slices, because keys in a single slice need no copy."""
    merged: list[slice] = []
    for place in places:
        if merged and merged[-1].stop == place.start:
            place = slice(merged.pop().start, place.stop)
        merged.append(place)
    return tuple(merged)


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_segments: Sequence[Attending] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention in one layer for a row of L tokens that may attend to earlier chunks.

    Args:
        query: the queries, `(1, H, L, D)`.
        key, value: the keys and values, `(1, H or fewer, past + L, D)`.
        prefix_segments: the segments in the row, in order.

    Returns:
        The attention output, `(1, L, H, D)`, and `None` in place of the attention weights.

    Raises:
        ValueError: the model needs more than plain scaled dot-product attention, or does not pass
            on the segments.
    """
    if prefix_segments is None or softcap is not None or position_bias is not None:
        raise ValueError("the model does not support segment attention")
    shared = key.shape[1]
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = (states.to(computed) for states in (query, key, value))
    if not dropout and _in_one_node(query, key, value):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended: torch.Tensor = _SegmentAttention.apply(query, key, value, prefix_segments, scale)
        return attended, None
    rows = _rows(query.transpose(1, 2), shared, query.dtype)
    groups = query.shape[1] // shared
    pieces = [
        nn.functional.scaled_dot_product_attention(
            rows[:, :, segment.rows(groups)],
            _joined(key, segment.keys),
            _joined(value, segment.keys),
            attn_mask=segment.added(groups, query.dtype),
            dropout_p=dropout,
            scale=scaling,
        )
        for segment in prefix_segments
    ]
    return _tokens(torch.cat(pieces, dim=2), query.shape[1]), None


def _rows(states: torch.Tensor, shared: int, dtype: torch.dtype) -> torch.Tensor:
    """Converts `(1, L, H, D)` to `(1, shared, L * H / shared, D)`, so that token ranges are views.

    Query heads that share a KV head become the rows of one longer head, so keys are not copied for
    each query head.
    """
    # This example has three tokens t0 t1 t2 and four query heads a b c d. Heads a and b share KV
    # head 0, and heads c and d share KV head 1:
    #
    #   t0: a b c d   t1: a b c d   t2: a b c d
    #   KV head 0:    t0a t0b t1a t1b t2a t2b       tokens 1 to 2 are rows 2 to 5 (groups = 2)
    #   KV head 1:    t0c t0d t1c t1d t2c t2d
    split = states.unflatten(2, (shared, -1)).transpose(1, 2)
    rows = split.to(dtype, memory_format=torch.contiguous_format)
    return rows.reshape(1, shared, -1, states.shape[-1])


def _tokens(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverts `_rows` and returns a contiguous tensor, `(1, L, H, D)`."""
    split = rows.unflatten(2, (-1, heads // rows.shape[1])).transpose(1, 2)
    return split.reshape(1, -1, heads, rows.shape[-1]).contiguous()


def _in_one_node(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Returns whether gradients are needed and `_SegmentAttention` can compute them."""
    states = (query, key, value)
    return (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(s.requires_grad for s in states)
        and len({(s.dtype, s.shape[-1]) for s in states}) == 1
        and all(s.stride(-1) == 1 for s in states)
    )


class _SegmentAttention(torch.autograd.Function):
    """Computes attention for all segments in a row as one autograd node, on a CPU.

    With one node per segment, each node would keep a copy of the keys and values that it attends
    to, and its backward pass would allocate gradients for all of them. A single node keeps them
    only once and accumulates their gradients in place.
    """

    # This example shows the backward pass for the row p q A B C s. Every query takes part in one
    # call, and every key in one or more calls:
    #
    #   call 1   queries p q A   keys p q A       gradient of keys:   p  q  A  B  C  s
    #   call 2   queries B C     keys p q B C       call 1 adds to    x  x  x
    #   call 3   queries s       keys p s           call 2 adds to    x  x     x  x
    #                                               call 3 adds to    x              x
    #
    # The gradient of each query is set once: `for_rows[piece] = ...`. The gradients of keys and
    # values are summed over calls: `whole[range] += part`, where `part` is the gradient from one
    # call for one key range. With the log-sum-exp of each query, the kernel can recompute the
    # attention weights instead of storing them.

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Sequence[Attending],
        scale: float,
    ) -> torch.Tensor:
        shared, groups = key.shape[1], query.shape[1] // key.shape[1]
        rows = _rows(query.transpose(1, 2), shared, query.dtype)
        attended = query.new_empty(query.transpose(1, 2).shape)
        split = attended.unflatten(2, (shared, groups)).transpose(1, 2)
        sums = []
        for segment in segments:
            piece, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows[:, :, segment.rows(groups)],
                _joined(key, segment.keys),
                _joined(value, segment.keys),
                attn_mask=segment.added(groups, query.dtype),
                scale=scale,
            )
            split[:, :, segment.queries] = piece.unflatten(2, (-1, groups))
            sums.append(logsumexp)
        ctx.save_for_backward(rows, key, value, attended, *sums)
        ctx.segments, ctx.scale = segments, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, key, value, attended, *sums = ctx.saved_tensors
        shared, heads = key.shape[1], attended.shape[2]
        # For half-precision tensors, the float32 kernel is faster, and gradients are rounded only
        # once instead of once per segment.
        dtype = torch.promote_types(key.dtype, torch.float32)
        given, own = rows.dtype, rows.to(dtype)
        keys, values = key.to(dtype), value.to(dtype)
        results, pulls = (_rows(s, shared, dtype) for s in (attended, pull))
        for_rows, for_keys, for_values = (torch.zeros_like(s) for s in (own, keys, values))
        groups = heads // shared
        for segment, logsumexp in zip(ctx.segments, sums, strict=True):
            place = segment.rows(groups)
            for_piece, *for_seen = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    pulls[:, :, place],
                    own[:, :, place],
                    _joined(keys, segment.keys),
                    _joined(values, segment.keys),
                    results[:, :, place],
                    logsumexp,
                    0.0,
                    False,
                    attn_mask=segment.added(groups, dtype),
                    scale=ctx.scale,
                )
            )
            for_rows[:, :, place] = for_piece
            sizes = [k.stop - k.start for k in segment.keys]
            for whole, seen in zip((for_keys, for_values), for_seen, strict=True):
                for k, part in zip(segment.keys, seen.split(sizes, dim=2), strict=True):
                    whole[:, :, k] += part
        for_query = _tokens(for_rows, heads).transpose(1, 2)
        return for_query.to(given), for_keys.to(given), for_values.to(given), None, None


def _joined(states: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
    parts = [states[:, :, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


AttentionInterface.register(NAME, segment_attention)


@contextmanager
def attending_by_segments(inner: Any) -> Iterator[None]:
    """Makes a causal language model use segment attention within the block."""
    usual = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(usual)

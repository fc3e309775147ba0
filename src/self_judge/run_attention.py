"""Attention run by run: what a prefix tree's mask allows, and nothing that it forbids, is computed.

A dense mask has a kernel compute every pair of tokens of a row and throw most of them away. Here
each run of a tree (`prefix_walks.Run`) meets its ancestors and itself in one call of PyTorch's
scaled dot-product attention. Transformers' attention interface hands it the runs that the model was
called with; whether a model passes them on is tried in `packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from self_judge.prefix_walks import Run

NAME = "self_judge_runs"


# PyTorch's kernel skips what a causal mask forbids in blocks of 512 keys, hence hardly anywhere in
# a run of a few hundred tokens. Queries in pieces of this size meet no key after them.
_PIECE = 128


@dataclass(frozen=True, slots=True)
class Attending:
    """A piece of a run as attention needs it.

    Attributes:
        queries: its place among the row's tokens.
        keys: the places of what it sees, itself last.
        mask: what of that each token sees, `(queries, keys)`; `None` for a single token.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None
    _added: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def added(self, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as numbers to add, once per group of heads; the same one for all layers."""
        if self.mask is None:
            return None
        if (groups, dtype) not in self._added:
            forbidden = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            forbidden.masked_fill_(~self.mask, -torch.inf)
            self._added[groups, dtype] = forbidden.repeat(groups, 1)
        return self._added[groups, dtype]


def attending(runs: Sequence[Run], device: torch.device, piece: int = _PIECE) -> list[Attending]:
    """What attention needs of each run, made once for all layers.

    Args:
        piece: queries of one call at most.
    """
    found = []
    for run in runs:
        before = [slice(*seen) for seen in run.before]
        for start in range(run.start, run.stop, piece):
            stop = min(start + piece, run.stop)
            keys = _merged((*before, slice(run.past + run.start, run.past + stop)))
            size = sum(k.stop - k.start for k in keys)
            mask = None
            if stop - start > 1:
                mask = torch.ones(stop - start, size, dtype=torch.bool, device=device)
                mask = mask.tril(size - (stop - start))
            found.append(Attending(slice(start, stop), keys, mask))
    return found


def _merged(places: Sequence[slice]) -> tuple[slice, ...]:
    """The same places in fewer slices where they follow each other: one slice copies nothing."""
    merged: list[slice] = []
    for place in places:
        if merged and merged[-1].stop == place.start:
            place = slice(merged.pop().start, place.stop)
        merged.append(place)
    return tuple(merged)


def run_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prefix_runs: Sequence[Attending] | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention over one row of L tokens, after the keys of earlier steps.

    Args:
        query: `(1, H, L, D)`.
        key, value: `(1, H or fewer, past + L, D)`.
        prefix_runs: the runs of the row, in order.

    Returns:
        The attended values, `(1, L, H, D)`, and no weights.

    Raises:
        ValueError: what plain scaled dot-product attention does not do, or a model that did not
            pass the runs on.
    """
    if prefix_runs is None or softcap is not None or position_bias is not None:
        raise ValueError("the model does not attend by runs")
    batch, heads, _, size = query.shape
    # Heads that share keys and values follow each other: stood end to end they are one head with
    # more queries, and nothing is copied for each of them.
    shared = key.shape[1]
    groups = heads // shared
    attended = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, run.queries].reshape(batch, shared, -1, size),
            _joined(key, run.keys),
            _joined(value, run.keys),
            attn_mask=run.added(groups, query.dtype),
            dropout_p=dropout,
            scale=scaling,
        ).reshape(batch, heads, -1, value.shape[-1])
        for run in prefix_runs
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _joined(states: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
    parts = [states[:, :, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


AttentionInterface.register(NAME, run_attention)


@contextmanager
def attending_by_runs(inner: Any) -> Iterator[None]:
    """Has a causal language model attend by the runs it is called with, within the block."""
    usual = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(usual)

"""FlexAttention over prefix trees: block masks, and attention that is compiled or refused.

Transformers hands every attention mask to the function registered under `flex_attention`. Here
that function takes the masks of trees; all other masks go to Transformers' own integration as
before. Where PyTorch cannot compile FlexAttention it falls back to one that materialises every
score; this one raises `UnfusedError` there. It does not know what the sequences are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

NAME = "flex_attention"
_BLOCK = 128
# Dynamo compiles again for sizes of 1. With one row per pass and at least two blocks per row it
# meets one kind of size, and each kind of model costs one graph (two with gradients).
ROW_MULTIPLE = 2 * _BLOCK
_LEAST_HEAD_ON_CUDA = 16
_INSTEAD = "set model.attn_implementation: sdpa"


class UnfusedError(ValueError):
    """FlexAttention has no fused kernel here; the message says why and what to do."""


class TreeBlocks(BlockMask):
    """The block mask of a row of prefix trees."""


def tree_blocks(ends_L: torch.Tensor) -> TreeBlocks:
    """What each token of one row may see, its ancestors and itself, in blocks of 128 × 128.

    The blocks follow from the ends alone: no mask of `L × L` is made.

    Args:
        ends_L: `Row.subtree_ends`, L a multiple of 128.
    """
    # The token at q sees the token at k if k ≤ q < end(k). A block of queries that starts at s
    # sees something of an earlier block of keys if the largest end there is above s, and all of it
    # if every end there is at least s + 128. In its own block a token sees at least itself.
    starts = torch.arange(0, len(ends_L), _BLOCK, device=ends_L.device)
    ends = ends_L.view(-1, _BLOCK)
    before = starts[None, :] < starts[:, None]
    full = before & (ends.amin(-1)[None, :] >= starts[:, None] + _BLOCK)
    seen = before & (ends.amax(-1)[None, :] > starts[:, None])
    own = torch.eye(len(starts), dtype=torch.bool, device=ends_L.device)

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q < ends_L[k])

    return TreeBlocks.from_kv_blocks(
        *_ordered((seen & ~full) | own), *_ordered(full), BLOCK_SIZE=_BLOCK, mask_mod=sees
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By row of blocks: how many are set, and their columns first; batch and heads have size 1."""
    columns = torch.argsort(blocks.int(), stable=True, dim=-1, descending=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def refusal(inner: Any, device: torch.device) -> str | None:
    """Why FlexAttention cannot compute a model's trees on a device; `None` if it may be tried."""
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if device.type == "cuda" and size < _LEAST_HEAD_ON_CUDA:
        return f"FlexAttention on CUDA takes heads of at least {_LEAST_HEAD_ON_CUDA}, not {size}"
    return None


@contextmanager
def sdpa_instead(inner: Any) -> Iterator[None]:
    """Has a model with FlexAttention attend by SDPA within the block; does nothing to others.

    Transformers' own FlexAttention is compiled for every new kind of length, which a comparison of
    a few short sequences is not worth.
    """
    usual = inner.config._attn_implementation
    if usual != NAME:
        yield
        return
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(usual)


def tree_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer's attention over a row of trees of L tokens; other masks go to Transformers.

    Neither the forward nor the backward pass has been run on CUDA. On a CPU there is no backward
    pass.

    Args:
        query: `(1, H, L, D)`.
        key, value: `(1, H or fewer, L, D)`.
        attention_mask: `TreeBlocks`, or what Transformers made.
        others: what the model adds for other kinds of attention.

    Returns:
        The attended values, `(1, L, H, D)`, and no weights.

    Raises:
        UnfusedError: PyTorch cannot compile it here, or is told not to.
        ValueError: dropout, soft-capped scores, a bias or attention sinks; gradients on a CPU.
    """
    if not isinstance(attention_mask, TreeBlocks):
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    asked = {
        "dropout": others.get("dropout", 0.0) > 0,
        "soft-capped scores": others.get("softcap") is not None,
        "position biases": others.get("position_bias") is not None,
        "attention sinks": others.get("s_aux") is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"FlexAttention over trees has no {what}: {_INSTEAD} or eager")
    device = query.device.type
    trained = torch.is_grad_enabled() and any(s.requires_grad for s in (query, key, value))
    if trained and device == "cpu":
        raise ValueError(f"FlexAttention has no backward pass on a CPU: {_INSTEAD}")
    if torch.is_autocast_enabled(device):  # as scaled dot-product attention does by itself
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads = query.shape[1]
    if heads & (heads - 1):  # its kernels share keys among heads by powers of two only
        key, value = (s.repeat_interleave(heads // s.shape[1], dim=1) for s in (key, value))
    for states in (query, key, value):
        # Known as heads and head sizes, they are not taken for lengths that happen to be equal.
        torch._dynamo.mark_static(states, 1)
        torch._dynamo.mark_static(states, 3)
    # Autocast's state would be part of what is compiled.
    with torch.autocast(device, enabled=False):
        attended = _compiled_or_refused(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: TreeBlocks,
    scaling: float | None,
) -> Any:
    # Whatever has PyTorch run this as plain Python would have it materialise the scores.
    if not torch.compiler.is_dynamo_compiling():
        raise UnfusedError(f"FlexAttention is not compiled, torch.compile is off here: {_INSTEAD}")
    shared = key.shape[1] != query.shape[1]
    return flex_attention(
        query, key, value, block_mask=blocks, scale=scaling, enable_gqa=shared
    )  # fmt: skip


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # The whole graph or an error: without `fullgraph` PyTorch goes on uncompiled at its limit of
    # recompilations.
    return torch.compile(_fused, dynamic=True, fullgraph=True)


def _compiled_or_refused(*given: Any) -> torch.Tensor:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return _compiled()(*given)
    except FailOnRecompileLimitHit as error:
        raise UnfusedError(
            "FlexAttention was compiled for as many kinds of models in this process as "
            f"torch._dynamo.config.recompile_limit allows: raise that limit, or {_INSTEAD}"
        ) from error
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UnfusedError(
            f"FlexAttention cannot be compiled here ({type(error).__name__}: {reason:.200}): "
            f"{_INSTEAD}"
        ) from error


AttentionInterface.register(NAME, tree_attention)

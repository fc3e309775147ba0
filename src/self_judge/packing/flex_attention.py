"""FlexAttention over prefix trees: block masks, and attention that is compiled or refused.

Transformers passes every attention mask to the function registered as `flex_attention`. The
function here handles the masks of trees; all other masks go to Transformers' own integration. Where
PyTorch cannot compile FlexAttention, it falls back to a version that materialises every score; this
one raises `UnfusedError` instead. It does not know what the sequences are.
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
# Dynamo compiles again for sizes of 1. With one row per pass and at least two blocks per row, all
# sizes are of one kind, and each kind of model costs one graph (two with gradients).
ROW_MULTIPLE = 2 * _BLOCK
_LEAST_HEAD_ON_CUDA = 16
_INSTEAD = "set model.attn_implementation: sdpa"


class UnfusedError(ValueError):
    """FlexAttention has no fused kernel here; the message says why and what to do about it."""


class TreeBlocks(BlockMask):
    """The block mask of a row of prefix trees."""


def tree_blocks(ends_L: torch.Tensor) -> TreeBlocks:
    """The mask of one row, in which each token sees its ancestors and itself, in 128 × 128 blocks.

    The blocks follow from the ends alone: no `L × L` mask is made.

    Args:
        ends_L: `Row.subtree_ends`, L a multiple of 128.
    """
    # The token at q sees the token at k if k ≤ q < end(k). A block of queries that starts at s sees
    # some of an earlier block of keys if the largest end there is above s, and all of it if every
    # end there is at least s + 128. In its own block a token sees at least itself. For example, a
    # root of 128 tokens (end 384) with two branches of 128 (ends 256 and 384):
    #
    #   keys            root    a       b
    #   queries root    own
    #           a       full    own             own: partial, computed with the mask
    #           b       full    -       own     full: computed without it      -: skipped
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
    """For each row of blocks: the number set, and their columns first; batch and heads are 1."""
    columns = torch.argsort(blocks.int(), stable=True, dim=-1, descending=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def refusal(inner: Any, device: torch.device) -> str | None:
    """The reason FlexAttention cannot compute a model's trees on a device; `None` to try it."""
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if device.type == "cuda" and size < _LEAST_HEAD_ON_CUDA:
        return f"FlexAttention on CUDA needs heads of at least {_LEAST_HEAD_ON_CUDA}, not {size}"
    return None


@contextmanager
def sdpa_instead(inner: Any) -> Iterator[None]:
    """Within the block, a model with FlexAttention uses SDPA; other models are unchanged.

    Transformers' own FlexAttention compiles for every new kind of length, which does not pay off
    for a comparison of a few short sequences.
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

    Neither the forward nor the backward pass has been run on CUDA. There is no backward pass on a
    CPU.

    Args:
        query: `(1, H, L, D)`.
        key, value: `(1, H or fewer, L, D)`.
        attention_mask: `TreeBlocks`, or a mask that Transformers made.
        others: further arguments of the model for other kinds of attention.

    Returns:
        The attended values, `(1, L, H, D)`, and no weights.

    Raises:
        UnfusedError: PyTorch cannot compile it here, or torch.compile is off.
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
    if heads & (heads - 1):  # its kernels share keys only among powers of two of heads
        key, value = (s.repeat_interleave(heads // s.shape[1], dim=1) for s in (key, value))
    for states in (query, key, value):
        # Static sizes keep Dynamo from confusing heads with lengths that happen to be equal.
        torch._dynamo.mark_static(states, 1)
        torch._dynamo.mark_static(states, 3)
    # The state of autocast would become part of the compiled graph.
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
    # Run as plain Python, FlexAttention would materialise the scores.
    if not torch.compiler.is_dynamo_compiling():
        raise UnfusedError(f"FlexAttention needs torch.compile, which is off here: {_INSTEAD}")
    shared = key.shape[1] != query.shape[1]
    return flex_attention(
        query, key, value, block_mask=blocks, scale=scaling, enable_gqa=shared
    )  # fmt: skip


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # Without `fullgraph`, PyTorch silently continues uncompiled at its limit of recompilations.
    return torch.compile(_fused, dynamic=True, fullgraph=True)


def _compiled_or_refused(*given: Any) -> torch.Tensor:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return _compiled()(*given)
    except FailOnRecompileLimitHit as error:
        raise UnfusedError(
            "this process reached torch._dynamo.config.recompile_limit for kinds of models with "
            f"FlexAttention: raise that limit, or {_INSTEAD}"
        ) from error
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UnfusedError(
            f"FlexAttention cannot be compiled here ({type(error).__name__}: {reason:.200}): "
            f"{_INSTEAD}"
        ) from error


AttentionInterface.register(NAME, tree_attention)

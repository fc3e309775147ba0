"""FlexAttention for prefix trees: block masks and compiled attention.

Transformers passes every attention mask to the function registered as `flex_attention`. This module
registers a function that handles the masks for trees and passes all other masks to Transformers'
own integration. If PyTorch cannot compile FlexAttention, it falls back to a version that
materializes every score. This module raises `UnfusedError` instead.
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
# Dynamo compiles a new graph when a size changes to 1. With one row per pass and at least two
# blocks per row, this does not happen, and each kind of model needs one graph (two with gradients).
ROW_MULTIPLE = 2 * _BLOCK
_LEAST_HEAD_ON_CUDA = 16
_INSTEAD = "set model.attn_implementation: sdpa"


class UnfusedError(ValueError):
    """Raised when FlexAttention has no fused kernel. The message gives the reason and a fix."""


class TreeBlocks(BlockMask):
    """The block mask for a row of prefix trees."""


def tree_blocks(ends_L: torch.Tensor) -> TreeBlocks:
    """Builds the mask for a row in 128 × 128 blocks; tokens attend to ancestors and themselves.

    The blocks are computed from the subtree ends, without an `L × L` mask.

    Args:
        ends_L: `Row.subtree_ends`, where L is a multiple of 128.
    """
    # The token at q attends to the token at k if k ≤ q < end(k). A block of queries that starts at
    # s attends to at least part of an earlier block of keys if the largest end in the block of keys
    # is greater than s. It attends to the whole block of keys if all ends are at least s + 128. In
    # its own block, a token attends at least to itself. This example has a root of 128 tokens (end
    # 384) and two branches of 128 tokens (ends 256 and 384):
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
    """Returns the number of set blocks per row, and the columns with those of set blocks first."""
    columns = torch.argsort(blocks.int(), stable=True, dim=-1, descending=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def refusal(inner: Any, device: torch.device) -> str | None:
    """Returns why FlexAttention cannot run a model on a device, or `None` if it may work."""
    config = inner.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    if device.type == "cuda" and size < _LEAST_HEAD_ON_CUDA:
        least = _LEAST_HEAD_ON_CUDA
        return f"FlexAttention on CUDA requires a head size of at least {least}, got {size}"
    return None


@contextmanager
def sdpa_instead(inner: Any) -> Iterator[None]:
    """Makes a model with FlexAttention use SDPA within the block; other models are unchanged.

    Transformers' own integration recompiles for new lengths, which takes too long for a comparison
    of a few short sequences.
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
    """Computes attention for a row of trees in one layer; other masks go to Transformers.

    There is no backward pass on a CPU.

    Args:
        query: the queries of the L tokens, `(1, H, L, D)`.
        key, value: `(1, H or fewer, L, D)`.
        attention_mask: `TreeBlocks`, or a mask created by Transformers.
        others: additional arguments from the model for other kinds of attention.

    Returns:
        The attention output, `(1, L, H, D)`, and `None` in place of the attention weights.

    Raises:
        UnfusedError: PyTorch cannot compile FlexAttention here, or torch.compile is disabled.
        ValueError: the model uses dropout, soft-capped scores, position biases or attention sinks,
            or needs gradients on a CPU.
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
            raise ValueError(
                f"FlexAttention over trees does not support {what}: {_INSTEAD} or eager"
            )
    device = query.device.type
    trained = torch.is_grad_enabled() and any(s.requires_grad for s in (query, key, value))
    if trained and device == "cpu":
        raise ValueError(f"FlexAttention has no backward pass on a CPU: {_INSTEAD}")
    if torch.is_autocast_enabled(device):  # as scaled dot-product attention does
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads = query.shape[1]
    if heads & (heads - 1):  # the kernels support GQA only with 2^n query heads
        key, value = (s.repeat_interleave(heads // s.shape[1], dim=1) for s in (key, value))
    for states in (query, key, value):
        # Static sizes prevent Dynamo from confusing a number of heads with an equal length.
        torch._dynamo.mark_static(states, 1)
        torch._dynamo.mark_static(states, 3)
    # Without this, the autocast state would become part of the compiled graph.
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
    # Without compilation, FlexAttention would materialize the scores.
    if not torch.compiler.is_dynamo_compiling():
        raise UnfusedError(f"FlexAttention needs torch.compile, which is disabled here: {_INSTEAD}")
    shared = key.shape[1] != query.shape[1]
    return flex_attention(
        query, key, value, block_mask=blocks, scale=scaling, enable_gqa=shared
    )  # fmt: skip


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # Without `fullgraph`, PyTorch silently runs uncompiled code once it reaches its recompilation
    # limit.
    return torch.compile(_fused, dynamic=True, fullgraph=True)


def _compiled_or_refused(*given: Any) -> torch.Tensor:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        return _compiled()(*given)
    except FailOnRecompileLimitHit as error:
        raise UnfusedError(
            "FlexAttention reached torch._dynamo.config.recompile_limit while compiling for this "
            f"model: raise the limit, or {_INSTEAD}"
        ) from error
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UnfusedError(
            f"FlexAttention cannot be compiled here ({type(error).__name__}: {reason:.200}): "
            f"{_INSTEAD}"
        ) from error


AttentionInterface.register(NAME, tree_attention)

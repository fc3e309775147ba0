"""Runs a decoding step as a CUDA graph, with one launch instead of one launch per kernel.

This module prepares a step for capture. It does not depend on the sampling method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from self_judge.runtime import cache_name, unwrapped

_TOKENS = 256  # the width of the cache view is rounded up to a multiple of this


class GraphedStep:
    """A decoding step that CUDA launches as one graph; other devices run it without a graph.

    A graph always runs the same kernels on the same memory. Every shape is therefore fixed, and the
    index of the next token is stored on the device.

    Args:
        cache: a cache in which all layers are `RoomyLayer`.
        ids_BT, seen_BT: the tokens and the mask for all rows, at full width. The caller writes new
            tokens into `ids_BT`.
        lengths_B1: the number of tokens in the prompt of each row.
        longest: the number of tokens in the longest prompt.
    """

    # For prompts with 300 tokens and 300 new tokens, the steps at indices 300 … 511 attend to 512
    # tokens, and later steps attend to 600 tokens. The first step with a new width runs without a
    # graph, because it creates library handles and casts weights for autocast. A capture must not
    # include either operation. The second step is captured as a graph, which is replayed for that
    # step and all further steps.

    def __init__(
        self,
        model: nn.Module,
        cache: Any,
        ids_BT: torch.Tensor,
        seen_BT: torch.Tensor,
        lengths_B1: torch.Tensor,
        longest: int,
    ) -> None:
        self.model, self.cache = model, cache
        self.ids_BT, self.seen_BT = ids_BT, seen_BT.bool()
        self.lengths_B1, self.longest = lengths_B1, longest
        self.at_1 = torch.zeros(1, dtype=torch.long, device=ids_BT.device)
        self.place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        self.width = 0
        self.graph: Any = None
        self.logits_BV: torch.Tensor

    def __call__(self, at: int) -> torch.Tensor:
        """Returns the logits `(B, V)` that follow index `at`; the next call overwrites them."""
        self.at_1.fill_(at)
        width = min(-(-(at + 1) // _TOKENS) * _TOKENS, self.ids_BT.shape[1])
        if width != self.width:
            self.width, self.graph = width, None
            for layer in self.cache.layers:
                layer.keep_width(width, self.at_1)
            return self._step()
        if not self.at_1.is_cuda:
            return self._step()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with _capturing(graph):
                self.logits_BV = self._step()
            self.graph = graph
        self.graph.replay()
        return self.logits_BV

    def _step(self) -> torch.Tensor:
        seen = self.seen_BT[:, : self.width] & (self.place_T[: self.width] <= self.at_1)
        output = self.model(
            input_ids=self.ids_BT.index_select(1, self.at_1),
            attention_mask=seen[:, None, None],
            position_ids=self.lengths_B1 + (self.at_1 - self.longest),
            use_cache=True,
            **{cache_name(unwrapped(self.model)): self.cache},
        )
        return output.logits[:, -1]


@contextlib.contextmanager
def _capturing(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Captures the block as a CUDA graph, and restores PyTorch's state if the capture fails."""
    # After a failed capture, PyTorch would still use the capture's stream, allocate memory in the
    # graph's pool, and draw random numbers as if a capture were in progress. The next dropout layer
    # would raise an error.
    device = torch.cuda.current_device()
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        generator: Any = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        with contextlib.suppress(RuntimeError):  # the pool is already closed
            torch._C._cuda_endAllocateToPool(device, pool)
        raise

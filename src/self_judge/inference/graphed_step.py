"""A decoding step as a CUDA graph: one launch instead of one for each kernel.

It knows how a step is made ready for a capture. It does not know how tokens are drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_TOKENS = 256  # a graph attends to a multiple of these


class GraphedStep:
    """A decoding step that CUDA launches as one graph; elsewhere, the same step without a graph.

    A graph repeats kernels on the same memory. So every shape is fixed, and the place of the next
    token lies on the device.

    Args:
        cache: all layers are `RoomyLayer`.
        ids_BT, seen_BT: tokens and mask of all rows, in full width; the caller writes new tokens.
        lengths_B1: the number of tokens in each row's prompt.
        longest: the most of them.
    """

    # Prompts of 300 tokens and 300 new ones: the steps at places 300 … 511 attend to 512 tokens,
    # later ones to 600. The first step of a width runs as usual, and makes what a capture must not
    # (handles, weights cast by autocast); the second is captured; the rest are replayed.

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
        """The logits `(B, V)` after the tokens at place `at`; valid until the next call."""
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
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits_BV = self._step()
        self.graph.replay()
        return self.logits_BV

    def _step(self) -> torch.Tensor:
        seen = self.seen_BT[:, : self.width] & (self.place_T[: self.width] <= self.at_1)
        output = self.model(
            input_ids=self.ids_BT.index_select(1, self.at_1),
            attention_mask=seen[:, None, None],
            position_ids=self.lengths_B1 + (self.at_1 - self.longest),
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

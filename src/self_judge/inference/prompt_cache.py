"""The KV cache for decoding. Each row stores its prompt and has room for new tokens.

This module handles keys and values. It does not depend on the model or the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from self_judge.runtime import unwrapped


class PromptLayer(DynamicLayer):
    """The keys and values of prompts, in the dtype that attention uses.

    Under autocast, keys are float32 after rotary embedding. A `DynamicLayer` would then convert the
    values to float32 as well, and attention would round both at every step.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def empty_cache(model: nn.Module) -> Any:
    cache = DynamicCache(config=unwrapped(model).config)  # type: ignore[arg-type]
    cache.layers = [PromptLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def keeps_all_tokens(model: nn.Module) -> bool:
    """Returns whether every layer of the model's cache keeps the keys and values of all tokens."""
    return all(type(layer) is PromptLayer for layer in empty_cache(model).layers)


class RoomyLayer(DynamicLayer):
    """A cache layer with room for future tokens. If rows are removed, the others move up in place.

    The memory for a batch is allocated only once. The buffer does not grow, and removing rows does
    not require a second cache.

    Args:
        rooms: the buffers for keys and values, `(B, H, tokens, D)` each.
        length: the number of tokens that the buffers already contain.
    """

    # The buffers in `rooms` own the memory. `keys` and `values` are views of their first rows and
    # tokens:
    #
    #   start               update               batch_select_indices([0, 2])
    #   0 1 2|. . .         0 1 2 a|. .          0 1 2 a|. .     keys[:2] = keys[[0, 2]]
    #   3 4 5|. . .         3 4 5 b|. .          6 7 8 c|. .     the third row of the buffer is
    #   6 7 8|. . .         6 7 8 c|. .          ─────────       unused until the batch ends

    keys: torch.Tensor
    values: torch.Tensor
    at_1: torch.Tensor | None = None  # index of the next token, if the views have a fixed width

    def __init__(self, rooms: Sequence[torch.Tensor], length: int) -> None:
        super().__init__()
        self.lazy_initialization(*rooms)
        self._take(rooms, length)

    def keep_width(self, width: int, at_1: torch.Tensor) -> None:
        """Fixes the views at `width` tokens. Each update then writes its token at index `at_1`."""
        if self.at_1 is None:  # masked values are multiplied by 0, so they must be finite
            for room in self.rooms:
                room[:, :, self.keys.shape[-2] :].zero_()
        self.at_1 = at_1
        self._take(self.rooms, width)

    def _take(self, rooms: Sequence[torch.Tensor], length: int) -> None:
        self.rooms = rooms
        self.keys, self.values = (room[:, :, :length] for room in rooms)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at_1 is not None:
            for own, states in ((self.keys, key_states), (self.values, value_states)):
                own.index_copy_(2, self.at_1, states.to(own.dtype))
            return self.keys, self.values
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self._take(self.rooms, after)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for states in (self.keys, self.values):
            states[: len(indices)] = states[indices]
        self._take([room[: len(indices)] for room in self.rooms], self.keys.shape[-2])


def joined(
    layers: Sequence[DynamicLayer],
    spread: Sequence[torch.Tensor],
    rows: int,
    longest: int,
    tokens: int,
) -> RoomyLayer:
    """Joins the keys and values from all parts into one layer, with rows padded on the left.

    Args:
        layers: the same layer from each part. The layers are emptied.
        spread: for each part, some rows of the batch and their source rows in the part, `(2, R)`.
        longest: the number of tokens in the longest prompt.
        tokens: the capacity of a row, in tokens.
    """
    rooms = []
    for name in ("keys", "values"):
        states = [getattr(layer, name) for layer in layers]
        _, heads, _, size = states[0].shape
        room = states[0].new_empty(rows, heads, tokens, size)
        room[:, :, :longest].zero_()
        for (to, of), state in zip(spread, states, strict=True):
            room[to, :, longest - state.shape[2] : longest] = state[of]
        rooms.append(room)
    for layer in layers:
        layer.reset()  # frees its memory immediately
    return RoomyLayer(rooms, longest)

"""The KV cache of decoding: each row has a copy of its prompt's keys and values, and room for more.

It knows keys and values. It does not know the model or its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from self_judge.runtime import unwrapped


class PromptLayer(DynamicLayer):
    """Keys and values of prompts, in the type that attention computes in.

    Under autocast rotated keys are float32. The usual layer then converts the values as well, and
    attention rounds both at every step.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


def empty_cache(model: nn.Module) -> Any:
    cache = DynamicCache(config=unwrapped(model).config)  # type: ignore[arg-type]
    cache.layers = [PromptLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values with room for future tokens; remaining rows move up in place.

    A batch allocates its memory once: nothing grows, and leaving rows need no second cache.

    Args:
        rooms: keys and values, `(B, H, tokens, D)` each.
        length: the number of tokens already in them.
    """

    # `rooms` own the memory; `keys` and `values` are views of their first rows and tokens:
    #
    #   start               update               batch_select_indices([0, 2])
    #   0 1 2|. . .         0 1 2 a|. .          0 1 2 a|. .     keys[:2] = keys[[0, 2]]
    #   3 4 5|. . .         3 4 5 b|. .          6 7 8 c|. .     the third row of the room stays
    #   6 7 8|. . .         6 7 8 c|. .          ─────────       unused until the batch ends

    keys: torch.Tensor
    values: torch.Tensor
    at_1: torch.Tensor | None = None  # where the next token goes, if the views keep their width

    def __init__(self, rooms: Sequence[torch.Tensor], length: int) -> None:
        super().__init__()
        self.lazy_initialization(*rooms)
        self._take(rooms, length)

    def keep_width(self, width: int, at_1: torch.Tensor) -> None:
        """From now on, a token goes to the place `at_1`, and the views are `width` tokens wide."""
        if self.at_1 is None:  # attention multiplies what its mask hides by 0
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
    """One layer's keys and values of all rows, padded on the left, from the layers of all parts.

    Args:
        layers: the same layer of each part; they are emptied.
        spread: for each part, rows of the batch and their source rows, `(2, R)`.
        longest: tokens of the longest prompt.
        tokens: the room in a row, in tokens.
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
        layer.reset()  # frees its memory at once
    return RoomyLayer(rooms, longest)

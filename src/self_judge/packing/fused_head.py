"""Runs TRL's batches in packed passes, which compute each shared token only once.

TRL's losses call `model(input_ids, attention_mask, labels, fused_lm_head=True)` with `(B, T)` rows
and read `(B, T - 1)` per-token values. This module computes these values in packed passes and
returns each value at the index that TRL expects. The loss and TRL's fused head do not change.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from trl.trainer import utils as trl_utils

from self_judge.config.self_training import PackingChoice
from self_judge.packing.packing import Packing
from self_judge.packing.passes import hidden_states_at
from self_judge.packing.prefix_tree import Ints
from self_judge.runtime import to_device, unwrapped

# TRL 1.14, the last version for Python 3.10, has no fused LM head, so its batches remain padded.
FUSED_HEAD = getattr(trl_utils, "add_fused_lm_head", None) is not None

# The per-token outputs of TRL's fused head; see trl.trainer.utils.FusedCausalLMOutput.
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TENSORS = ("input_ids", "attention_mask", "labels")
_UNDERSTOOD = {*_TENSORS, "use_cache", "num_items_in_batch"}


def pack_fused_head(
    model: nn.Module,
    choice: PackingChoice = "auto",
    *,
    one_pass: bool = False,
    batch_tokens: int | None = None,
) -> Packing | None:
    """Makes the fused LM head that TRL adds to a model use packed rows.

    All other calls to the model are unchanged. Two kinds of batches cannot be packed and run as
    usual: batches for a mixture of experts with a router loss (which is defined on the padded
    batch), and batches that contain inputs other than ids, mask and labels.

    Args:
        model: the model of TRL's trainer after the trainer's constructor has run, in any wrapper.
        choice: see `Packing`.
        one_pass, batch_tokens: see `Packing`.

    Returns:
        The packing, or `None` if it is off or TRL has no fused head.

    Raises:
        ValueError: a forced packing mode is not exact for this model.
    """
    if choice == "off" or not FUSED_HEAD:
        return None
    packing = Packing(model, choice, gradients=True, one_pass=one_pass, batch_tokens=batch_tokens)
    inner: Any = unwrapped(model)
    fused_forward = inner.forward

    # `generate` inspects the signature of this method.
    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        # PEFT passes all arguments that it defines, most of them as None.
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        batch = None if args or not _packable(inner, kwargs) else _Batch.of(kwargs)
        if batch is None or packing.decision.route == "off":
            return fused_forward(*args, fused_lm_head=True, **kwargs)
        return _packed(packing, fused_forward, batch, **kwargs)

    inner.forward = types.MethodType(forward, inner)
    return packing


def _packable(inner: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.keys() - _UNDERSTOOD or not kwargs.keys() >= set(_TENSORS):
        return False
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        return False
    shapes = {kwargs[name].shape for name in _TENSORS}
    return len(shapes) == 1 and len(*shapes) == 2


class _Batch(NamedTuple):
    """A copy of a batch on the CPU, because reading a number from the device would wait for it.

    Attributes:
        ids_BT, mask_BT, labels_BT: the arguments of the model call.
    """

    ids_BT: Ints
    mask_BT: Ints
    labels_BT: Ints

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> _Batch | None:
        """Copies all tensors at once; returns `None` if the rows are not padded on the right.

        Both collators in this project pad on the right.
        """
        tensors = torch.stack([kwargs[name].long() for name in _TENSORS])
        batch = cls(*tensors.cpu().numpy())
        return batch if (batch.mask_BT[:, 1:] <= batch.mask_BT[:, :-1]).all() else None


def _packed(
    packing: Packing,
    fused_forward: Callable[..., Any],
    batch: _Batch,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    use_cache: bool | None = None,
    num_items_in_batch: Any = None,
) -> Any:
    # This example shows the chosen `pqA` and the rejected `pqBC` for one prompt, as TRL's loss
    # passes them (- means -100):
    #
    #   ids_BT     p q A _     targets_BT   - A -     wanted   [1]      the state of q scores A
    #              p q B C                  - B C              [1 2]    q scores B, B scores C
    #
    # Tokens after the last needed token are cut, so one packed row `p q B` provides all three
    # states: q (for A), q (for B) and B (for C). Their values go to cells 1, 4 and 5 of the
    # flattened (2, 3) output, regardless of the order of the passes. All other cells are zero.
    device = input_ids.device
    lengths = batch.mask_BT.sum(1)
    sequences = [row[:n].tolist() for row, n in zip(batch.ids_BT, lengths, strict=True)]
    targets_BT = batch.labels_BT[:, 1:]
    places_BT = targets_BT != -100
    # The hidden state at t scores the token at t + 1. Rows without targets are not computed.
    wanted = [row.nonzero()[0] for row in places_BT]
    targets = targets_BT[places_BT]
    nothing = not len(targets)
    if nothing:
        # Without targets, multiply one score by zero to keep the output connected to the
        # parameters.
        sequences, wanted = [[*sequences[0][:1]]], [np.array([0])]
        targets = batch.ids_BT[0, :1]
    values: dict[str, list[torch.Tensor]] = {name: [] for name in _PER_TOKEN}
    numbers: list[torch.Tensor] = []
    output: Any = None
    for this in packing.passes(sequences, wanted):
        own = to_device(torch.from_numpy(targets[this.wanted.numpy()]), device)
        with hidden_states_at(packing.inner, this) as inputs:
            output = fused_forward(**inputs, shift_labels=own[None], fused_lm_head=True)
        numbers.append(this.wanted)
        for name in _PER_TOKEN:
            value = getattr(output, name)
            if value is not None:
                values[name].append(value[0])
    mask_BT = labels[:, 1:] != -100
    cells = None
    if not nothing:
        order = torch.cat(numbers).numpy()
        cells = to_device(torch.from_numpy(places_BT.ravel().nonzero()[0][order]), device)
    fields: dict[str, Any] = {}
    for name, parts in values.items():
        if not parts:
            continue
        value = torch.cat(parts).to(device)
        full = torch.zeros(mask_BT.numel(), dtype=value.dtype, device=device)
        if cells is None:
            full = full + 0 * value.sum() if value.is_floating_point() else full
        else:
            full = full.index_put((cells,), value)
        fields[name] = full.view(mask_BT.shape)
    count = mask_BT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return type(output)(loss=-fields["log_probs"].sum() / count, label_mask=mask_BT, **fields)

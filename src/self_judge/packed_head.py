"""TRL's batches through packed passes: the same per-token outputs, each shared token computed once.

TRL's losses call `model(input_ids, attention_mask, labels, fused_lm_head=True)` with `(B, T)` rows
and read `(B, T - 1)` per-token values. Here that call is answered in their shape and places; the
loss and TRL's fused head stay as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import trl
from packaging.version import Version
from torch import nn

from self_judge.config import PackingChoice
from self_judge.models import unwrapped
from self_judge.packed_passes import selecting
from self_judge.packing import Packing

# The last TRL for Python 3.10 has no fused LM head: its batches stay padded.
BEFORE_FUSED_HEAD = Version(trl.__version__) < Version("1.16")

# What TRL's fused head returns per token; see trl.trainer.utils.FusedCausalLMOutput.
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_UNDERSTOOD = {"input_ids", "attention_mask", "labels", "use_cache", "num_items_in_batch"}


def pack_fused_head(
    model: nn.Module,
    choice: PackingChoice = "auto",
    *,
    one_pass: bool = False,
    batch_tokens: int | None = None,
) -> Packing | None:
    """Has a model's fused LM head, given to it by TRL, work on packed rows from now on.

    Every other call of the model is as before, and so are batches that cannot be packed: those of
    mixtures of experts whose router loss is wanted (it is defined on the padded batch), and those
    with inputs beyond ids, mask and labels.

    Args:
        model: as TRL's trainer holds it after its constructor, in any wrapper.
        choice: see `Packing`.
        one_pass, batch_tokens: see `Packing`.

    Returns:
        The packing, or `None` when it is off or TRL has no fused head yet.

    Raises:
        ValueError: a forced choice that is not exact for this model.
    """
    if choice == "off" or BEFORE_FUSED_HEAD:
        return None
    packing = Packing(model, choice, gradients=True, one_pass=one_pass, batch_tokens=batch_tokens)
    inner: Any = unwrapped(model)
    fused_forward = inner.forward

    # `generate` reads the signature.
    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        # PEFT hands on every argument it knows, most of them as None.
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        if args or not _packable(inner, kwargs) or packing.decision.route == "off":
            return fused_forward(*args, fused_lm_head=True, **kwargs)
        return _packed(packing, fused_forward, **kwargs)

    inner.forward = types.MethodType(forward, inner)
    return packing


def _packable(inner: Any, kwargs: dict[str, Any]) -> bool:
    if kwargs.keys() - _UNDERSTOOD or not {"input_ids", "labels"} <= kwargs.keys():
        return False
    if getattr(inner.config.get_text_config(), "output_router_logits", False):
        return False
    mask = kwargs.get("attention_mask")
    # Rows are padded on the right, as both of the project's collators do.
    return mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all())


def _packed(
    packing: Packing,
    fused_forward: Callable[..., Any],
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    use_cache: bool | None = None,
    num_items_in_batch: Any = None,
) -> Any:
    device = input_ids.device
    lengths = attention_mask.sum(1).tolist()
    sequences = [row[:n] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
    targets_BT = labels[:, 1:]
    mask_BT = targets_BT != -100
    places = mask_BT.cpu().numpy()
    # The state at t scores the token at t + 1. Rows without a target are not computed.
    wanted = [row.nonzero()[0] for row in places]
    targets = targets_BT[mask_BT]
    nothing = not len(targets)
    if nothing:
        # One score, taken times zero: the output stays connected to the model's parameters.
        sequences, wanted = [[*sequences[0][:1]]], [np.array([0])]
        targets = input_ids[0, :1]
    values: dict[str, list[torch.Tensor]] = {name: [] for name in _PER_TOKEN}
    numbers: list[torch.Tensor] = []
    output: Any = None
    for this in packing.passes(sequences, wanted):
        number = this.wanted.to(device)
        with selecting(packing.inner, this) as inputs:
            output = fused_forward(**inputs, shift_labels=targets[number][None], fused_lm_head=True)
        numbers.append(number)
        for name in _PER_TOKEN:
            value = getattr(output, name)
            if value is not None:
                values[name].append(value[0])
    order = torch.cat(numbers)
    cells = mask_BT.flatten().nonzero()[:, 0]
    fields: dict[str, Any] = {}
    for name, parts in values.items():
        if not parts:
            continue
        value = torch.cat(parts).to(device)
        full = torch.zeros(mask_BT.numel(), dtype=value.dtype, device=device)
        if nothing:
            full = full + 0 * value.sum() if value.is_floating_point() else full
        else:
            full = full.index_put((cells[order],), value)
        fields[name] = full.view(mask_BT.shape)
    count = mask_BT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return type(output)(loss=-fields["log_probs"].sum() / count, label_mask=mask_BT, **fields)

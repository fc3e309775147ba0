"""Counts on a CPU how often code waits for a device, by the tensors that it reads and copies.

`elsewhere(model)` puts a model on a device that only pretends to be one: its tensors say that they
are on `meta`, and hold their numbers on the CPU. So code goes the way that it goes on a GPU, with
real numbers, and `DeviceWaits` sees each operation that a GPU would make the CPU wait for.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
# The CPU goes on only when it knows a number of the tensor, or how many there are.
_READS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device.

    Attributes:
        held: its numbers, on the CPU.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # PyTorch refuses it for subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class DeviceWaits(TorchDispatchMode):
    """Counts the waits within the block. All code on the pretended device has to run in one.

    Attributes:
        at: how often each line waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.at.values())

    def __enter__(self) -> DeviceWaits:
        tensor, autocast = self._usual = torch.tensor, torch.is_autocast_enabled

        def with_numbers(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
            made = tensor(data, **kwargs)
            return made if device is None else made.to(device)

        def known(device_type: str = "cuda") -> bool:
            return device_type != DEVICE.type and autocast(device_type)

        # On `meta`, PyTorch leaves out the numbers of the one, and raises for the other.
        torch.tensor, torch.is_autocast_enabled = with_numbers, known  # type: ignore[assignment]
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        torch.tensor, torch.is_autocast_enabled = self._usual  # type: ignore[assignment]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is aten.is_pinned:
            return True  # without a GPU no memory can be pinned
        if _waits(func.overloadpacket, args, kwargs):
            stack = traceback.extract_stack()
            line = next(f for f in reversed(stack) if not f.filename.startswith(_INSIDE))
            self.at[f"{func} at {line.filename}:{line.lineno}: {line.line}"] += 1
        return _computed(func, args, kwargs)


_INSIDE = (__file__, str(Path(torch.__file__).parent))


def elsewhere(model: nn.Module) -> Any:
    """The model with its parameters and buffers on the pretended device."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                own = made.setdefault(id(p), nn.Parameter(Elsewhere(p.detach()), p.requires_grad))
                module._parameters[name] = own
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = Elsewhere(b)
    return model


def _waits(packet: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if packet is aten._to_copy:
        reads = isinstance(args[0], Elsewhere)
        crosses = reads != _is_there(kwargs.get("device"), reads)
        return crosses and args[0].numel() > 0 and (reads or not kwargs.get("non_blocking"))
    if packet is aten.copy_:
        reads = isinstance(args[1], Elsewhere)
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return reads != isinstance(args[0], Elsewhere) and args[1].dim() > 0 and (reads or blocking)
    own = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)]
    if packet in _INDEXING and own:
        places = [x for x in args[1] if x is not None]
        bits = (torch.bool, torch.uint8)
        return any(x.dtype in bits or not isinstance(x, Elsewhere) for x in places)
    return packet in _READS and bool(own)


def _is_there(device: Any, usual: bool) -> bool:
    return usual if device is None else torch.device(device) == DEVICE


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, computed on the CPU."""
    own = {id(x.held): x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)}
    there = _is_there(kwargs.get("device"), bool(own))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    result = func(*args, **kwargs)
    if not there:
        return result
    # What an operation changes in place stays the tensor that it was.
    return tree_map(lambda x: _placed(x, own), result)


def _placed(x: Any, own: dict[int, Elsewhere]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return own[id(x)] if id(x) in own else Elsewhere(x)

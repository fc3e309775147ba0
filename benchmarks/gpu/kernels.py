"""Attention kernels: shapes that are new against shapes that were met, with cuDNN and without."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from measuring import Check, cudnn_attention, seconds_of, sync, with_and_without_cudnn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

HEADS = ((9, 64), (32, 128))  # number and size: SmolLM2, 7B


def kernels(check: Check) -> None:
    """Packed passes under a mask, and decoding with keys that grow by one."""
    for cudnn in with_and_without_cudnn():
        for heads, size in HEADS[:1] if check.tiny else HEADS:
            with check.errors_told(cudnn=cudnn, heads=heads), cudnn_attention(cudnn):
                _masked(check, cudnn, heads, size)
        with check.errors_told(cudnn=cudnn), cudnn_attention(cudnn):
            _decoding(check, cudnn)


def _masked(check: Check, cudnn: bool, heads: int, size: int) -> None:
    rows, lengths = (2, range(21, 27, 3)) if check.tiny else (8, range(601, 631, 3))

    def attend(length: int, grad: bool) -> None:
        shape = (rows, heads, length, size)
        query, key, value = (
            torch.randn(shape, device=check.device, dtype=check.dtype, requires_grad=grad)
            for _ in range(3)
        )
        mask = torch.ones(length, length, dtype=torch.bool, device=check.device).tril()[None, None]
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if grad:
            output.backward(torch.ones_like(output))

    def milliseconds(grad: bool) -> float:
        times = [seconds_of(lambda n=n: attend(n, grad))[0] for n in lengths]
        return round(1e3 * statistics.median(times), 3)

    check.say(
        cudnn=cudnn,
        heads=heads,
        head_dim=size,
        ms_new=milliseconds(False),
        ms_again=milliseconds(False),
        ms_new_with_gradient=milliseconds(True),
        ms_again_with_gradient=milliseconds(True),
        kernel=_kernel(lambda: attend(lengths[0], False)),
    )


def _decoding(check: Check, cudnn: bool) -> None:
    rows, start, steps = (2, 10, 4) if check.tiny else (64, 500, 20)
    draw = {"device": check.device, "dtype": check.dtype}
    cache = torch.randn(rows, 8, start + steps, 128, **draw)  # type: ignore[call-overload]
    query = torch.randn(rows, 8, 4, 128, **draw)  # type: ignore[call-overload]
    times = []
    for length in range(start, start + steps):
        mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=check.device)
        own = cache[:, :, :length]
        attend = functools.partial(scaled_dot_product_attention, query, own, own, attn_mask=mask)
        times.append(seconds_of(attend)[0])
    ms = round(1e3 * statistics.median(times), 3)
    check.say(cudnn=cudnn, what="decoding, keys grow by one", ms_each=ms)


def _kernel(work: Callable[[], object]) -> str | None:
    """The name of the kernel that attended."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        sync()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    attending = ("sdpa", "fmha", "flash", "attention")
    named = [e.key for e in events if any(word in e.key.lower() for word in attending)]
    return (named or [e.key for e in events] or [None])[0]

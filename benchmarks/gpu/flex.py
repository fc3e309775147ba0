"""FlexAttention, forced, against SDPA under a mask on real judge and update shapes.

`auto` may take it on CUDA from 1.15 times as fast on both. On a CPU it has no backward pass and
takes minutes to compile: a dry run stops at SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from exact import gradients, routes
from measuring import Check, clean, gib, peak, timed
from project import (
    Judge,
    bench,
    encoder_of,
    pairs_of,
    preference_batch,
    records,
    shaped,
    updating,
)


def flex(check: Check) -> None:
    """Exactness, with gradients; then judging and an update by both."""
    for name in ("llama", "llama, 9 heads of 64") if not check.tiny else ():
        for dtype in (torch.bfloat16, torch.float32):
            about = {"family": name, "dtype": str(dtype)[6:], "attention": "flex_attention"}
            with check.errors_told(**about):
                for one in routes(check, name, dtype, "flex_attention", ("tree",)):
                    check.say(**about, **one)
                check.say(**about, **gradients(check, name, dtype, "flex_attention"))
    for shape in check.shapes[:2]:
        seconds: dict[tuple[str, str], float] = {}
        for attention in ("sdpa",) if check.tiny else ("sdpa", "flex_attention"):
            for what, measured in (("judging", _judging), ("update", _update)):
                about = {"shape": shape, "what": what, "attention": attention}
                with check.errors_told(**about):
                    found = measured(check, shape, attention)
                    seconds[what, attention] = found["seconds"]
                    check.say(**about, **found)
        for what in ("judging", "update"):
            ways = [seconds.get((what, attention)) for attention in ("sdpa", "flex_attention")]
            if all(ways):
                check.say(shape=shape, what=what, times_as_fast=round(ways[0] / ways[1], 3))  # type: ignore[operator]


def _found(check: Check, work: Any, packing: Any) -> dict[str, Any]:
    clean()
    graphs = _graphs()
    measured = timed(check, work)
    return {
        "seconds": round(measured.seconds, 4),
        "first": round(measured.first, 2),
        "peak_gib": gib(peak()),
        "graphs": _graphs() - graphs,
        "way": packing.describe()[:200],
    }


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))


def _judging(check: Check, shape: str, attention: str) -> dict[str, Any]:
    model, encoder = shaped(check, shape, attention), encoder_of(check)
    judge = Judge(model, encoder, bench.templates_of(), max_length=1024)
    comparisons = bench.comparisons_of(records(check, 4 if check.tiny else 128))
    prompts = bench.judge_prompts(judge, comparisons)
    return _found(check, lambda: judge.letter_probabilities(prompts), judge.packing)


def _update(check: Check, shape: str, attention: str) -> dict[str, Any]:
    encoder = encoder_of(check)
    batch = preference_batch(pairs_of(check, encoder, 2 if check.tiny else 8), 0, max_length=1024)
    inputs = [{k: v.to(check.device) for k, v in batch.items()}]
    trainer: Any = updating(check, shaped(check, shape, attention))
    trainer.model.train()

    def step() -> list[float]:
        with trainer.accelerator.autocast():
            return bench.losses_of(trainer, inputs)

    return _found(check, step, trainer.packing)

"""Where the processor waits for the device, by file and line, and what a piece of work launches."""

from __future__ import annotations

import collections
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Check, seconds_of
from project import (
    ROOT,
    Judge,
    SamplingSettings,
    TransformersSampler,
    bench,
    encoder_of,
    pairs_of,
    preference_batch,
    records,
    shaped,
    updating,
)
from torch.profiler import ProfilerActivity, profile


def waits(check: Check) -> None:
    """Per decoded token, per judged prompt, per micro-batch of an update."""
    encoder = encoder_of(check)
    pairs, new = (2, 6) if check.tiny else (16, 64)
    with check.errors_told(what="sampling"):
        settings = SamplingSettings(max_new_tokens=new, top_p=0.9)
        sampler = TransformersSampler(shaped(check, "smollm2"), encoder, settings)
        prompts = [encoder.encode_prompt(r.prompt)[-200:] for r in records(check, pairs)]
        _told(check, "sampling", new, "token", lambda: sampler.sample(prompts, 2, seeds=0))
    with check.errors_told(what="judging"):
        judge = Judge(shaped(check, "smollm2"), encoder, bench.templates_of(), max_length=1024)
        comparisons = bench.comparisons_of(records(check, pairs))
        asked = bench.judge_prompts(judge, comparisons)
        work = lambda: judge.letter_probabilities(asked)  # noqa: E731
        _told(check, "judging", len(asked), "prompt", work)
    with check.errors_told(what="update"):
        batch = preference_batch(pairs_of(check, encoder, pairs)[:8], 0, max_length=1024)
        inputs = [{k: v.to(check.device) for k, v in batch.items()}] * 2
        trainer = updating(check, shaped(check, "smollm2"))
        trainer.model.train()

        def update() -> None:
            with trainer.accelerator.autocast():
                for own in inputs:
                    trainer.compute_loss(trainer.model, dict(own)).backward()
            trainer.model.zero_grad()

        _told(check, "update", len(inputs), "micro-batch", update)


def _told(check: Check, what: str, count: int, unit: str, work: Callable[[], Any]) -> None:
    work()  # kernels are made
    places = _waits_of(work)
    total = sum(places.values())
    about = {"what": what, "waits": total, f"waits_per_{unit}": round(total / count, 3)}
    check.say(**about, places=places.most_common(12))
    if not torch.cuda.is_available():
        return
    # Only CUDA's side: with the CPU's operators, reading the events takes a minute.
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds, _ = seconds_of(work)
    events = seen.key_averages()
    busy = sum(e.self_device_time_total for e in events) / 1e6
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:8]
    check.say(
        what=what,
        kernels=sum(e.count for e in events if e.self_device_time_total),
        device_busy_under_profiler=round(busy / seconds, 3),
        top_ms=[(e.key[:60], round(e.self_device_time_total / 1e3, 2)) for e in top],
    )


def _waits_of(work: Callable[[], Any]) -> collections.Counter[str]:
    """How often each line of the project, or the innermost other one, waited for the device."""
    places: collections.Counter[str] = collections.Counter()

    def note(message: Any, *about: Any, **more: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = traceback.extract_stack()[:-1]
        own = [f for f in frames if str(ROOT / "src") in f.filename] or frames
        places[f"{Path(own[-1].filename).name}:{own[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    return places

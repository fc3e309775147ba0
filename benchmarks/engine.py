"""Sampling and judging on vLLM against Transformers, in one process, on real HH prompts.

Sampling with the model's own weights, with a LoRA adapter, and judging given pairs; tokens per
second are of sampled tokens. Needs an environment with vLLM (on a CPU `make test-vllm` makes one).

    python benchmarks/engine.py [--prompts 16] [--tokens 48] [--dtype bfloat16]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import side_by_side as bench
from self_judge import Judge
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import Sampler, TransformersSampler
from self_judge.inference.vllm.colocated import VLLMEngine
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.training.self_training.vllm_sync import (
    adapter_tensors,
    checkpoint_weights,
    save_adapter,
)

LENGTH = 1024


def timed(rounds: int, sides: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, Any]]:
    """Median seconds of each side, turn by turn after one warm-up each, and what it gave last."""
    given = {name: work() for name, work in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            started = time.perf_counter()
            given[name] = work()
            seconds[name].append(time.perf_counter() - started)
    return {name: (statistics.median(seconds[name]), given[name]) for name in sides}


def main() -> None:
    """Times the three pieces of work on both sides."""
    given = bench.arguments(__doc__, [], prompts=16, responses=2, tokens=48, pairs=16, adapter=1)
    model = bench.model_of(given).eval()
    encoder = bench.encoder_of(given)
    records = bench.records_of(given, max(given.prompts, given.pairs))
    prompts = [encoder.encode_prompt(r.prompt) for r in records]
    prompts = [p for p in prompts if len(p) <= LENGTH - given.tokens][: given.prompts]
    settings = SamplingSettings(max_new_tokens=given.tokens)
    started = time.perf_counter()
    engine = VLLMEngine(
        model.config,
        checkpoint_weights(model),
        dtype=getattr(torch, given.dtype),
        max_model_length=LENGTH,
        max_lora_rank=8 if given.adapter else 0,
    )
    print(f"{Path(given.model).name}, {given.dtype}, {torch.get_num_threads()} threads; torch "
          f"{torch.__version__}; engine up in {time.perf_counter() - started:.0f} s")  # fmt: skip

    def sampling(title: str, here: Any, adapter: str | None) -> None:
        samplers: dict[str, Sampler] = {
            "vLLM": VLLMSampler(engine, encoder, settings, adapter),
            "Transformers": TransformersSampler(here, encoder, settings),
        }
        sides = {
            name: lambda s=s: sum(len(r.ids) for own in s.sample(prompts, given.responses, 0)
                                  for r in own)
            for name, s in samplers.items()
        }  # fmt: skip
        print(f"{title}: {len(prompts)} prompts of {sum(map(len, prompts)) // len(prompts)} tokens "
              f"on average × {given.responses} responses")  # fmt: skip
        for name, (seconds, tokens) in timed(given.rounds, sides).items():
            print(f"  {name:<14}{seconds:8.2f} s {tokens / seconds:8.1f} tokens/s ({tokens})")

    sampling("sampling, own weights", model, None)
    templates = bench.templates_of()
    comparisons = bench.comparisons_of(records[: given.pairs])
    judges = {
        "vLLM": Judge(VLLMScorer(engine), encoder, templates),
        "Transformers": Judge(model, encoder, templates, max_length=LENGTH - 1),
    }

    def judging(judge: Judge) -> Any:
        def work() -> torch.Tensor:
            if isinstance(judge.scorer, VLLMScorer):
                engine.llm.reset_prefix_cache()  # nothing is left of the turn before
            return torch.tensor([v.probabilities for v in judge.compare(comparisons)])

        return work

    found = timed(given.rounds, {name: judging(judge) for name, judge in judges.items()})
    print(f"judging: {len(comparisons)} pairs in both orders")
    for name, (seconds, _) in found.items():
        print(f"  {name:<14}{seconds:8.2f} s")
    gap = (found["vLLM"][1] - found["Transformers"][1]).abs().max()
    print(f"  probabilities differ by at most {gap:.1e}")

    if given.adapter:
        policy = get_peft_model(model, bench.lora())
        with tempfile.TemporaryDirectory() as folder:
            tensors = adapter_tensors(policy, "default")
            save_adapter(policy, "default", tensors, Path(folder))
            engine.load_adapter("policy", Path(folder))
            sampling("sampling, LoRA on all linear layers", policy, "policy")


if __name__ == "__main__":
    sys.exit(main())

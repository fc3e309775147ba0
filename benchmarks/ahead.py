"""Steps with samples drawn ahead against steps that sample first, over servers elsewhere.

The trainer, its update and its reference are real; the servers are stood in for by an engine that
takes a given time per step to sample and to judge, as another machine would, and none of this one.

    python benchmarks/ahead.py [--sampling 4] [--judging 1]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.training.self_training.vllm_sync import VLLMSync

SIDES = ("ahead", "in turn")
STEPS = 3


class Elsewhere:
    """An engine on another machine: waits, then answers with words of the vocabulary."""

    max_model_length = 2048

    def __init__(self, sampling: float, judging: float, tokens: int) -> None:
        self.sampling, self.judging, self.tokens = sampling, judging, tokens

    def sample(self, requests: Sequence[Any], *_: Any) -> list[list[int]]:
        time.sleep(self.sampling)
        ids = []
        for request in requests:
            drawn = torch.Generator().manual_seed(request.seed % 2**31)
            ids.append(torch.randint(1000, 30_000, (self.tokens,), generator=drawn).tolist())
        return ids

    def next_token_logprobs(self, prompts: Sequence[Any], *_: Any) -> list[list[float]]:
        time.sleep(self.judging)
        return [[-1.0 - hash(tuple(p)) % 7 / 10, -1.35] for p in prompts]

    def load_adapter(self, *_: Any) -> None: ...

    def remove_adapter(self, *_: Any) -> None: ...

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


def main() -> None:
    """Runs of a few steps of each kind, in turn; the first step of a run is left out."""
    given = bench.arguments(__doc__, SIDES, prompts=4, new=64, sampling=4, judging=1)
    engine = Elsewhere(given.sampling, given.judging, given.new)
    VLLMSync._servers = lambda self: engine  # type: ignore[method-assign, assignment, return-value]
    VLLMSync._check = lambda self, *_: None  # type: ignore[method-assign, assignment]
    encoder = bench.encoder_of(given)
    records = bench.records_of(given, STEPS * given.prompts)
    rows = [{"prompt": [dict(m) for m in r.prompt]} for r in records]
    times: dict[str, list[float]] = {side: [] for side in SIDES}

    def run(side: str) -> Callable[[], None]:
        def steps() -> None:
            torch.manual_seed(0)
            trainer = SelfJudgeTrainer(
                model=bench.model_of(given),
                args=SelfJudgeConfig(
                    tempfile.mkdtemp(),
                    per_device_train_batch_size=given.prompts,
                    max_steps=STEPS,
                    max_new_tokens=given.new,
                    max_length=1024,
                    **bench.quiet(given),
                    use_vllm=True,
                    vllm_mode="server",
                    vllm_server_base_url="http://elsewhere",
                    rollouts_ahead=side == "ahead",
                ),
                processing_class=encoder.tokenizer,
                judge_templates=bench.templates_of(),
                train_dataset=Dataset.from_list(rows),
                peft_config=bench.lora(),
            )
            trainer.train()
            for logged in [x for x in trainer.state.log_history if "time/update" in x][1:]:
                times[side].append(sum(v for k, v in logged.items() if k.startswith("time/")))

        return steps

    bench.alternating({side: run(side) for side in SIDES if side in given.sides}, given)
    bench.report(
        f"step of {given.prompts} prompts × 2 samples × {given.new} tokens, LoRA; servers take "
        f"{given.sampling:g} s to sample and {given.judging:g} s to judge",
        given,
        {side: values for side, values in times.items() if values},
        limit=None,
        notes=[],
    )


if __name__ == "__main__":
    main()

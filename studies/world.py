"""The synthetic world of one seed: its JSFT model, and how the studies measure a policy.

All arms of a seed share its JSFT model. The model is kept under outputs/studies, so that studies
that run one after another train it once.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback

from self_judge.commands.demo import steps
from self_judge.config.self_training import SamplingSettings
from self_judge.data import synthetic, toy_world
from self_judge.datatypes import Comparison, Response, Verdict, stable_seed
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.models import load_model
from self_judge.prompting.judge_prompt import encode_orders


def right(verdicts: Iterable[Verdict]) -> list[float]:
    """Returns 1 for each verdict that prefers response `a`, 0.5 if it is undecidable, else 0."""
    return [{"a": 1.0, None: 0.5, "b": 0.0}[verdict.preferred] for verdict in verdicts]


def larger(pairs: Iterable[Sequence[float]]) -> list[float]:
    """Returns 1 for each pair whose first value is the larger one, 0.5 for equal values, else 0."""
    return [0.5 if a == b else float(a > b) for a, b in pairs]


@torch.no_grad()
def rewarded(
    model: Any, tokenizer: Any, pairs: Iterable[tuple[Any, str, str]], max_length: int | None = None
) -> list[float]:
    """Judges pairs (prompt as messages, chosen, rejected) by the rewards of a reward model."""

    def reward(messages: Any, text: str) -> float:
        answer = {"role": "assistant", "content": text}
        ids = tokenizer.apply_chat_template([*messages, answer], return_dict=False)
        ids = ids if max_length is None else ids[-max_length:]
        return float(model(torch.tensor([ids], device=model.device)).logits.item())

    model.eval()
    return larger([reward(prompt, own) for own in responses] for prompt, *responses in pairs)


def prompts_of(judge: Judge, match: Comparison) -> Iterator[list[int]]:
    """Yields the ids of all prompts that a judge scores for a match."""
    for principle in judge.templates:
        yield from encode_orders(judge.encoder, judge.templates, principle, match) or ()


def preference_dataset(pairs: Iterable[tuple[Any, str, str]]) -> Dataset:
    """Returns a dataset for TRL from (prompt as messages, chosen, rejected)."""
    return Dataset.from_list(
        [
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in pairs
        ]
    )


def train(trainer: Any, checkpoint: str | None = None) -> None:
    """Trains without printing every log."""
    trainer.remove_callback(PrinterCallback)
    trainer.train(checkpoint)


def code_hash(*modules: ModuleType, said: str) -> str:
    """Returns a hash of the modules' code, without comments, and of a text."""
    lines = itertools.chain(*(inspect.getsource(module).splitlines() for module in modules))
    code = [line for line in lines if not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join([*code, said]).encode()).hexdigest()[:12]


class World:
    """The world of one seed.

    Args:
        seed: the seed of data, weights, sampling and brackets, as in `self-judge demo --seed`.
        settings: sizes and hyperparameters; default: those of the demo.
        folder: where models are kept.
    """

    QUICK = steps.DemoSettings(
        base_steps=20,
        jsft_records=300,
        steps=2,
        prompts_per_step=16,
        held_out_pairs=40,
        held_out_prompts=24,
    )

    def __init__(
        self, seed: int, settings: steps.DemoSettings | None = None, folder: Path | None = None
    ) -> None:
        self.seed, self.settings = seed, settings or steps.DemoSettings()
        self.folder = (folder or Path("outputs/studies")) / self.version(self.settings) / str(seed)
        self.console = Console(file=io.StringIO())
        steps.quiet()

    @staticmethod
    def version(settings: steps.DemoSettings | None = None) -> str:
        """Returns a hash of everything that determines a JSFT model, comments aside.

        Neither models nor results of another version are used.
        """
        return code_hash(toy_world, synthetic, steps, said=repr(settings or steps.DemoSettings()))

    @staticmethod
    def missing() -> str | None:
        """Returns why a study in this world cannot run here."""
        return None

    def demo(self, arm: str, **fields: Any) -> steps.Demo:
        """Returns the steps of the demo, with a folder for this arm."""
        return steps.Demo(self.seed, self.folder / arm, self.settings, self.console, **fields)

    @cached_property
    def shared(self) -> steps.Demo:
        return self.demo("shared")

    def taught(self, arm: str, *arguments: Any) -> tuple[Any, float]:
        """Runs `Demo.jsft` unless its model exists.

        Returns:
            A fresh copy of the model, which the caller may train, and the seconds of JSFT.
        """
        demo = self.demo(arm)
        seconds = demo.output / "seconds"
        if not seconds.exists():
            started = time.perf_counter()
            demo.jsft(*arguments)
            seconds.write_text(str(time.perf_counter() - started))
        return load_model(demo.output / "jsft", device="auto"), float(seconds.read_text())

    def jsft(self) -> Any:
        """Returns a fresh copy of the JSFT model that all arms share."""
        return self.taught("shared")[0]

    @cached_property
    def judge(self) -> Judge:
        return self.shared.judge(self.jsft())

    @cached_property
    def instructions(self) -> list[str]:
        return synthetic.instructions(self.settings.held_out_prompts, self.seed)

    @cached_property
    def prompts(self) -> list[list[int]]:
        encode = self.shared.encoder.encode_prompt
        return [encode([{"role": "user", "content": text}]) for text in self.instructions]

    def answers(self, model: Any, n: int = 1) -> list[list[Response]]:
        """Samples `n` responses to every held-out prompt, with the same seeds for every arm."""
        seeds = [stable_seed(self.seed, "held-out", i) for i in range(len(self.prompts))]
        return self.sampler(model).sample(self.prompts, n, seeds)

    def gold(self, texts: Sequence[str]) -> list[float]:
        """Returns the gold score of one response per held-out prompt."""
        pairs = zip(self.instructions, texts, strict=True)
        return [toy_world.gold_score(instruction, text) for instruction, text in pairs]

    def measured(self, model: Any) -> dict[str, Any]:
        """Returns gold scores, lengths and the KL divergence from the JSFT model."""
        own = self.answers(model)
        first = [responses[0] for responses in own]
        divergence = self.log_probs(model, own) - self.log_probs(self.judge.model, own)
        truth = [
            toy_world.gold_ratings(i, r.text)["truthfulness"].rating == 5
            for i, r in zip(self.instructions, first, strict=True)
        ]
        return {
            "gold": self.gold([r.text for r in first]),
            "true": [int(t) for t in truth],
            "length": [len(r.ids) for r in first],
            "kl": round(float(divergence.mean()), 4),
        }

    def log_probs(self, model: Any, responses: Sequence[Sequence[Response]]) -> np.ndarray:
        """Returns log π(response | prompt) of the responses to the held-out prompts, `(N, K)`."""
        return np.array(self.sampler(model).log_probs(self.prompts, responses))

    def sampler(self, model: Any) -> TransformersSampler:
        """Samples with the settings of the demo."""
        sampling = SamplingSettings(max_new_tokens=self.settings.max_new_tokens)
        return TransformersSampler(model, self.shared.encoder, sampling, 256)

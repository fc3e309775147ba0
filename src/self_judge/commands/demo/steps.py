"""The steps of the demo: a base model, JSFT, judging and self-training in the synthetic world.

The studies use these steps, too. They use the same code for the method as any other run.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from rich.console import Console
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from self_judge.commands.train import jsft_trainer, save_jsft
from self_judge.data import synthetic, toy_world
from self_judge.datatypes import Comparison, PreferenceRecord, Side, Verdict, stable_seed
from self_judge.evaluation.statistics import (
    JudgeQuality,
    judge_quality,
)
from self_judge.judging.judge import Judge
from self_judge.models import load_model
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.jsonl import read_lines, write_lines
from self_judge.storage.run_dir import JUDGED, rollout_files
from self_judge.training.callbacks import LiveProgress
from self_judge.training.identity.reference import frozen_reference
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.trainer import SelfJudgeTrainer


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Sizes and hyperparameters of the demo. The results are in benchmarks/RESULTS.md."""

    base_steps: int = 600
    jsft_records: int = 7000
    pairs_per_record: int = 1
    jsft_batch: int = 32
    jsft_learning_rate: float = 2e-3
    prompts_per_step: int = 64
    steps: int = 45
    learning_rate: float = 3e-4
    beta: float = 0.1
    max_new_tokens: int = 36
    held_out_pairs: int = 1000
    held_out_prompts: int = 256
    judge_batch: int = 128


@dataclass
class Demo:
    """The steps of the demo, which write their files to `output`. The studies use them, too."""

    seed: int
    output: Path
    settings: DemoSettings
    console: Console
    encoder: ChatEncoder = field(default_factory=lambda: ChatEncoder(synthetic.tiny_tokenizer()))
    # The model learns to judge under each principle and overall. The demo judges with the overall
    # template alone, because it needs two prompts per pair instead of eight.
    templates: JudgeTemplates = field(
        default_factory=lambda: synthetic.judge_templates(principles=False, overall=True)
    )

    def records(self) -> list[PreferenceRecord]:
        """Returns the records for JSFT, each with an overall pair and some pairs for principles."""
        return [
            _taught_pairs(r, self.settings.pairs_per_record, self.seed)
            for r in synthetic.records(self.settings.jsft_records, self.seed, writers=2)
        ]

    def base_model(self) -> Any:
        """Returns a model that knows the world, but can neither answer nor judge."""
        with self.console.status("a base model reads about the world"):
            tokenizer: Any = self.encoder.tokenizer
            return synthetic.base_model(tokenizer, self.seed, steps=self.settings.base_steps)

    def jsft(
        self,
        records: Sequence[PreferenceRecord] | None = None,
        templates: JudgeTemplates | None = None,
    ) -> Any:
        """Trains a model to answer and to judge.

        Args:
            records: default: `records()`.
            templates: the templates of the judge examples; default: all principles and overall.
        """
        settings, output = self.settings, self.output / "jsft"
        records = self.records() if records is None else records
        templates = templates or synthetic.judge_templates(overall=True)
        model = self.base_model()
        args = SFTConfig(
            str(output),
            num_train_epochs=1,
            per_device_train_batch_size=settings.jsft_batch,
            learning_rate=settings.jsft_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.98,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=10,
            **self.common_args(),
        )
        trainer = jsft_trainer(model, self.encoder, templates, records, None, args, max_length=512)
        LiveProgress("JSFT         ", self.console).attach(trainer)
        trainer.train()
        save_jsft(trainer, self.encoder, templates, merge=False)
        return load_model(output, device="auto")

    def judge(self, model: Any) -> Judge:
        """Returns a judge that is a frozen copy of the model."""
        frozen, batch_size = frozen_reference(model), self.settings.judge_batch
        return Judge(frozen, self.encoder, self.templates, batch_size=batch_size)

    def held_out_pairs(self) -> list[Comparison]:
        """Returns overall pairs for held-out prompts, with the better response first."""
        records = synthetic.records(self.settings.held_out_pairs, self.seed, "test", writers=2)
        pairs = [next(p for p in record.pairs if p.principle is None) for record in records]
        return [
            Comparison(record.prompt[-1]["content"], pair.chosen, pair.rejected)
            for record, pair in zip(records, pairs, strict=True)
        ]

    def judge_quality(self, judge: Judge) -> JudgeQuality:
        """Judges the held-out pairs."""
        items = self.held_out_pairs()
        verdicts = judge.compare(items)
        judged = (judged_line(c, v, gold="a") for c, v in zip(items, verdicts, strict=True))
        write_lines(self.output / JUDGED, judged)
        return judge_quality(verdicts)

    def prompts(self) -> Dataset:
        """Returns the prompts for self-training."""
        count = self.settings.prompts_per_step * self.settings.steps
        records = synthetic.records(count, stable_seed(self.seed, "prompts"))
        return Dataset.from_list([{"prompt": list(record.prompt)} for record in records])

    def self_training(
        self, jsft_model: Any, trainer_class: type[SelfJudgeTrainer] = SelfJudgeTrainer
    ) -> SelfJudgeTrainer:
        """Trains a policy on its own judgments, and returns the trainer."""
        output = self.output / "self_judge"
        trainer = trainer_class(
            model=jsft_model,
            args=self.self_training_args(),
            processing_class=self.encoder.tokenizer,
            encoder=self.encoder,
            judge_templates=self.templates,
            train_dataset=self.prompts(),
        )
        LiveProgress("self-training", self.console).attach(trainer)
        trainer.train()
        trainer.save_model(str(output))
        for _, path in rollout_files(output):
            write_lines(path, map(_with_gold, list(read_lines(path))))
        return trainer

    def self_training_args(self) -> SelfJudgeConfig:
        """Returns the settings of self-training."""
        settings = self.settings
        return SelfJudgeConfig(
            str(self.output / "self_judge"),
            per_device_train_batch_size=settings.prompts_per_step,
            beta=settings.beta,
            max_new_tokens=settings.max_new_tokens,
            top_p=1.0,
            max_length=512,
            generation_batch_size=256,
            judge_batch_size=settings.judge_batch,
            **self.policy_args(),
        )

    def policy_args(self) -> dict[str, Any]:
        """Returns the settings with which any trainer of TRL trains a policy of this size."""
        return {
            "max_steps": self.settings.steps,
            "learning_rate": self.settings.learning_rate,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 0.1,
            "logging_steps": 1,
            **self.common_args(),
        }

    def common_args(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "bf16": False,
            "use_cpu": not torch.cuda.is_available(),
        }


def _taught_pairs(record: PreferenceRecord, count: int, seed: int) -> PreferenceRecord:
    """Keeps the general pair, for the overall template, and `count` random pairs for principles."""
    general, *specific = record.pairs
    chosen = random.Random(stable_seed(seed, "pairs", record.index)).sample(
        specific, min(count, len(specific))
    )
    pairs = (dataclasses.replace(general, principle=synthetic.OVERALL), *chosen)
    return dataclasses.replace(record, pairs=pairs)


def judged_line(comparison: Comparison, verdict: Verdict, gold: Side) -> dict[str, Any]:
    """Returns the verdict on a pair as plain data. `gold` names the better response."""
    finite = verdict.preferred is not None
    return {
        "context": comparison.context,
        "a": comparison.response_a,
        "b": comparison.response_b,
        "gold": gold,
        "preferred": verdict.preferred,
        "score_a": verdict.score_a if finite else None,
        "score_b": verdict.score_b if finite else None,
        "orders_agree": verdict.orders_agree,
        "probabilities": verdict.probabilities if finite else None,
    }


def rated(instruction: str, response: str) -> dict[str, Any]:
    """Returns the gold score of a response, and the reasons."""
    return {
        "gold_score": toy_world.gold_score(instruction, response),
        "gold_reasons": toy_world.gold_reasons(instruction, response),
    }


def _with_gold(pair: dict[str, Any]) -> dict[str, Any]:
    """Returns the line of a sampled pair with the gold scores of both responses."""
    gold = {side: rated(pair["context"], pair[side]) for side in ("chosen", "rejected")}
    return {**pair, **{f"{side}_{k}": v for side, own in gold.items() for k, v in own.items()}}


def quiet() -> None:
    """Silences the libraries' progress bars and messages, which would break the demo's display."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)

"""`self-judge demo` runs the whole method in a small synthetic world.

The demo creates data, runs JSFT, self-training and self-rejection, and evaluates the results with
the gold rubric. The demo downloads nothing and uses the same code for the method as any other run.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
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

from self_judge.commands.tournament import played_line
from self_judge.commands.train import jsft_trainer, save_jsft
from self_judge.config.self_training import SamplingSettings
from self_judge.console import Facts, NumberTable, ends, number, say, table
from self_judge.data import synthetic, toy_world
from self_judge.datatypes import Comparison, PreferenceRecord, Side, Verdict, stable_seed
from self_judge.evaluation.statistics import (
    Estimate,
    JudgeQuality,
    bootstrap_mean,
    judge_quality,
    win_rate,
)
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import judged_knockouts
from self_judge.models import load_model
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import write_json
from self_judge.storage.jsonl import read_lines, write_lines
from self_judge.storage.run_dir import BRACKETS, JUDGED, SUMMARY, rollout_files
from self_judge.training.callbacks import LiveProgress
from self_judge.training.reference import frozen_reference
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.trainer import SelfJudgeTrainer

SIZES = (1, 4, 16)  # the values of N for self-rejection
SHOWN_BRACKETS = 12  # number of tournaments saved for the report
SHOWN_PROMPTS = 3  # number of held-out prompts shown with answers: the first ones of the seed
RUBRIC = (
    "The gold rubric asks for a true answer, doubt ('I think'), a tip, and the last word "
    "that the prompt names."
)


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Sizes and hyperparameters of the demo. The results are in benchmarks/RESULTS.md."""

    jsft_records: int = 6000
    pairs_per_record: int = 2
    jsft_batch: int = 32
    jsft_learning_rate: float = 2e-3
    prompts_per_step: int = 64
    steps: int = 30
    learning_rate: float = 2e-4
    beta: float = 0.1
    max_new_tokens: int = 28
    held_out_pairs: int = 400
    held_out_prompts: int = 256
    judge_batch: int = 128


def run_demo(
    seed: int = 0,
    output: str | Path = "outputs/demo",
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Runs the demo and returns the contents of `output/summary.json`.

    Args:
        seed: seed for data, initial weights, sampling and brackets.
        output: folder for `jsft/`, `self_judge/`, `summary.json`, the held-out verdicts
            (`judged.jsonl`), a few tournaments (`brackets.jsonl`), and `report.html`. The sampled
            pairs in `self_judge/rollouts/` also get gold scores.
        settings: sizes and hyperparameters that replace the defaults.
        console: the console for progress and the result table.
    """
    started = time.perf_counter()
    console = console or Console()
    demo = Demo(seed, Path(output), settings or DemoSettings(), console)
    quiet()
    console.print(
        "[bold]self_judge demo[/bold]: a tiny model learns to answer and to judge, and then aligns "
        f"itself with its own judgments (seed {seed})"
    )
    jsft_model = demo.jsft()
    judge = demo.judge(jsft_model)
    with console.status("judging held-out pairs"):
        quality = demo.judge_quality(judge)
    policy = demo.self_training(jsft_model).model
    gold = demo.gold_scores(judge, policy)
    summary = _summary(seed, time.perf_counter() - started, quality, gold)
    write_json(demo.output / SUMMARY, summary)
    console.print(_table(summary))
    _print_examples(summary["examples"], console)
    say(
        console,
        f"{summary['seconds']:.0f} s in total; results written to {demo.output / SUMMARY}",
    )
    report_on(demo.output, console)
    return summary


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
        model = synthetic.tiny_model(self.encoder.tokenizer, self.seed)  # type: ignore[arg-type]
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

    def gold_scores(self, judge: Judge, policy: Any) -> _Gold:
        """Computes gold scores for the JSFT model, the policy and self-rejection."""
        seed, encoder, console = self.seed, self.encoder, self.console
        instructions = synthetic.instructions(self.settings.held_out_prompts, seed)
        prompts = [encoder.encode_prompt([{"role": "user", "content": i}]) for i in instructions]
        sampling = SamplingSettings(max_new_tokens=self.settings.max_new_tokens)
        seeds = [stable_seed(seed, "held-out", i) for i in range(len(prompts))]

        def scores(texts: Sequence[str]) -> list[float]:
            return [toy_world.gold_score(i, t) for i, t in zip(instructions, texts, strict=True)]

        jsft_model: Any = judge.model
        with console.status("the JSFT model answers held-out prompts"):
            sampler = TransformersSampler(jsft_model, encoder, sampling, 256)
            before = [own[0].text for own in sampler.sample(prompts, 1, seeds)]
        with console.status(f"the policy answers held-out prompts {max(SIZES)} times"):
            sampler = TransformersSampler(policy, encoder, sampling, 512)
            samples = [[r.text for r in own] for own in sampler.sample(prompts, max(SIZES), seeds)]
        by_size = {}
        for size in SIZES:
            with console.status(f"self-rejection among {size}"):
                own = [texts[:size] for texts in samples]
                brackets = judged_knockouts(judge, instructions, own, seeds=seeds)
                best = [texts[b.winner] for texts, b in zip(own, brackets, strict=True)]
            by_size[size] = scores(best)
        principles = judge.templates.principles
        shown = zip(instructions, own, brackets[:SHOWN_BRACKETS], strict=False)  # for the largest N
        write_lines(
            self.output / BRACKETS,
            (
                {
                    **played_line({"context": instruction}, texts, bracket, principles),
                    "gold_scores": [toy_world.gold_score(instruction, text) for text in texts],
                    "gold_reasons": [toy_world.gold_reasons(instruction, text) for text in texts],
                }
                for instruction, texts, bracket in shown
            ),
        )
        first = [texts[0] for texts in samples]
        answers = {"JSFT": before, "self-trained": first, f"best of {size}": best}
        examples = [
            {
                "prompt": instruction,
                "answers": [
                    {"by": name, "text": texts[i], **_rated(instruction, texts[i])}
                    for name, texts in answers.items()
                ],
            }
            for i, instruction in enumerate(instructions[:SHOWN_PROMPTS])
        ]
        return _Gold(scores(before), scores(first), by_size, examples)

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


@dataclass(frozen=True, slots=True)
class _Gold:
    """Gold scores, one per held-out prompt, and the answers to the first prompts."""

    jsft: list[float]
    self_judge: list[float]
    by_size: dict[int, list[float]]
    examples: list[dict[str, Any]]


def _rated(instruction: str, response: str) -> dict[str, Any]:
    return {
        "gold_score": toy_world.gold_score(instruction, response),
        "gold_reasons": toy_world.gold_reasons(instruction, response),
    }


def _with_gold(pair: dict[str, Any]) -> dict[str, Any]:
    """Returns the line of a sampled pair with the gold scores of both responses."""
    rated = {side: _rated(pair["context"], pair[side]) for side in ("chosen", "rejected")}
    return {**pair, **{f"{side}_{k}": v for side, own in rated.items() for k, v in own.items()}}


def _summary(seed: int, seconds: float, quality: JudgeQuality, gold: _Gold) -> dict[str, Any]:
    def mean(values: list[float]) -> dict[str, Any]:
        return _interval(bootstrap_mean(values, seed), "mean")

    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "judge": {
            "accuracy": quality.accuracy.value,
            "order_agreement": quality.order_agreement,
            "n": quality.accuracy.n,
        },
        "gold": {
            "jsft": mean(gold.jsft),
            "self_judge": mean(gold.self_judge),
            "self_judge_rejection": {str(n): mean(v) for n, v in gold.by_size.items()},
        },
        "win_rate_vs_jsft": _interval(win_rate(gold.self_judge, gold.jsft, seed), "value"),
        "rubric": RUBRIC,
        "examples": gold.examples,
    }


def _interval(estimate: Estimate, name: str) -> dict[str, Any]:
    return {name: estimate.value, "ci95": [estimate.low, estimate.high]}


def _table(summary: dict[str, Any]) -> NumberTable:
    judge, gold = summary["judge"], summary["gold"]

    def row(name: str, entry: dict[str, Any], key: str = "mean") -> tuple[str, str, str]:
        return name, number(entry[key]), ends(entry)

    return table(
        "on held-out prompts",
        ("", "value", "95% interval"),
        [
            (f"judge accuracy ({judge['n']} pairs)", number(judge["accuracy"])),
            ("judge order agreement", number(judge["order_agreement"])),
            None,
            row("gold score: JSFT", gold["jsft"]),
            row("gold score: self-trained", gold["self_judge"]),
            *(
                row(f"gold score: self-trained, best of {n}", entry)
                for n, entry in gold["self_judge_rejection"].items()
            ),
            None,
            row("win rate, self-trained against JSFT", summary["win_rate_vs_jsft"], "value"),
        ],
    )


def _print_examples(examples: Sequence[dict[str, Any]], console: Console) -> None:
    console.print(f"[bold]the first {len(examples)} held-out prompts[/bold]")
    say(console, RUBRIC)
    for example in examples:
        answers = {
            a["by"]: f"{a['text'] or '(empty)'}\ngold {a['gold_score']:.2f}: {a['gold_reasons']}"
            for a in example["answers"]
        }
        console.print()
        console.print(Facts({"prompt": example["prompt"], **answers}))
    console.print()


def quiet() -> None:
    """Silences the libraries' progress bars and messages, which would break the demo's display."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)

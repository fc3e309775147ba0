"""`self-judge demo`: the whole method on the synthetic world, and what it was worth.

Data, JSFT, self-training, self-rejection, evaluation against the gold rubric; nothing is
downloaded. Everything that the method needs is what any other run uses.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.utils import logging as datasets_logging
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from self_judge.commands.tournament import bracket_json
from self_judge.commands.train import jsft_trainer, save_jsft
from self_judge.config.self_training import SamplingSettings
from self_judge.console import ends, number, say, table
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
from self_judge.models import frozen_reference, load_model
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import atomic_write, write_json
from self_judge.storage.run_dir import BRACKETS, JUDGED
from self_judge.training.callbacks import LiveProgress
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.trainer import SelfJudgeTrainer

SIZES = (1, 4, 16)  # N of self-rejection
SHOWN_BRACKETS = 12  # tournaments kept for the report


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How much of everything; what was measured with it stands in benchmarks/RESULTS.md."""

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
    """Runs the demo; returns what it writes to `output/summary.json`.

    Args:
        seed: of data, initial weights, sampling and draws.
        output: gets `jsft/`, `self_judge/`, `summary.json`, the held-out verdicts and a few
            tournaments (`judged.jsonl`, `brackets.jsonl`), and `report.html`.
        settings: smaller or larger than the default.
        console: where to draw progress and the table.
    """
    started = time.perf_counter()
    settings = settings or DemoSettings()
    console = console or Console()
    output = Path(output)
    _quiet()
    console.print(
        "[bold]self_judge demo[/bold]: a tiny model learns to answer and to judge, then aligns "
        f"itself with its own judgments (seed {seed})"
    )
    encoder = ChatEncoder(synthetic.tiny_tokenizer())
    # The model learns to judge under each principle and in general; then the general judgment
    # alone is asked for, which costs two prompts a pair instead of eight.
    taught = synthetic.judge_templates(overall=True)
    templates = synthetic.judge_templates(principles=False, overall=True)
    jsft_model = _jsft(seed, output / "jsft", encoder, taught, settings, console)
    judge = Judge(frozen_reference(jsft_model), encoder, templates, batch_size=settings.judge_batch)
    with console.status("judging held-out pairs"):
        quality = _judge_quality(judge, seed, settings.held_out_pairs, output)
    policy = _self_training(
        jsft_model, seed, output / "self_judge", encoder, templates, settings, console
    )
    gold = _gold_scores(judge, policy, encoder, seed, settings, console, output)
    summary = _summary(seed, time.perf_counter() - started, quality, gold)
    write_json(output / "summary.json", summary)
    console.print(_table(summary))
    say(console, f"{summary['seconds']:.0f} s in all; written to {output}/summary.json")
    report_on(output, console)
    return summary


def _jsft(
    seed: int,
    output: Path,
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    settings: DemoSettings,
    console: Console,
) -> Any:
    model = synthetic.tiny_model(encoder.tokenizer, seed)  # type: ignore[arg-type]
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
        **_common_args(seed),
    )
    records = [
        _taught_pairs(r, settings.pairs_per_record, seed)
        for r in synthetic.records(settings.jsft_records, seed, writers=2)
    ]
    trainer = jsft_trainer(model, encoder, templates, records, None, args, max_length=512)
    LiveProgress("JSFT         ", console).attach(trainer)
    trainer.train()
    save_jsft(trainer, encoder, templates, merge=False)
    return load_model(output, device="auto")


def _taught_pairs(record: PreferenceRecord, count: int, seed: int) -> PreferenceRecord:
    """The general pair under its own template, and `count` of the principles' pairs."""
    general, *specific = record.pairs
    chosen = random.Random(stable_seed(seed, "pairs", record.index)).sample(
        specific, min(count, len(specific))
    )
    pairs = (dataclasses.replace(general, principle=synthetic.OVERALL), *chosen)
    return dataclasses.replace(record, pairs=pairs)


def _judge_quality(judge: Judge, seed: int, n: int, output: Path) -> JudgeQuality:
    """The general judgment on pairs of prompts that were never trained on."""
    cases = []
    for record in synthetic.records(n, seed, "test", writers=2):
        pair = next(p for p in record.pairs if p.principle is None)
        cases.append(Comparison(record.prompt[-1]["content"], pair.chosen, pair.rejected))
    verdicts = judge.compare(cases)
    with atomic_write(output / JUDGED) as file:
        for case, verdict in zip(cases, verdicts, strict=True):
            file.write(json.dumps(judged_line(case, verdict, gold="a"), ensure_ascii=False) + "\n")
    return judge_quality(verdicts)


def judged_line(comparison: Comparison, verdict: Verdict, gold: Side) -> dict[str, Any]:
    """A verdict on a pair of which `gold` is known to be the better, as plain data."""
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


def _self_training(
    jsft_model: Any,
    seed: int,
    output: Path,
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    settings: DemoSettings,
    console: Console,
) -> Any:
    count = settings.prompts_per_step * settings.steps
    prompts = [
        {"prompt": [{"role": "user", "content": record.prompt[-1]["content"]}]}
        for record in synthetic.records(count, stable_seed(seed, "prompts"))
    ]
    trainer = SelfJudgeTrainer(
        model=jsft_model,
        args=SelfJudgeConfig(
            str(output),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts_per_step,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=0.1,
            beta=settings.beta,
            max_new_tokens=settings.max_new_tokens,
            top_p=1.0,
            max_length=512,
            generation_batch_size=256,
            judge_batch_size=settings.judge_batch,
            logging_steps=1,
            **_common_args(seed),
        ),
        processing_class=encoder.tokenizer,
        encoder=encoder,
        judge_templates=templates,
        train_dataset=Dataset.from_list(prompts),
    )
    LiveProgress("self-training", console).attach(trainer)
    trainer.train()
    trainer.save_model(str(output))
    return trainer.model


@dataclass(frozen=True, slots=True)
class _Gold:
    """Gold scores per held-out prompt."""

    jsft: list[float]
    self_judge: list[float]
    by_size: dict[int, list[float]]


def _gold_scores(
    judge: Judge,
    policy: Any,
    encoder: ChatEncoder,
    seed: int,
    settings: DemoSettings,
    console: Console,
    output: Path,
) -> _Gold:
    instructions = synthetic.instructions(settings.held_out_prompts, seed)
    prompts = [encoder.encode_prompt([{"role": "user", "content": i}]) for i in instructions]
    sampling = SamplingSettings(max_new_tokens=settings.max_new_tokens)
    seeds = [stable_seed(seed, "held-out", i) for i in range(len(prompts))]

    def scores(texts: Sequence[str]) -> list[float]:
        return [toy_world.gold_score(i, t) for i, t in zip(instructions, texts, strict=True)]

    jsft_model: Any = judge.model
    with console.status("JSFT answers held-out prompts"):
        before = TransformersSampler(jsft_model, encoder, sampling, 256).sample(prompts, 1, seeds)
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
    principles = list(judge.templates.principles)
    with atomic_write(output / BRACKETS) as file:  # of the largest N
        for i, bracket in enumerate(brackets[:SHOWN_BRACKETS]):
            line = {
                "context": instructions[i],
                "responses": own[i],
                "winner": bracket.winner,
                "response": best[i],
                "principles": principles,
                "gold_scores": [toy_world.gold_score(instructions[i], t) for t in own[i]],
                "bracket": bracket_json(bracket),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return _Gold(scores([r.text for (r,) in before]), scores([t[0] for t in samples]), by_size)


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
    }


def _interval(estimate: Estimate, name: str) -> dict[str, Any]:
    return {name: estimate.value, "ci95": [estimate.low, estimate.high]}


def _table(summary: dict[str, Any]) -> Table:
    judge, gold = summary["judge"], summary["gold"]

    def row(name: str, entry: dict[str, Any], key: str = "mean") -> tuple[str, str, str]:
        return name, number(entry[key]), ends(entry)

    return table(
        "on prompts never trained on",
        ("", "value", "95 % interval"),
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


def _common_args(seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }


def _quiet() -> None:
    """The demo draws its own progress; the libraries' bars and notes would tear it apart."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)

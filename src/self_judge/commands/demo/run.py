"""Runs the steps of the demo, and evaluates the models and self-rejection with the gold rubric."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from self_judge.commands.demo.steps import Demo, DemoSettings, quiet, rated
from self_judge.commands.tournament import played_line
from self_judge.config.self_training import SamplingSettings
from self_judge.console import Facts, NumberTable, Terminal, ends, number, say, table
from self_judge.data import synthetic, toy_world
from self_judge.datatypes import stable_seed
from self_judge.evaluation.statistics import (
    Estimate,
    JudgeQuality,
    bootstrap_mean,
    win_rate,
)
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import Bracket, judged_knockouts
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import writable_to, write_json
from self_judge.storage.jsonl import write_lines
from self_judge.storage.run_dir import BRACKETS, SUMMARY

SIZES = (1, 4, 16)  # the values of N for self-rejection
# The weight of the mean log π per token beside the judge's log odds. π is the initial model: the
# policy has learned what the judge overrates, and the initial model has not. A sum over tokens
# would prefer short responses (docs/evidence.md).
PRIOR_WEIGHT = 5.0
SHOWN_BRACKETS = 12  # number of tournaments saved for the report
SHOWN_PROMPTS = 3  # number of held-out prompts shown with answers: the first ones of the seed
RUBRIC = (
    "The gold rubric asks for a true answer, doubt ('I think'), a tip unless the prompt says 'Be "
    "brief', and the first or last word that the prompt names."
)


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

    Raises:
        ValueError: something else stands in place of the output folder.
    """
    started = time.perf_counter()
    console = console or Terminal()
    demo = Demo(seed, Path(output), settings or DemoSettings(), console)
    writable_to(demo.output)
    quiet()
    console.print(
        "[bold]self_judge demo[/bold]: a tiny model learns to answer and to judge, and then aligns "
        f"itself with its own judgments (seed {seed})"
    )
    summary = from_jsft_on(demo, demo.jsft())
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_json(demo.output / SUMMARY, summary)
    console.print(_table(summary))
    _print_examples(summary["examples"], console)
    say(
        console,
        f"{summary['seconds']:.0f} s in total; results written to {demo.output / SUMMARY}",
    )
    report_on(demo.output, console)
    return summary


def from_jsft_on(demo: Demo, jsft_model: Any) -> dict[str, Any]:
    """Runs the steps after JSFT, and returns the summary without the seconds.

    Self-training changes `jsft_model`.
    """
    judge = demo.judge(jsft_model)
    with demo.console.status("judging held-out pairs"):
        quality = demo.judge_quality(judge)
    policy = demo.self_training(jsft_model).model
    return _summary(demo.seed, quality, _gold_scores(demo, judge, policy))


@dataclass(frozen=True, slots=True)
class _Gold:
    """Gold scores, one per held-out prompt, and the answers to the first prompts."""

    jsft: list[float]
    self_judge: list[float]
    by_size: dict[int, list[float]]  # self-rejection with a prior
    by_judge: dict[int, list[float]]  # self-rejection as in the paper, by the judge alone
    examples: list[dict[str, Any]]


def _gold_scores(demo: Demo, judge: Judge, policy: Any) -> _Gold:
    """Returns gold scores of the JSFT model, the policy and self-rejection."""
    seed, encoder, console = demo.seed, demo.encoder, demo.console
    instructions = synthetic.instructions(demo.settings.held_out_prompts, seed)
    prompts = [encoder.encode_prompt([{"role": "user", "content": i}]) for i in instructions]
    sampling = SamplingSettings(max_new_tokens=demo.settings.max_new_tokens)
    seeds = [stable_seed(seed, "held-out", i) for i in range(len(prompts))]

    def scores(texts: Sequence[str]) -> list[float]:
        return [toy_world.gold_score(i, t) for i, t in zip(instructions, texts, strict=True)]

    jsft_model: Any = judge.model
    with console.status("the JSFT model answers held-out prompts"):
        sampler = TransformersSampler(jsft_model, encoder, sampling, 256)
        before = [own[0].text for own in sampler.sample(prompts, 1, seeds)]
    with console.status(f"the policy answers held-out prompts {max(SIZES)} times"):
        sampled = TransformersSampler(policy, encoder, sampling, 512).sample(
            prompts, max(SIZES), seeds
        )
        means = sampler.mean_log_probs(prompts, sampled)
        priors = [[PRIOR_WEIGHT * mean for mean in own] for own in means]
    samples = [[r.text for r in own] for own in sampled]

    def knockouts(size: int, weighed: bool) -> tuple[list[Bracket], list[str]]:
        own = [texts[:size] for texts in samples]
        prior = [values[:size] for values in priors] if weighed else None
        with console.status(f"self-rejection among {size}"):
            brackets = judged_knockouts(judge, instructions, own, seeds=seeds, priors=prior)
        return brackets, [texts[b.winner] for texts, b in zip(own, brackets, strict=True)]

    by_judge = {size: scores(knockouts(size, weighed=False)[1]) for size in SIZES if size > 1}
    by_size = {}
    for size in SIZES:
        brackets, best = knockouts(size, weighed=True)
        by_size[size] = scores(best)
    principles = judge.templates.principles
    shown = zip(instructions, samples, priors, brackets[:SHOWN_BRACKETS], strict=False)
    write_lines(
        demo.output / BRACKETS,
        (
            {
                **played_line({"context": instruction}, texts, bracket, principles),
                "prior": prior,
                "gold_scores": [toy_world.gold_score(instruction, text) for text in texts],
                "gold_reasons": [toy_world.gold_reasons(instruction, text) for text in texts],
            }
            for instruction, texts, prior, bracket in shown
        ),
    )
    first = [texts[0] for texts in samples]
    answers = {"JSFT": before, "self-trained": first, f"best of {size}": best}
    examples = [
        {
            "prompt": instruction,
            "answers": [
                {"by": name, "text": texts[i], **rated(instruction, texts[i])}
                for name, texts in answers.items()
            ],
        }
        for i, instruction in enumerate(instructions[:SHOWN_PROMPTS])
    ]
    return _Gold(scores(before), scores(first), by_size, by_judge, examples)


def _summary(seed: int, quality: JudgeQuality, gold: _Gold) -> dict[str, Any]:
    def mean(values: list[float]) -> dict[str, Any]:
        return _interval(bootstrap_mean(values, seed), "mean")

    return {
        "seed": seed,
        "judge": {
            "accuracy": quality.accuracy.value,
            "order_agreement": quality.order_agreement,
            "n": quality.accuracy.n,
        },
        "gold": {
            "jsft": mean(gold.jsft),
            "self_judge": mean(gold.self_judge),
            "self_judge_rejection": {str(n): mean(v) for n, v in gold.by_size.items()},
            "without_prior": {str(n): mean(v) for n, v in gold.by_judge.items()},
        },
        "prior_weight": PRIOR_WEIGHT,
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
                if n != "1"
            ),
            *(
                row(f"  by the judge alone, best of {n}", entry)
                for n, entry in gold["without_prior"].items()
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

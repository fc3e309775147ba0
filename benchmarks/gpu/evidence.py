"""SmolLM2 for real: JSFT on all HH pairs at hand, the judge before and after, self-training."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from measuring import Check, clean, gib, peak, seconds_of
from project import (
    ROOT,
    Judge,
    bench,
    evaluate_judge,
    load_preferences,
    load_run,
    run_jsft,
    run_self_judge,
    split,
)
from rich.console import Console

SECONDS_A_STEP = 5  # of self-training, generously: fewer than 30 steps where time is short
HELD_OUT = 1040  # records, of which some have no pair
LOGGED = ("time", "judge", "rewards", "tokens_per_second", "objective", "completions")


def evidence(check: Check) -> None:
    """Full fine-tuning in float32 weights and bf16, then self-training with LoRA."""
    if not (check.model / "model.safetensors").is_file():
        check.say(skipped=f"no model in {check.model}, a tokenizer at most")
        return
    work = Path(tempfile.mkdtemp())
    with (check.out / "evidence.log").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=120)
        train, test = split(check.data, work, 0 if check.tiny else HELD_OUT)
        held_out = load_preferences(str(test)).records
        taught = work / "jsft"
        _judged(check, "before JSFT", check.model, held_out, bench.templates_of())
        _jsft(check, train, taught, console)
        _judged(check, "after JSFT", taught, held_out)
        policy = work / "self_judge"
        try:
            _self_training(check, train, taught, policy, console)
        finally:
            for folder in (taught, policy):
                for name in ("metrics.jsonl", "run.json"):
                    if (folder / name).is_file():
                        shutil.copy(folder / name, check.out / f"{folder.name}-{name}")


def _judged(check: Check, step: str, model: Path, records: Any, templates: Any = None) -> None:
    clean()
    dtype = "float32" if check.tiny else "bfloat16"
    judge = Judge.from_pretrained(model, templates, max_length=1024, dtype=dtype)
    seconds, quality = seconds_of(lambda: evaluate_judge(judge, records))
    check.say(
        step=f"judge {step}",
        seconds=round(seconds, 1),
        pairs=quality.accuracy.n,
        accuracy=str(quality.accuracy),
        one_order=round(quality.single_order, 3),
        order_agreement=round(quality.order_agreement, 3),
    )


def _common(check: Check, train: Path, output: Path) -> list[str]:
    few = ["dataset.max_records=8", "training_args.max_steps=1"] if check.tiny else []
    return [
        *few,
        f"dataset.sources=[{{path: {train}, kind: hh}}]",
        "dataset.eval=[]",
        f"training_args.output_dir={output}",
        "training_args.eval_strategy=no",
        "training_args.save_strategy=no",
        "training_args.gradient_checkpointing=false",
        f"training_args.bf16={not check.tiny}",
        "training_args.disable_tqdm=true",
        f"training_args.per_device_train_batch_size={4 if check.tiny else 32}",
    ]


def _jsft(check: Check, train: Path, output: Path, console: Console) -> None:
    run = load_run(
        ROOT / "configs/hh_jsft.yaml",
        [
            *_common(check, train, output),
            f"model.model_name_or_path={check.model}",
            "model.dtype=float32",
            "peft_config=null",
            "training_args.learning_rate=5e-5",
            f"jsft_args.global_batch_size={4 if check.tiny else 64}",
            "jsft_args.max_length=768",
        ],
        "jsft",
    )
    clean()
    seconds, _ = seconds_of(lambda: run_jsft(run, console))
    logged = _metrics(output)
    steps = max((line.get("step", 0) for line in logged), default=0)
    losses = [round(line["loss"], 4) for line in logged if "loss" in line]
    check.say(step="JSFT", steps=steps, seconds=round(seconds, 1), peak_gib=gib(peak()),
              losses=losses[:: max(1, len(losses) // 10)])  # fmt: skip


def _self_training(check: Check, train: Path, taught: Path, output: Path, console: Console) -> None:
    fit = max(6, min(30, int((check.left() - 20) / SECONDS_A_STEP))) if not check.tiny else 1
    steps = f"training_args.max_steps={fit}"
    run = load_run(
        ROOT / "configs/hh_self_judge.yaml",
        [
            *_common(check, train, output),
            steps,
            f"model.model_name_or_path={taught}",
            "training_args.learning_rate=5e-5",
            "training_args.logging_steps=1",
            f"self_judge_args.global_batch_size={4 if check.tiny else 64}",
            "self_judge_args.max_length=512",
            f"self_judge_args.max_new_tokens={6 if check.tiny else 128}",
            "self_judge_args.generation_batch_size=128",
        ],
        "self_judge",
    )
    clean()
    seconds, _ = seconds_of(lambda: run_self_judge(run, console))
    logged = [line for line in _metrics(output) if "time/sampling" in line]
    told = {}
    for place, line in (("first", logged[0]), ("last", logged[-1])):
        told[place] = {k: _short(v) for k, v in line.items() if k.split("/")[0] in LOGGED}
    check.say(step="self-training", steps=len(logged), seconds=round(seconds, 1),
              peak_gib=gib(peak()), **told)  # fmt: skip


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value

"""How the cost of an optimizer step grows, one quantity at a time, and which phase pays for it.

Each point is one step of SelfJudgeTrainer with LoRA on real HH prompts. A line is fitted per
quantity: seconds = a + b × quantity. Model size is of random weights in Llama's shape.

    python benchmarks/scaling.py [--axis prompts] [--plot docs/scaling.svg]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import side_by_side as bench
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.training.callbacks import PHASES

BASE = {"prompts": 4, "K": 2, "tokens": 32, "principles": 1, "layers": 30}
AXES = {
    "prompts": [2, 4, 8],
    "K": [2, 4, 8],
    "tokens": [16, 32, 64, 128],
    "principles": [1, 2, 4],
    "layers": [8, 16, 30],
}


def step_seconds(given: argparse.Namespace, encoder: Any, point: dict[str, int]) -> dict[str, Any]:
    """Seconds of each phase of the second step, and the tokens sampled in it a second."""
    template = next(iter(bench.templates_of().to_dict()["judge"].values()))
    templates = {f"principle {i}": {**template, "user": template["user"] + " " * i}
                 for i in range(point["principles"])}  # fmt: skip
    rows = [
        {"prompt": [dict(m) for m in r.prompt]} for r in bench.records_of(given, point["prompts"])
    ]
    torch.manual_seed(0)
    trainer = SelfJudgeTrainer(
        model=model_of(given, point["layers"]),
        args=SelfJudgeConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=min(4, point["prompts"]),
            gradient_accumulation_steps=max(1, point["prompts"] // 4),
            num_generations=point["K"],
            max_new_tokens=point["tokens"],
            max_length=1024,
            max_steps=2,
            **bench.quiet(given),
        ),
        processing_class=encoder.tokenizer,
        judge_templates=templates,
        train_dataset=Dataset.from_list(rows),
        peft_config=bench.lora(),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "time/update" in entry][-1]
    return {
        **{phase: logged[f"time/{phase}"] for phase in PHASES},
        "rate": logged["tokens_per_second/step"],
    }


def model_of(given: argparse.Namespace, layers: int) -> Any:
    """The model itself, or its shape with fewer layers and random weights."""
    known = AutoConfig.from_pretrained(given.model)
    if layers == known.num_hidden_layers:
        return bench.model_of(given)
    config = LlamaConfig(**{**known.to_dict(), "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype))


def fitted(values: list[int], seconds: list[float]) -> str:
    """The line through the points, and how much of their variance it explains."""
    slope, start = np.polyfit(values, seconds, 1)
    rest = np.array(seconds) - (start + slope * np.array(values))
    explained = 1 - rest.var() / max(np.var(seconds), 1e-12)
    return f"{start:.2f} s + {slope:.3f} s each (R² {explained:.3f})"


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Stacked phases against each quantity, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3 * len(results), 3), squeeze=False)
    for ax, (name, points) in zip(axes[0], results.items(), strict=True):
        bottom = np.zeros(len(points))
        ticks = range(len(points))
        for phase in PHASES:
            height = np.array([p[phase] for p in points])
            if phase != "waiting":
                ax.bar(ticks, height, 0.7, bottom=bottom, label=phase)
            bottom += height
        ax.set_xticks(ticks, [str(p["value"]) for p in points])
        ax.set_xlabel(name)
    axes[0][0].set_ylabel("seconds a step")
    axes[0][0].legend(frameon=False, fontsize=8)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """All points of the quantities asked for, their fits and the picture."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--axis", choices=[*AXES], action="append")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--points", type=Path, help="JSON file to which the points are added")
    own, rest = parser.parse_known_args()
    given = bench.arguments(__doc__, (), argv=rest)
    encoder = bench.encoder_of(given)
    kept = own.points and own.points.is_file()
    results: dict[str, list[dict[str, Any]]] = json.loads(own.points.read_text()) if kept else {}
    for axis in own.axis or AXES:
        results[axis] = []
        for value in AXES[axis]:
            point = step_seconds(given, encoder, {**BASE, axis: value})
            results[axis].append({"value": value, **point})
            total = sum(point[phase] for phase in PHASES)
            shares = ", ".join(f"{p} {100 * point[p] / total:.0f}%" for p in PHASES)
            print(f"{axis} {value}: {total:.2f} s, {point['rate']:.1f} tokens/s; {shares}")
        for phase in (*PHASES, "step"):
            seconds = [
                sum(p[x] for x in PHASES) if phase == "step" else p[phase] for p in results[axis]
            ]
            if phase != "waiting":
                print(f"  {phase}: {fitted(AXES[axis], seconds)}")
        if own.points:
            own.points.write_text(json.dumps(results, indent=1))
    if own.plot:
        plot(results, own.plot)


if __name__ == "__main__":
    main()

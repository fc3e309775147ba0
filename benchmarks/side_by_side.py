"""What the benchmarks of packing share: models, real pairs, alternating timing, the floor, memory.

The floor of a piece of work is the time of its matrix products alone, for its unique tokens, at the
rate at which this machine multiplies the model's own matrices.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from self_judge import ChatEncoder, Comparison, Judge, JudgeTemplates
from self_judge.config.schema import load_run
from self_judge.data.records import judge_context
from self_judge.data.sources import load_preferences
from self_judge.models import load_model, load_tokenizer
from self_judge.packing.packing import Packing
from self_judge.packing.pass_size import attention_share, tokens_per_pass
from self_judge.packing.prefix_tree import prefix_rows
from self_judge.prompting.judge_prompt import encode_orders

ROOT = Path(__file__).parents[1]
# Only the shape counts for speed: weights are random.
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip


def arguments(
    description: str | None,
    sides: Sequence[str],
    argv: Sequence[str] | None = None,
    **defaults: int | str,
) -> argparse.Namespace:
    """The options that all have, and one per default, of its type.

    `memory` is the peak of each side, measured at once: in processes of their own, while this one
    holds no model yet. `sides` are those to run here: one of them in such a process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(ROOT / "outputs/real/smollm2"), help="a folder")
    parser.add_argument("--shape", choices=[*SHAPES], help="random weights of this size instead")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hh-rlhf")
    parser.add_argument("--tools", type=Path, default=ROOT.parent / "shared/tools")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="run one side once, for its peak memory")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = parser.parse_args(argv)
    given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not given.data.is_dir():
        sys.exit(f"the real data is not at {given.data}: give its place with --data")
    folder = Path(given.model)
    if not (folder / "config.json").is_file():
        subprocess.run([sys.executable, str(given.tools / "smollm2.py"), str(folder)], check=True)
    given.sides = [given.only] if given.only else list(sides)
    given.memory = None if given.only else _peaks(sides)
    return given


def model_of(given: argparse.Namespace) -> Any:
    """The model named, or one of the shape asked for."""
    dtype = getattr(torch, given.dtype)
    if given.shape is None:
        return load_model(given.model, dtype=dtype, device=given.device)
    known = AutoConfig.from_pretrained(given.model)
    config = LlamaConfig(vocab_size=known.vocab_size, max_position_embeddings=4096,
                         **SHAPES[given.shape])  # fmt: skip
    with torch.device(given.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def encoder_of(given: argparse.Namespace) -> ChatEncoder:
    """The tokenizer's own chat template."""
    return ChatEncoder(load_tokenizer(given.model))


def templates_of() -> JudgeTemplates:
    """The judge template of the HH run file."""
    templates = load_run(ROOT / "configs/hh_jsft.yaml", [], "jsft").templates.judge_templates()
    assert templates is not None
    return templates


def records_of(given: argparse.Namespace, count: int) -> list[Any]:
    """Real preference records, in their own order."""
    path = given.data / "base_test_1000.jsonl.gz"
    return [r for r in load_preferences(str(path), max_records=2 * count).records if r.pairs][
        :count
    ]


def comparisons_of(records: Sequence[Any]) -> list[Comparison]:
    """Chosen against rejected, of each record."""
    pairs = [(judge_context(r), p) for r in records for p in r.pairs]
    return [Comparison(context, p.chosen, p.rejected) for context, p in pairs]


def alternating(
    sides: dict[str, Callable[[], Any]], given: argparse.Namespace
) -> tuple[dict[str, list[float]], list[Any]]:
    """Seconds of each side, turn by turn, and what each gave in a first turn to warm up.

    Run for the memory of one side, it runs that once, prints its peak and leaves.
    """
    if given.only:
        sides[given.only]()
        print("peak", peak(given))
        sys.exit()
    results = [work() for work in sides.values()]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, work in sides.items():
            _wait(given.device)
            started = time.perf_counter()
            work()
            _wait(given.device)
            seconds[name].append(time.perf_counter() - started)
    return seconds, results


def _wait(device: Any) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def judge_prompts(judge: Judge, comparisons: Sequence[Comparison]) -> list[list[int]]:
    """Ids of every comparison under every principle, in both orders."""
    encoded = [
        encode_orders(judge.encoder, judge.templates, principle, comparison, judge.max_length)
        for comparison in comparisons
        for principle in judge.templates
    ]
    return [ids for orders in encoded if orders for ids in orders]


def losses_of(trainer: Any, batches: Sequence[dict[str, torch.Tensor]]) -> list[float]:
    """The trainer's own loss of every batch, each with its backward pass."""
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
    trainer.model.zero_grad()
    return losses


def gap(results: Sequence[Sequence[float]]) -> str:
    """How far two sides' losses are apart."""
    ours, theirs = results
    return (
        f"losses differ by at most {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e}"
    )


def way(packing: Packing) -> str:
    """How prefixes were shared, and in passes of how many tokens."""
    tokens = packing.shape.batch_tokens or tokens_per_pass(packing.inner)
    return f"{packing.describe()}; passes of {tokens} tokens"


def quiet(given: argparse.Namespace) -> dict[str, Any]:
    """A trainer's settings by which it computes in the model's own dtype and writes nothing."""
    return {
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": given.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "save_rollouts": False,
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def lora() -> LoraConfig:
    """The adapter of both sides."""
    return LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")


def unique_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Nodes of the one prefix tree of all sequences: nothing computes fewer."""
    return sum(len(r) for r in prefix_rows(sequences, sys.maxsize))


def matrix_rate(model: Any, tokens: int = 1024, dtype: torch.dtype | None = None) -> float:
    """FLOPs per second at which this machine multiplies the model's own matrices.

    Args:
        dtype: what they are multiplied in; default: their own.
    """
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    shapes = {tuple(m.weight.shape) for m in layers}
    weights = [next(m.weight for m in layers if tuple(m.weight.shape) == s) for s in shapes]
    weights = [w.to(dtype or w.dtype) for w in weights]
    counts = [sum(tuple(m.weight.shape) == s for m in layers) for s in shapes]
    inputs = [torch.randn(tokens, w.shape[1], dtype=w.dtype, device=w.device) for w in weights]
    total, work = 0.0, 0.0
    with torch.no_grad():
        for x, weight, count in zip(inputs, weights, counts, strict=True):
            if weight.shape[0] > 8 * weight.shape[1]:
                continue  # the LM head sees few tokens
            times = []
            for _ in range(12):
                _wait(x.device)
                started = time.perf_counter()
                for _ in range(5):
                    torch.nn.functional.linear(x, weight)
                _wait(x.device)
                times.append((time.perf_counter() - started) / 5)
            total += count * statistics.median(times)
            work += count * 2.0 * tokens * weight.numel()
    return work / total


def flops(model: Any, sequences: Sequence[Sequence[int]], heads: int) -> float:
    """Of one forward pass over the unique tokens, `heads` of them through the LM head."""
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    inside = sum(matrices) - head
    rows = prefix_rows(sequences, sys.maxsize)
    tokens = sum(len(r) for r in rows)
    met = sum(int((r.positions + 1).sum()) for r in rows)
    return 2.0 * inside * (tokens + attention_share(model) * met) + 2.0 * head * heads


def peak(given: argparse.Namespace) -> float:
    """Peak memory of this process so far, in GiB: on the GPU if there is one, else resident."""
    if given.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _peaks(sides: Sequence[str]) -> dict[str, float]:
    """Peak memory of each side, each in a process of its own that runs it once."""
    found = {}
    for side in sides:
        command = [sys.executable, *sys.argv, "--only", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[side] = float(output.rsplit("peak", 1)[1])
    return found


def report(
    title: str,
    given: argparse.Namespace,
    seconds: dict[str, list[float]],
    *,
    limit: float | None,
    floor: float | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Medians, their ratio, what sharing allows at most (`limit`), the share of the floor."""
    ours, theirs = list(seconds)
    memory = given.memory
    median = {name: statistics.median(times) for name, times in seconds.items()}
    model = given.shape or Path(given.model).name
    print(f"\n{title}: {model}, {given.dtype}, {given.device}, {torch.get_num_threads()} threads")
    print(f"  {platform.processor() or platform.machine()}; torch {torch.__version__}, "
          f"transformers {transformers.__version__}")  # fmt: skip
    for name, times in seconds.items():
        spread = f"{min(times):.2f}–{max(times):.2f}"
        held = f", {memory[name]:.2f} GiB peak"
        print(f"  {name:<28} {median[name]:8.2f} s (of {len(times)}: {spread}){held}")
    allowed = "" if limit is None else f"; computed / unique tokens {limit:.2f}"
    print(f"  ratio {median[theirs] / median[ours]:.2f}{allowed}")
    print(f"  memory ratio {memory[ours] / memory[theirs]:.2f}")
    if floor is not None:
        print(f"  floor {floor:.2f} s; {100 * floor / median[ours]:.0f}% of it reached")
    for note in notes:
        print(f"  {note}")

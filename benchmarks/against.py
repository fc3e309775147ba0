"""This checkout against another commit: the same work in turn, each side in a process of its own.

Each process runs the benchmarks of its own commit, which know where its modules are, on the same
model and data, and waits for its turn. Commits before 850bd10 lack this script. The rate of the
model's matrix products is measured after every round; the floor is the FLOPs of the unique tokens
at that rate. SmolLM2 on real HH records, LoRA r 8 on all linear layers in training.

    python benchmarks/against.py --work jsft [--dtype bf16] [--rounds 5] [--commit 94f1291]

`--work` is one of
- `jsft`, `update`: forward and backward pass, as `jsft.py` and `update.py` do on the packed side;
- `jsft-full`: `jsft` of all weights, which stay float32;
- `judge`: both orders of `--batch` × `--batches` pairs;
- `tournament`: the rounds of a bracket of 16 real responses to each of `--batches` contexts;
- `sampling`: 4 responses of at most 64 tokens to each of `--batch` prompts.

`--dtype bf16` is how the shipped run files compute: bfloat16 weights (float32 in `jsft-full`), and
training under autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import side_by_side as bench
from self_judge import Comparison, Judge, SelfJudgeTrainer
from self_judge.config.self_training import SamplingSettings
from self_judge.data.records import judge_context
from self_judge.inference.sampling import TransformersSampler
from self_judge.training.jsft.trainer import JSFTTrainer


@dataclasses.dataclass
class Work:
    """What a side does in its turn.

    Attributes:
        run: does it once and gives what came out, as numbers.
        inner: the model that computes.
        flops: of the unique tokens; what only this checkout is asked for.
    """

    run: Callable[[], list[float]]
    inner: Any
    flops: Callable[[], float]


def training(given: argparse.Namespace) -> Work:
    """A step of either trainer, as it runs within `train`."""
    import jsft
    import update

    full = given.work == "jsft-full"
    if given.work == "update":
        pairs = update.pairs_of(given)
        trainer = update.trainer_of(SelfJudgeTrainer, given, pairs, bf16=given.bf16)
        inputs, forwards = pairs.inputs, 3  # the reference's, the policy's and back
    else:
        examples = jsft.examples_of(given)
        trainer = jsft.trainer_of(JSFTTrainer, given, examples, lora=not full, bf16=given.bf16)
        inputs, forwards = examples.inputs, 3 if full else 2  # frozen weights take no gradient
    generator = torch.Generator().manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first: then there is nothing to compare
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator).to(weight)
    trainer.accelerator.prepare_model(trainer.model)  # as `train` does: autocast
    inner = trainer.model if full else trainer.model.get_base_model()

    def flops() -> float:
        once = (
            update.needed_flops(inner, pairs)
            if given.work == "update"
            else jsft.needed_flops(inner, examples)
        )
        return forwards * once

    return Work(lambda: bench.losses_of(trainer, inputs), inner, flops)


def judging(given: argparse.Namespace) -> Work:
    """All rounds of tournaments, or a single round of comparisons."""
    judge = Judge(
        bench.model_of(given).eval(), bench.encoder_of(given), bench.templates_of(), max_length=1024
    )
    rounds: list[list[Comparison]] = []
    if given.work == "judge":
        rounds.append(bench.comparisons_of(bench.records_of(given, given.batch * given.batches)))
    else:
        records = bench.records_of(given, 8 * given.batches)
        texts = [
            side for c in bench.comparisons_of(records) for side in (c.response_a, c.response_b)
        ]
        left = [
            (judge_context(records[i]), texts[16 * i : 16 * i + 16]) for i in range(given.batches)
        ]
        while len(left[0][1]) > 1:
            rounds.append(
                [
                    Comparison(context, *own[i : i + 2])
                    for context, own in left
                    for i in range(0, len(own), 2)
                ]
            )
            # By place, so that both sides judge the same whatever they find.
            left = [(context, own[::2]) for context, own in left]
    prompts = [bench.judge_prompts(judge, comparisons) for comparisons in rounds]
    every = [p for own in prompts for p in own]

    def run() -> list[float]:
        with judge.prefix_cache() if len(rounds) > 1 else contextlib.nullcontext():
            found = [judge.letter_probabilities(p) for p in prompts]
        return [float(p) for p in torch.cat(found).flatten()]

    inner = judge.packing.inner
    return Work(run, inner, lambda: bench.flops(inner, every, len(every)))


def sampling(given: argparse.Namespace) -> Work:
    """Samples; what came out is their lengths."""
    model, encoder = bench.model_of(given).eval(), bench.encoder_of(given)
    settings = SamplingSettings(max_new_tokens=64, top_p=0.9)
    sampler = TransformersSampler(model, encoder, settings)
    prompts = [encoder.encode_prompt(r.prompt) for r in bench.records_of(given, given.batch)]
    drawn: list[Any] = []

    def run() -> list[float]:
        drawn[:] = sampler.sample(prompts, 4, seeds=0)
        return [float(len(r.ids)) for own in drawn for r in own]

    def flops() -> float:
        run()
        sequences = [[*p, *r.ids[:-1]] for p, own in zip(prompts, drawn, strict=True) for r in own]
        return bench.flops(model, sequences, sum(len(r.ids) for own in drawn for r in own))

    return Work(run, model, flops)


WORKS = {
    "jsft": training,
    "jsft-full": training,
    "update": training,
    "judge": judging,
    "tournament": judging,
    "sampling": sampling,
}


# -- a side, in its own process --------------------------------------------------------------------


def wait_for_turns(given: argparse.Namespace) -> None:
    """Answers each line of standard input with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    work = WORKS[given.work](given)
    computed = torch.bfloat16 if given.bf16 else torch.float32

    def turn() -> dict[str, Any]:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started, busy = time.perf_counter(), time.process_time()
        found = work.run()
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return {
            "seconds": seconds,
            "busy": busy,
            "found": found,
            "faults": faults,
            "peak": bench.peak(given),
        }

    asked: dict[str, Callable[[], Any]] = {
        "turn": turn,
        "rate": lambda: bench.matrix_rate(work.inner, dtype=computed),
        "flops": lambda: work.flops(),
    }
    for line in sys.stdin:
        print(json.dumps(asked[line.strip()]()), file=answers, flush=True)


PARTS = ("src", "benchmarks", "configs")  # what a side needs of its commit
PLACES = ("model", "data", "tools")  # options of which the default lies beside the checkout


class Side:
    """A process that works when told to."""

    def __init__(self, tree: Path, given: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "SELF_JUDGE_TURNS": str(tree)}
        # By default they are beside the checkout; the last one given counts.
        places = [f"--{name}={Path(getattr(given, name)).absolute()}" for name in PLACES]
        self.process = subprocess.Popen(
            [sys.executable, str(tree / "benchmarks/against.py"), *sys.argv[1:], *places],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> Any:
        """Its answer to `turn`, `rate` or `flops`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("a side ended before its turn; what it wrote is above")
        return json.loads(answer)

    def end(self) -> None:
        self.process.communicate()


# -- both sides ------------------------------------------------------------------------------------


@contextlib.contextmanager
def sources_of(commit: str) -> Iterator[Path]:
    """A folder with the sources of a commit: `src`, its benchmarks and the run files they read."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "src.tar"
        command = ["git", "-C", str(bench.ROOT), "archive", "-o", str(archive), commit, *PARTS]
        subprocess.run(command, check=True)
        shutil.unpack_archive(archive, folder, filter="data")
        yield Path(folder)


def main() -> None:
    """Both sides in turn, and the rate after every round."""
    given = bench.arguments(
        __doc__, (), work="jsft", commit="94f1291", batches=1, batch=8, length=1024
    )
    if given.work not in WORKS or given.dtype not in ("float32", "bf16"):
        sys.exit(f"--work is one of {', '.join(WORKS)}, --dtype float32 or bf16")
    given.bf16 = given.dtype == "bf16"
    given.dtype = "bfloat16" if given.bf16 and given.work != "jsft-full" else "float32"
    if "SELF_JUDGE_TURNS" in os.environ:
        import self_judge

        assert str(self_judge.__file__).startswith(os.environ["SELF_JUDGE_TURNS"])
        wait_for_turns(given)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the folder is removed
    with sources_of(given.commit) as tree:
        sides = {"this checkout": Side(bench.ROOT, given), given.commit: Side(tree, given)}
        here = sides["this checkout"]
        flops = here.ask("flops")
        turns: dict[str, list[Any]] = {name: [side.ask("turn")] for name, side in sides.items()}
        rates = []
        for _ in range(given.rounds):
            for name, side in sides.items():
                turns[name].append(side.ask("turn"))
            rates.append(here.ask("rate"))
        for side in sides.values():
            side.end()
    report(given, turns, flops, rates)


def report(
    given: argparse.Namespace, turns: dict[str, list[Any]], flops: float, rates: list[float]
) -> None:
    """Seconds, the share of the floor and what came out, of each side; the first turn warmed up."""
    shape = given.shape or Path(given.model).name
    print(f"\n{given.work}: {shape}, {'bf16' if given.bf16 else 'float32'}, {given.device}, "
          f"{torch.get_num_threads()} threads; torch {torch.__version__}")  # fmt: skip
    rate = statistics.median(rates)
    spread = f"{min(rates) / 1e9:.0f}–{max(rates) / 1e9:.0f}"
    print(f"  {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s (of {len(rates)}: {spread}): "
          f"floor {flops / rate:.2f} s")  # fmt: skip
    medians = []
    for name, own in turns.items():
        seconds = [t["seconds"] for t in own[1:]]
        medians.append(statistics.median(seconds))
        print(f"  {name:<14} {medians[-1]:7.2f} s (of {len(seconds)}: {min(seconds):.2f}–"
              f"{max(seconds):.2f}), {100 * flops / rate / medians[-1]:.0f}% of the floor, "
              f"{statistics.median(t['busy'] for t in own[1:]):.1f} s of all cores, "
              f"{own[-1]['faults'] / 1e6:.2f} million page faults, "
              f"{own[-1]['peak']:.2f} GiB peak")  # fmt: skip
    print(f"  ratio {medians[1] / medians[0]:.2f}")
    ours, theirs = (own[-1]["found"] for own in turns.values())
    for name, found in zip(turns, (ours, theirs), strict=True):
        print(f"  {name:<14} gave {', '.join(f'{x:.6f}' for x in found[:4])}"
              f"{f', … ({len(found)})' if len(found) > 4 else ''}")  # fmt: skip
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"  apart by at most {apart:.1e}")


if __name__ == "__main__":
    main()

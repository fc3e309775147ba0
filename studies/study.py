"""Runs the arms of a study over seeds, and appends one JSON line per seed and arm.

A study is a name, a question and a list of arms. Lines that exist are not computed again, so an
interrupted study continues where it stopped. The lines contain all values that docs/evidence.md
needs.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from world import World

HERE = Path(__file__).parent
RESULTS = HERE / "results"
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it.

    Attributes:
        name: the name of the file with the results.
        question: what the study asks, as a sentence.
        arms: names and functions. A function receives the `World` of a seed and returns plain data:
            lists of values per prompt or pair, and single numbers.
        lesson: what the results mean for users, in one or two sentences.
        world: the class that the arms receive: its model and data, of one seed.
    """

    name: str
    question: str
    arms: Mapping[str, Callable[[Any], dict[str, Any]]]
    lesson: str = ""
    world: Any = World

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    """Reads the results of a study; an incomplete last line is ignored."""
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in complete]


def _drop_other_versions(path: Path, version: str) -> None:
    """Removes the lines of other versions of the world, which no table may mix with new ones."""
    found = lines(path)
    kept = [line for line in found if line.get("world") == version]
    if len(kept) < len(found):
        print(f"{path.name}: {len(found) - len(kept)} lines of a former world are removed")
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):  # the process was killed while it wrote
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def run(
    study: Study,
    world: Callable[[int], Any],
    seeds: Sequence[int],
    *,
    version: str,
    jobs: int = 1,
    results: Path | None = None,
) -> None:
    """Runs the missing arms of each seed, `jobs` seeds at a time.

    Args:
        world: creates the `World` of a seed in the process that runs the seed.
        version: identifies the world. Lines of another version do not count, and the first new line
            replaces them.
        results: the file with the results; default: the study's own.
    """
    path = results or study.results
    known = [line for line in lines(path) if line.get("world") == version]
    done = {(line["seed"], line["arm"]) for line in known}
    missing = {s: [arm for arm in study.arms if (s, arm) not in done] for s in seeds}
    started, wrote = time.perf_counter(), 0
    for line in _computed(study, world, {s: arms for s, arms in missing.items() if arms}, jobs):
        if not wrote:
            _drop_other_versions(path, version)
        _append(path, {"world": version, **line})
        wrote += 1
        print(
            f"{study.name}: seed {line['seed']}, {line['arm']}: {line['seconds']:.0f} s", flush=True
        )
    if wrote:
        seconds = round(time.perf_counter() - started)
        _append(path.with_name("manifest.jsonl"), manifest(study.name, seeds, jobs, wrote, seconds))


def _computed(
    study: Study,
    world: Callable[[int], Any],
    missing: Mapping[int, Sequence[str]],
    jobs: int,
) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        for seed, arms in missing.items():
            yield from _one_seed(study, world, seed, arms)
        return
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        one_seed = partial(_list_of_one_seed, study, world)
        for future in as_completed([pool.submit(one_seed, s, a) for s, a in missing.items()]):
            yield from future.result()


def _list_of_one_seed(*arguments: Any) -> list[dict[str, Any]]:
    return list(_one_seed(*arguments))


def _one_seed(
    study: Study, world: Callable[[int], Any], seed: int, arms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    here = world(seed)
    for arm in arms:
        _reset_peak()
        started = time.perf_counter()
        values = study.arms[arm](here)
        cost = {"seconds": time.perf_counter() - started, "peak_mib": _peak_mib()}
        yield {"seed": seed, "arm": arm, **cost, **values}


def _reset_peak() -> None:
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> int | None:
    """Returns the peak memory since `_reset_peak`: of the GPU, or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) >> 10 if found else None
    return None


def manifest(
    study: str, seeds: Sequence[int], jobs: int, wrote: int, seconds: int
) -> dict[str, Any]:
    """Describes one run of a study: commit, versions, machine and duration."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "study": study,
        "lines": wrote,
        "seeds": list(seeds),
        "commit": described or None,
        "versions": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "jobs": jobs,
        "seconds": seconds,
    }


def interval(values: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float, float]:
    """Returns a mean over seeds and its 95 % interval from a hierarchical bootstrap.

    Each of 4,000 resamples draws seeds with replacement, and then values within each drawn seed.
    The interval therefore covers other seeds and other prompts.

    Args:
        values: one list per seed, such as the gold scores of its prompts. For the difference of two
            arms, pass the differences of paired values.
    """
    generator = np.random.default_rng(seed)
    by_seed = [np.asarray(own, dtype=float) for own in values]
    drawn = generator.integers(len(by_seed), size=(4000, len(by_seed)))
    means = np.empty(drawn.shape)
    for s, own in enumerate(by_seed):
        places = drawn == s
        of_values = generator.integers(own.size, size=(int(places.sum()), own.size))
        means[places] = own[of_values].mean(1)
    means = means.mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([own.mean() for own in by_seed])), float(low), float(high)

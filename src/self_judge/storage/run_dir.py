"""Defines the files in a run's folder: metrics (JSON lines), run.json and each step's pairs.

This module defines names, formats and limits for the code that writes these files and the code that
reads them. It does not depend on trainers or the meaning of the numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from self_judge.errors import CheckpointError
from self_judge.storage.atomic import naming
from self_judge.storage.jsonl import entries_of, read_lines, write_lines
from self_judge.storage.lock import only_writer

METRICS = "metrics.jsonl"
RUN = "run.json"
DATA = "data.json"  # counts of records and pairs
SUMMARY = "summary.json"  # what a training run came to
ROLLOUTS = "rollouts"
LOCK = "_lock"  # exists during training; Transformers does not push names that start with _
BRACKETS = "brackets.jsonl"  # tournaments written by `self-judge tournament --brackets`
VERDICTS = "verdicts.jsonl"  # written by `self-judge eval`
PAIRS = "pairs.jsonl"  # written by `self-judge compare`
RESULTS = "results.json"  # written by both `eval` and `compare`
JUDGED = "judged.jsonl"  # verdicts on pairs with a known better response


def only_training(folder: Path) -> AbstractContextManager[None]:
    """Locks a run's folder within a `with` block, so that only one process trains in it.

    Raises:
        CheckpointError: another process trains in this folder; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken = (
        f"another training writes to {folder} ({{owner}}): wait until it ends, or choose another "
        "training_args.output_dir"
    )
    return only_writer(folder / LOCK, taken, CheckpointError, reentrant=True)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends one JSON line and flushes it to disk; NaN and infinities are written as null.

    A crash can damage only the last line, which `read_lines` then skips.
    """
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewind(folder: Path, step: int) -> None:
    """Removes all data of later steps, so that a resumed run does not write it twice.

    Args:
        step: the number of completed optimizer steps; 0 starts from scratch.
    """
    metrics = folder / METRICS
    if metrics.is_file():
        with entries_of(metrics, remedy="; delete this file"):
            write_lines(metrics, [x for x in read_lines(metrics) if x.get("step", 0) <= step])
    for own, path in rollout_files(folder):
        if own > step:
            path.unlink()


def rollout_file(folder: Path, step: int) -> Path:
    """Returns the path of the file that contains a step's pairs; steps are counted from 1."""
    return folder / ROLLOUTS / f"step-{step:06d}.jsonl"


def rollout_files(folder: Path) -> list[tuple[int, Path]]:
    """Returns the steps whose pairs are on disk, each with its file, in order."""
    found = []
    for path in (folder / ROLLOUTS).glob("step-*.jsonl"):
        if match := re.fullmatch(r"step-(\d+)\.jsonl", path.name):
            found.append((int(match[1]), path))
    return sorted(found)


def is_kept(step: int, last: int, most: int | None) -> bool:
    """Returns whether the pairs from a step are kept once the run has reached step `last`.

    This keeps every 2^k-th step starting with the first, with the smallest k that gives at most
    `most` steps. It also keeps the last step. The result depends only on the arguments, so a
    resumed run keeps the same steps. For example, with `most=4` it keeps 1 2 3 4 after step 4, and
    1 5 9 10 (k=2) after step 10.
    """
    stride = 1
    while most is not None and math.ceil(last / stride) > most:
        stride *= 2
    return step == last or (step - 1) % stride == 0


def thin_rollouts(folder: Path, last: int, most: int | None) -> None:
    """Removes the files of the steps that are not kept; see `is_kept`."""
    for step, path in rollout_files(folder):
        if step <= last and not is_kept(step, last, most):
            path.unlink()

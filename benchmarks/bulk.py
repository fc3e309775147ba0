"""A long evaluation, killed again and again: is every line there once, and does memory stay flat?

    python benchmarks/bulk.py --pairs 100000 --kills 5

Writes labeled pairs of the synthetic world and a tiny judge with random weights, starts
`self-judge eval` in a process of its own, kills it with SIGKILL at random moments and starts the
same command again until it ends. Then every pair must have one line, in order. Resident memory is
read every second; the process that dies takes its memory with it, so what counts is the growth
inside one process, between its first lines and its last.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from self_judge.data.synthetic import (
    judge_templates,
    preference_records,
    tiny_model,
    tiny_tokenizer,
)
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import save_judge_settings
from self_judge.storage.jsonl import read_journal


@dataclass
class Sitting:
    """One process of the run: its memory in MiB by lines written, and how it ended."""

    first_line: int
    memory: list[tuple[int, float]] = field(default_factory=list)
    killed: bool = False

    def growth(self, warm: int) -> float | None:
        """Memory at the end over memory once `warm` lines were written; None if it died before."""
        after = [mib for lines, mib in self.memory if lines >= self.first_line + warm]
        return after[-1] / after[0] if len(after) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=512, help="pairs between two writes")
    given = parser.parse_args()
    with TemporaryDirectory() as place:
        folder = Path(place)
        _write_judge(folder / "judge")
        _write_pairs(folder / "pairs.jsonl", given.pairs)
        print(f"{given.pairs:,} pairs, {(folder / 'pairs.jsonl').stat().st_size / 2**20:.0f} MiB")
        _run(folder, given)


def _write_judge(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, 0, hidden_size=64, layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder, templates = ChatEncoder(tokenizer), judge_templates(principles=False, overall=True)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))


def _write_pairs(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(preference_records(count, 0)):
            record["prompt"][0]["content"] += f" {i}"  # no two are the same
            file.write(json.dumps(record) + "\n")


def _run(folder: Path, given: argparse.Namespace) -> None:
    verdicts, draw = folder / "out/verdicts.jsonl", random.Random(given.seed)
    moments = sorted(draw.uniform(0.05, 0.95) * given.pairs for _ in range(given.kills))
    command = [sys.executable, "-m", "self_judge", "eval", str(folder / "pairs.jsonl"),
               "--model", str(folder / "judge"), "--output", str(folder / "out"),
               "--chunk", str(given.chunk), "--batch-size", "64"]  # fmt: skip
    started, sittings = time.perf_counter(), list[Sitting]()
    while not sittings or sittings[-1].killed:
        until = moments.pop(0) if moments else None
        sittings.append(_sitting(command, verdicts, until, draw, folder / "log"))
    seconds = time.perf_counter() - started
    _report(verdicts, given, sittings, seconds)


def _sitting(
    command: list[str], verdicts: Path, until: float | None, draw: random.Random, log: Path
) -> Sitting:
    sitting, lines, offset = Sitting(_lines(verdicts)), _lines(verdicts), 0
    offset = verdicts.stat().st_size if verdicts.exists() else 0
    with log.open("a") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
        while child.poll() is None:
            time.sleep(1.0)
            grown, offset = _newlines(verdicts, offset)
            lines += grown
            if (mib := _resident(child.pid)) is not None:
                sitting.memory.append((lines, mib))
            if until is not None and lines >= until:
                time.sleep(draw.uniform(0, 1.0))  # anywhere within a chunk
                child.send_signal(signal.SIGKILL)
                sitting.killed = True
                break
    if not sitting.killed and child.returncode:
        sys.exit(f"the evaluation failed:\n{log.read_text()[-2000:]}")
    return sitting


def _newlines(path: Path, offset: int) -> tuple[int, int]:
    """Newlines written after `offset`, and the place to look from next time."""
    if not path.exists():
        return 0, 0
    with path.open("rb") as file:
        file.seek(min(offset, path.stat().st_size))
        data = file.read()
        return data.count(b"\n"), file.tell()


def _lines(path: Path) -> int:
    return _newlines(path, 0)[0]


def _resident(pid: int) -> float | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kib[0]) / 1024 if kib else None


def _report(
    verdicts: Path, given: argparse.Namespace, sittings: list[Sitting], seconds: float
) -> None:
    for number, sitting in enumerate(sittings, start=1):
        shown = list(islice(sitting.memory, 0, None, max(1, len(sitting.memory) // 5)))
        growth = sitting.growth(warm=2 * given.chunk)
        print(
            f"process {number}: from line {sitting.first_line:,}"
            f" to {sitting.memory[-1][0]:,}, {'killed' if sitting.killed else 'ended by itself'};"
            f" growth {'not measured' if growth is None else f'{growth - 1:+.1%}'};  MiB at lines: "
            + ", ".join(f"{lines:,}: {mib:.0f}" for lines, mib in shown)
        )
    indexes = [line["index"] for line in read_journal(verdicts)]
    whole = indexes == list(range(given.pairs))
    found = "every pair once, in order" if whole else "NOT every pair once"
    print(
        f"{len(indexes):,} lines, {found};"
        f" {seconds:.0f} s, {given.pairs / seconds:.0f} pairs a second with {given.kills} restarts"
    )
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()

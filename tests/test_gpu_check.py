"""The check on a GPU, dry: every part runs on tiny shapes, and none takes the others' time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT
from self_judge.packing.fused_head import FUSED_HEAD

CHECK = ROOT / "benchmarks" / "gpu"
PARTS = (
    "versions", "exact", "promises", "kernels", "judging", "updates", "sampling", "waits",
    "tournaments", "jsft", "flex", "evidence",
)  # fmt: skip


def run(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)


def findings(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not FUSED_HEAD, reason="the check measures TRL's fused head, since TRL 1.16")
def test_a_dry_run_goes_through_every_part_and_finds_what_is_known_on_a_cpu(tmp_path: Path) -> None:
    # Half a minute of two cores, most of it imports.
    done = run(CHECK, "--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = findings(done)
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    assert lines == [json.loads(line) for line in written]
    found = {part: [line for line in lines if line["part"] == part] for part in PARTS}
    for part, own in found.items():
        assert not [line for line in own if "error" in line], part
        assert len(own) > 1, f"{part} found nothing"
        assert "done" in own[-1], part

    exact = [x for x in found["exact"] if x.get("dtype") == "float32" and "asked" in x]
    assert [x["asked"] for x in exact] == ["auto", "tree", "cache", "padding"]
    assert all(x["off"] < 1e-4 for x in exact)
    shared = next(x for x in found["promises"] if "computed" in x)
    assert shared["unique"] == shared["computed"]["judge"] == 1300
    judged = next(x for x in found["judging"] if x.get("side") == "packed")
    assert 0 < judged["unique"] < 8 * 1024
    assert judged["limit"] > 1
    accuracies = [x["accuracy"] for x in found["evidence"] if "accuracy" in x]
    assert len(accuracies) == 2
    assert all("[" in own for own in accuracies), "with its interval"


@pytest.mark.slow
def test_a_part_that_overruns_its_limit_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(
        "import subprocess\n\n\ndef endless(check):\n"
        "    child = subprocess.Popen(['sleep', '300'])\n"
        "    check.say(child=child.pid)\n    child.wait()\n"
    )
    (tmp_path / "broken.py").write_text("def broken(check):\n    raise ValueError('is told')\n")
    (tmp_path / "two.py").write_text(
        f"""import sys
sys.path.insert(0, {str(CHECK)!r})
import pathlib, time
import running
from measuring import Check

if __name__ == "__main__":
    out = pathlib.Path({str(tmp_path)!r})
    running.PARTS = (
        running.Part("endless", "endless", 6.0), running.Part("broken", "broken", 60.0)
    )
    check = Check("", out, out, out, out, tiny=True)
    sys.exit(not running.run(running.PARTS, check, time.monotonic() + 120))
"""
    )
    done = run(tmp_path / "two.py")
    lines = findings(done)
    assert done.returncode == 1, done.stderr[-3000:]
    assert [line["part"] for line in lines] == ["endless", "endless", "broken", "broken"]
    assert lines[1]["overran"] == "ended at its limit of 6 s"
    state = ["ps", "-o", "stat=", "-p", str(lines[0]["child"])]
    left = subprocess.run(state, capture_output=True, text=True).stdout.strip()
    assert left == "" or left.startswith("Z"), "what it started is ended, too"
    assert lines[2]["error"] == "ValueError: is told"
    assert "done" in lines[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_in_one_line() -> None:
    done = run(CHECK)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no CUDA device: torch sees none (a dry run on the CPU: --tiny)\n"

"""Writes the demo's results to README.md: `python docs/demo_table.py outputs/demo`.

The table is placed between two comments and names the machine that runs this command.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by docs/demo_table.py -->", "<!-- end of the table -->"


def machine() -> str:
    """Describes the processor, the number of cores and the PyTorch version."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8"))
        name = found[1].replace("(R)", "") if found else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores, PyTorch {torch.__version__}"


def table(summary: dict[str, Any]) -> str:
    """Formats the summary of a demo as a Markdown table."""
    judge, gold, best = summary["judge"], summary["gold"], summary["gold"]["self_judge_rejection"]

    def row(name: str, value: float, ci95: list[float] | None = None) -> str:
        interval = f"{ci95[0]:.3f} – {ci95[1]:.3f}" if ci95 else ""
        return f"| {name} | {value:.3f} | {interval} |"

    def mean(name: str, entry: dict[str, Any]) -> str:
        return row(f"gold score, {name}", entry["mean"], entry["ci95"])

    against = summary["win_rate_vs_jsft"]
    return "\n".join(
        [
            f"Seed {summary['seed']}, {summary['seconds']:.0f} s on {machine()}:",
            "",
            "| on held-out prompts | value | 95% interval |",
            "|---|---|---|",
            row(f"judge accuracy ({judge['n']} pairs)", judge["accuracy"]),
            row("judge order agreement", judge["order_agreement"]),
            mean("JSFT", gold["jsft"]),
            mean("self-trained", gold["self_judge"]),
            *(mean(f"self-trained, best of {n}", best[n]) for n in sorted(best, key=int)[1:]),
            *(
                mean(f"best of {n} by the judge alone", entry)
                for n, entry in gold["without_prior"].items()
            ),
            row("win rate, self-trained against JSFT", against["value"], against["ci95"]),
        ]
    )


def main(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{table(summary)}\n{END}{after}"
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Prints what the whole method came to, from the files of its stages.

The figures and the conclusions are those of the commands. This module computes none of them.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from self_judge.commands.align.stages import BEST, COMPARED, EVALUATED, PAGE, RESPONSES, Stage
from self_judge.console import ends, number, print_conclusions, say, table
from self_judge.evaluation.conclusions import LEVELS, as_json, judge_gain
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.reporting.collect import run_conclusions
from self_judge.storage.atomic import loads
from self_judge.storage.jsonl import entries_of, read_journal
from self_judge.storage.run_dir import PAIRS, RESULTS

_SHOWN = 3  # prompts, the first ones
_CHARACTERS = 300


def print_outcome(folder: Path, stages: Sequence[Stage], console: Console) -> None:
    """Prints figures, example answers, conclusions, and the command of each stage.

    Raises:
        ValueError: a file of results was changed by hand.
    """
    evaluated, compared = (_results(folder / name) for name in (EVALUATED, COMPARED))
    with entries_of(folder / EVALUATED / RESULTS):
        before, after = evaluated["compared_with"]["overall"], evaluated["overall"]
        rows = [
            _row(f"judge accuracy before JSFT ({before['pairs']:,} pairs)", before["accuracy"]),
            _row("judge accuracy after JSFT", after["accuracy"]),
        ]
        judged = as_json(judge_gain(before, after))
    with entries_of(folder / COMPARED / RESULTS):
        rows += [
            _row(f"win rate against JSFT ({compared['prompts']:,} prompts)", compared["win_rate"]),
            _row(
                "win rate against JSFT, length-controlled", compared["length_controlled_win_rate"]
            ),
        ]
    console.print(table("on held-out data", ("", "value", "95% interval"), rows))
    for line in _examples(folder):
        say(console, line)
    conclusions = [("judge", c) for c in judged]
    for stage in stages:
        if stage.run is not None:
            conclusions += [(stage.title, c) for c in as_json(run_conclusions(stage.output))]
    conclusions += [("self-trained (a) against JSFT (b)", c) for c in compared["conclusions"]]
    conclusions.sort(key=lambda pair: LEVELS.index(pair[1]["level"]))
    print_conclusions(console, ({**c, "text": f"{about}: {c['text']}"} for about, c in conclusions))
    if (folder / PAGE).exists():
        say(console, f"report: {folder / PAGE}")
    say(console, "each stage alone:")
    for stage in stages:
        say(console, f"  self-judge {shlex.join(stage.words)}")


def _results(folder: Path) -> dict[str, Any]:
    with entries_of(folder / RESULTS):
        return dict(loads((folder / RESULTS).read_bytes()))


def _row(name: str, estimate: Mapping[str, Any]) -> tuple[str, str, str]:
    return name, number(estimate["value"]), ends(estimate)


def _examples(folder: Path) -> Iterator[str]:
    """Yields the answers to the first held-out prompts."""
    pairs, best = folder / COMPARED / PAIRS, folder / BEST
    with entries_of(pairs), entries_of(best):
        both = zip(read_journal(pairs), read_journal(best), strict=False)
        for answered, chosen in itertools.islice(both, _SHOWN):
            yield f"prompt: {_cut(dialogue_text(answered['prompt']))}"
            yield f"  JSFT: {_cut(answered['response_b'])}"
            yield f"  self-trained: {_cut(answered['response_a'])}"
            yield f"  self-trained, best of {RESPONSES}: {_cut(chosen['response'])}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …"

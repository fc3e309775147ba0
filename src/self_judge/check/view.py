"""Displays the result of a check on a rich console, or as plain text for logs.

This module depends only on `Report`. Control characters in text from the data are escaped, so that
they cannot affect the terminal.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from self_judge.check.check import Report
from self_judge.check.cost import Cost
from self_judge.check.examples import Example
from self_judge.check.memory import GIB
from self_judge.console import Facts, neutral, table

_KINDS = {"jsft": "judge-augmented SFT", "self_judge": "self-training"}
_TRAINED, _CONTROL, _QUIET = "bold black on green", "cyan", "dim"
_LEVELS = {"problem": "bold red", "warning": "yellow", "note": "green"}
_PARTS = {"head": "scores", "cache": "KV cache", "resident": "process"}  # display names
_SHOWN = 900  # the maximum number of characters shown from an untrained piece


def show(report: Report, console: Console, *, plain: bool = False) -> None:
    """Prints the whole report.

    Args:
        plain: mark trained tokens with «…» instead of a color.
    """
    _heading(console, f"{report.config}: {_KINDS[report.kind]}")
    console.print(Facts(report.about))
    _data(report, console)
    if report.figures or report.letters:
        _figures(report, console)
    if report.examples:
        _heading(console, "Samples")
        legend = Text("trained tokens look like ")
        legend.append("«this»" if plain else " this ", "" if plain else _TRAINED)
        legend.append(", control tokens look like ")
        legend.append("<this>", "" if plain else _CONTROL)
        console.print(legend)
        for example in report.examples:
            console.print()
            _example(example, console, plain)
    if report.cost is not None:
        _cost(report.cost, console)
    _findings(report, console)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(Text(neutral(text), "bold"), align="left", characters="─"))


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(neutral(text), style))


def _data(report: Report, console: Console) -> None:
    _heading(console, "Data")
    for title, sources in (("training: ", report.sources), ("held out: ", report.held_out)):
        for label, counts in sources.items():
            _line(console, title + label)
            for what, number in sorted(counts.items(), key=lambda c: c[0].startswith("skipped")):
                if number and what != "other subset":
                    style = "yellow" if what.startswith("skipped") else ""
                    _line(console, f"  {number:>9,}  {what}", style)
    if report.chosen_longer is not None:
        _line(
            console,
            f"in {100 * report.chosen_longer:.0f}% of the training pairs, the better response is "
            "longer (50% means no length bias)",
        )


def _figures(report: Report, console: Console) -> None:
    _heading(console, "Examples")
    part = f"{report.encoded:,} of {report.records:,} records, evenly spaced, were encoded"
    if report.encoded == report.records:
        part = f"all {report.records:,} records were encoded"
    else:
        part += " (use --examples 0 for all)"
    _line(console, part, _QUIET)
    if report.counts:
        _line(console, ", ".join(f"{n:,} {what}" for what, n in report.counts.items() if n))
    if report.figures:
        lengths = ("median", "90%", "99%", "longest")
        headings = ("tokens", "count", *lengths, "trained", "BOS", "ends")
        rows = [
            (
                f.kind,
                f"{f.count:,}",
                *(f"{f.tokens[p]:,}" for p in ("p50", "p90", "p99", "max")),
                f"{f.trained:.1f}" if f.trained else "-",
                *("–".join(map(str, dict.fromkeys(both))) for both in (f.bos, f.ends)),
            )
            for f in report.figures
        ]
        console.print(table("", headings, rows))
    for letter in report.letters:
        _line(
            console,
            f"the letter {letter.letter} is token {letter.id} {letter.token!r}, the encoding of "
            f'" {letter.letter}" after …{neutral(letter.after)!r}',
        )
    if report.letter_counts:
        counted = ", ".join(f"{n:,} × {x}" for x, n in report.letter_counts.items())
        _line(console, f"judge examples by letter: {counted}")


def _example(example: Example, console: Console, plain: bool) -> None:
    text = Text(overflow="fold")
    for piece in example.pieces:
        shown, style = neutral(piece.text), _CONTROL if piece.control else ""
        if piece.trained:
            # A trained end-of-turn token must remain recognizable as a control token.
            style = _TRAINED + (" underline" if piece.control else "")
            shown = f"«{shown}»" if plain else shown
        elif len(shown) > _SHOWN:
            left_out = f" […{len(shown) - _SHOWN:,} characters…] "
            shown = shown[: _SHOWN // 2] + left_out + shown[-_SHOWN // 2 :]
        text.append(shown, "" if plain else style)
    title = Text(neutral(example.title), "bold")
    title.append(f"  {example.tokens:,} tokens, {example.trained:,} trained", _QUIET)
    console.print(title)
    console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _cost(cost: Cost, console: Console) -> None:
    where = f"{cost.device}, {cost.processes} process{'es' if cost.processes > 1 else ''}"
    where += f", {cost.sharding}" if cost.sharding != "none" else ""
    _heading(console, f"Estimate for {where}")
    size, memory = cost.size, cost.memory
    share = 100 * size.trainable / size.parameters if size.parameters else 0.0
    percent = f"{share:.2g}" if share < 10 else f"{share:.0f}"
    there = f" (available: {_gib(cost.device_memory)})" if cost.device_memory else ""
    parts = {_PARTS.get(name, name): n for name, n in asdict(memory).items() if n >= 2**20}
    shown = {
        "parameters": f"{size.parameters:,}, {size.trainable:,} of them trained ({percent}%)",
        "steps": f"{cost.steps:,} ({cost.steps_per_epoch:,} per epoch of {cost.examples:,})",
        "per step": ", ".join(f"{n:,} {what}" for what, n in cost.per_step.items()),
        "tokens trained": f"{cost.tokens:,} in total; shared tokens are counted once",
        "memory": f"at most {_gib(memory.peak)}, in the {memory.largest_phase} phase{there}",
        "": ", ".join(f"{name} {_gib(n)}" for name, n in parts.items()),
    }
    console.print(Facts(shown))
    how = "counted" if cost.activations_counted else "estimated by a rule of thumb"
    text = f"Parameters are counted, and activations are {how}. Assumed: {cost.assumed}. "
    _line(console, text + "Evaluation, saving and loading are not included.", _QUIET)


def _gib(n: int) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB"


def _findings(report: Report, console: Console) -> None:
    _heading(console, "Findings")
    for finding in report.findings:
        line = Text(f"{finding.level:<8}", _LEVELS[finding.level])
        line.append(f" {neutral(finding.about)}: ", "bold")
        line.append(neutral(finding.text))
        console.print(line)
    count = len(report.problems)
    if count:
        verdict = f"{count} problem{'s' if count > 1 else ''}: this run would go wrong"
        _line(console, verdict, "bold red")
    else:
        warned = sum(finding.level == "warning" for finding in report.findings)
        warnings = f", but {warned} warning{'s' if warned > 1 else ''}" if warned else ""
        _line(console, f"no problems found{warnings}", "bold green")

"""How a check is shown: a rich console page, or plain text for logs.

It knows `Report` and nothing of how it came about. Text from data is shown with its control
characters written out, so that it cannot steer a terminal.
"""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from self_judge.check.check import Report
from self_judge.check.cost import Needs
from self_judge.check.examples import Piece, Sample
from self_judge.check.memory import GIB
from self_judge.console import neutral

_TRAINED, _CONTROL, _QUIET = "bold black on green", "cyan", "dim"
_LEVELS = {"problem": "bold red", "warning": "yellow", "note": "green"}
_SHOWN = 900  # characters of an untrained piece; its middle is left out


def show(report: Report, console: Console, *, plain: bool = False) -> None:
    """Prints the whole report.

    Args:
        plain: mark trained tokens as «…» instead of by colour.
    """
    _heading(console, f"{report.config}: {_KINDS[report.kind]}")
    facts = Table.grid(padding=(0, 2))
    for name, value in report.about.items():
        facts.add_row(Text(name, _QUIET), Text(neutral(value)))
    console.print(facts)
    _data(report, console)
    _examples(report, console)
    if report.samples:
        _heading(console, "Samples")
        legend = Text("the loss falls on ")
        legend.append("«this»" if plain else " this ", "" if plain else _TRAINED)
        legend.append(", control tokens look like ")
        legend.append("<this>", "" if plain else _CONTROL)
        console.print(legend)
        for sample in report.samples:
            console.print()
            _sample(sample, console, plain)
    if report.needs is not None:
        _needs(report.needs, console)
    _findings(report, console)


_KINDS = {"jsft": "judge-augmented SFT", "self_judge": "self-training"}


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Rule(Text(neutral(text), "bold"), align="left", characters="─"))


def _data(report: Report, console: Console) -> None:
    _heading(console, "Data")
    for title, sources in (("", report.sources), ("held out: ", report.held_out)):
        for label, counts in sources.items():
            console.print(Text(neutral(title + label)))
            for what, number in sorted(counts.items(), key=lambda c: c[0].startswith("skipped")):
                if number and what != "other subset":
                    style = "yellow" if what.startswith("skipped") else ""
                    console.print(Text(f"  {number:>9,}  {neutral(what)}", style))
    if report.chosen_longer is not None:
        console.print(
            Text(
                f"in {100 * report.chosen_longer:.0f} % of the training pairs the better response "
                "is the longer one (50 %: length says nothing)"
            )
        )


def _examples(report: Report, console: Console) -> None:
    if not report.figures and not report.letters:
        return
    _heading(console, "Examples")
    part = (
        f"all {report.records:,} records were encoded"
        if report.encoded == report.records
        else f"from {report.encoded:,} of {report.records:,} records, evenly spread (--examples 0: "
        "from all)"
    )
    console.print(Text(part, _QUIET))
    if report.counts:
        console.print(
            Text(", ".join(f"{n:,} {neutral(what)}" for what, n in report.counts.items() if n))
        )
    if report.figures:
        table = Table(box=None, pad_edge=False, header_style=_QUIET)
        table.add_column("tokens")
        for name in ("count", "median", "90 %", "99 %", "longest", "trained", "BOS", "ends"):
            table.add_column(name, justify="right")
        for f in report.figures:
            table.add_row(
                Text(neutral(f.kind)),
                f"{f.count:,}",
                *(f"{f.tokens[p]:,}" for p in ("p50", "p90", "p99", "max")),
                f"{f.trained:.1f}" if f.trained else "-",
                _range(f.bos),
                _range(f.ends),
            )
        console.print(table)
    for letter in report.letters:
        console.print(
            Text(
                f"the letter {letter.letter} is token {letter.id} {letter.token!r}: the one that "
                f'" {letter.letter}" adds after …{neutral(letter.after)!r}'
            )
        )
    if report.letter_counts:
        console.print(
            Text("answers: " + ", ".join(f"{n:,} × {x}" for x, n in report.letter_counts.items()))
        )


def _range(of: tuple[int, int]) -> str:
    return str(of[0]) if of[0] == of[1] else f"{of[0]}–{of[1]}"


def _sample(sample: Sample, console: Console, plain: bool) -> None:
    text = Text(overflow="fold")
    for piece in sample.pieces:
        shown = _shortened(neutral(piece.text), piece)
        if piece.trained:
            # A trained end of turn stays recognizable as a control token.
            style = _TRAINED + (" underline" if piece.control else "")
            text.append(f"«{shown}»" if plain else shown, "" if plain else style)
        else:
            text.append(shown, _CONTROL if piece.control and not plain else "")
    title = Text(neutral(sample.title), "bold")
    title.append(f"  {sample.tokens:,} tokens, {sample.trained:,} trained", _QUIET)
    console.print(title)
    console.print(Padding(text, (0, 0, 0, 2), expand=False))


def _shortened(text: str, piece: Piece) -> str:
    if piece.trained or len(text) <= _SHOWN:
        return text
    left_out = len(text) - _SHOWN
    return f"{text[: _SHOWN // 2]} […{left_out:,} characters…] {text[-_SHOWN // 2 :]}"


def _needs(needs: Needs, console: Console) -> None:
    where = f"{needs.device}, {needs.processes} process{'es' if needs.processes > 1 else ''}"
    where += f", {needs.sharding}" if needs.sharding != "none" else ""
    _heading(console, f"Estimate for {where}")
    size, held, spent = needs.size, needs.memory, needs.seconds
    table = Table.grid(padding=(0, 2))

    def row(name: str, value: str) -> None:
        table.add_row(Text(name, _QUIET), Text(value))

    share = 100 * size.trainable / size.parameters if size.parameters else 0.0
    told = f"{share:.2g}" if share < 10 else f"{share:.0f}"
    row("parameters", f"{size.parameters:,}, of them trained {size.trainable:,} ({told} %)")
    row("steps", f"{needs.steps:,} ({needs.steps_per_epoch:,} an epoch of {needs.examples:,})")
    row("a step has", ", ".join(f"{n:,} {what}" for what, n in needs.per_step.items()))
    row("tokens trained", f"{needs.tokens:,} in all, shared ones once")
    parts = {
        "weights": held.weights,
        "reference": held.reference,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "activations": held.activations,
        "scores": held.head,
        "KV cache": held.cache,
        "judging": held.judging,
        "process": held.resident,
    }
    row(
        "memory",
        f"{_gib(held.peak)} at most, in the {held.largest_phase}"
        + (f" (there are {_gib(needs.device_memory)})" if needs.device_memory else ""),
    )
    row("", ", ".join(f"{name} {_gib(n)}" for name, n in parts.items() if n >= 2**20))
    phases = {"sampling": spent.sampling, "judging": spent.judging, "update": spent.update}
    row(
        "time",
        f"{_duration(spent.step)} a step, {_duration(needs.hours * 3600)} in all ("
        + ", ".join(f"{name} {_duration(s)}" for name, s in phases.items() if s)
        + ")",
    )
    console.print(table)
    how = "counted" if needs.activations_counted else "by a rule of thumb"
    rate = "measured here" if needs.measured else "the vendor's, of which a share is assumed"
    console.print(
        Text(
            f"Parameters are counted, activations are {how}; the device's rate is {rate}. "
            f"Assumed: {needs.assumed}. Without evaluation, saving and loading.",
            _QUIET,
        )
    )


def _gib(n: int) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB / 10 else f"{n / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


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
        console.print(Text(verdict, "bold red"))
    else:
        console.print(Text("nothing stands against this run", "bold green"))

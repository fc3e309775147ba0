"""What a terminal is shown: text from data that cannot steer it, lines, tables and intervals.

It knows characters and how a table looks. It does not know what stands in one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Control and format characters (C0, C1, bidirectional overrides, zero-width ones), lone surrogates,
# private use, line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def neutral(text: str) -> str:
    """The text with everything that could steer a terminal written out: `\\x1b`, `\\u202e`, …

    Newlines stay. Whatever of a text from data, a file or a server goes to a terminal goes through
    here; a rich `Text` made of it takes no markup either.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in _UNPRINTABLE
        else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )  # fmt: skip


def say(console: Console, line: str) -> None:
    """Prints a line as it is: a terminal folds it, a log keeps it whole."""
    console.print(neutral(line), markup=False, highlight=False, soft_wrap=True)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str] | None] = ()) -> Table:
    """A table of numbers with intervals; the first column names them.

    Args:
        title, headings: texts, which may come from data.
        rows: a name, which may come from data, and cells in rich's markup; `None` draws a line.
    """
    drawn = Table(title=Text(neutral(title), "bold"), title_justify="left", box=SIMPLE_HEAD)
    for place, heading in enumerate(headings):
        drawn.add_column(Text(neutral(heading)), justify="right" if place else "left")
    drawn.columns[0].overflow = "fold"  # where it is narrow, names may be broken; numbers may not
    for row in rows:
        if row is None:
            drawn.add_section()
        else:
            drawn.add_row(Text(neutral(row[0])), *row[1:])
    return drawn


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def ends(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """The interval of an estimate, as `estimate_json` writes it."""
    low, high = estimate["ci95"]
    return f"{low:,.{digits}f} – {high:,.{digits}f}"


def interval(estimate: Mapping[str, Any] | None) -> str:
    """An estimate with its interval, in one cell."""
    if estimate is None:
        return "–"
    low, high = estimate["ci95"]
    return f"{estimate['value']:.3f} [dim]{low:.3f}–{high:.3f}[/dim]"

"""Terminal output: escaped text, lines, tables and intervals.

This module defines how text and tables look. Other modules define their contents.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Control and format characters (C0, C1, bidirectional overrides, zero-width), lone surrogates,
# private-use characters, and line and paragraph separators.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def neutral(text: str) -> str:
    """Escapes all characters that could control a terminal, such as `\\x1b` and `\\u202e`.

    Newlines are kept. All text from data, files or servers passes through this function before it
    reaches a terminal. Wrapping the result in rich's `Text` also disables markup.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in _UNPRINTABLE
        else c.encode("unicode_escape", "backslashreplace").decode("ascii")
        for c in text
    )  # fmt: skip


def say(console: Console, line: str) -> None:
    """Prints a line without markup. The line wraps in a terminal but not in a log file."""
    console.print(neutral(line), markup=False, highlight=False, soft_wrap=True)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str] | None] = ()) -> Table:
    """Returns a table of numbers and intervals, with row names in the first column.

    Args:
        title, headings: text, which may come from data.
        rows: each row has a name, which may come from data, and cells with rich markup. `None`
            draws a separator line.
    """
    drawn = Table(title=Text(neutral(title), "bold"), title_justify="left", box=SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        drawn.add_column(Text(neutral(heading)), justify="right" if index else "left")
    drawn.columns[0].overflow = "fold"  # a narrow terminal may break names, but not numbers
    for row in rows:
        if row is None:
            drawn.add_section()
        else:
            drawn.add_row(Text(neutral(row[0])), *row[1:])
    return drawn


def number(value: float | None, digits: int = 3) -> str:
    """Returns the formatted number, or a dash for `None`."""
    return "–" if value is None else f"{value:,.{digits}f}"


def ends(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """Formats the interval of an estimate from `estimate_json`."""
    low, high = estimate["ci95"]
    return f"{low:,.{digits}f} – {high:,.{digits}f}"


def interval(estimate: Mapping[str, Any] | None) -> str:
    """Returns a table cell with an estimate and its interval."""
    if estimate is None:
        return "–"
    low, high = estimate["ci95"]
    return f"{estimate['value']:.3f} [dim]{low:.3f}–{high:.3f}[/dim]"

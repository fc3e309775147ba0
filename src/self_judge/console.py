"""Terminal output: masked secrets, escaped text, lines, tables and intervals.

This module defines how text and tables look. Other modules define their contents.
"""

from __future__ import annotations

import os
import re
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

# Names of settings and environment variables with secret values. Not `eos_token` or `token_id_a`.
_SECRET_NAME = (
    r"(?:[\w.-]*(?:hub|hf|access|auth|api|bearer|refresh|session)[_-]?token"
    r"|[\w.-]*(?:(?:api|access|secret|private|wandb)[_-]?key|secret|password|passwd|credentials?)"
    r"|authorization)"
)
_SECRET_VARIABLE = re.compile(r"(?i).*(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_SECRET_SETTING = re.compile(rf"(?i)(?:.*[._-])?{_SECRET_NAME}")
_WORD = r"(?<![\w.-])"
_SECRETS = [  # each has a group before the secret, and an empty or real group after it
    re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)[^\s/?#\"<>]+(@)"),
    re.compile(r"(?i)([?&](?:token|key|sig|signature|auth)=)[^\s&#\"'<>]+()"),
    re.compile(r"(?i)\b(bearer\s+)(?=\S*\d|\S{16})[\w.~+/=-]{8,}()"),
    re.compile(r"(?i)\b(authorization[\"']?\s*[=:]\s*[\"']?(?:\w+\s+)?)[^\s\"',}]+()"),
    re.compile(rf"(?i)({_WORD}{_SECRET_NAME}=[\"']?)(?!null\b|none\b)[^\s\"',}}&]+()"),
    re.compile(
        rf"(?i)({_WORD}{_SECRET_NAME}[\"']?:\s*[\"']?)(?!null\b|none\b)[^\s\"',}}]+([\"',}}\n]|$)"
    ),
    re.compile(
        r"(?<!\w)()(?:hf_|sk-|gh[oprsu]_|github_pat_|glpat-|xox[abp]-|wandb_v\d_)[\w-]{16,}()"
    ),
]
# Text without any of these contains no secret, and needs no slow search.
_HINTS = ("://", "auth", "bearer", "credential", "hf_", "gh", "glpat-", "key", "passw", "secret",
          "sig", "sk-", "token", "wandb_", "xox")  # fmt: skip
_MASK = "***"
_LEVEL_STYLES = {"red": "bold red", "amber": "yellow", "green": "green"}
_LONG = 8  # shorter values are words that other text may contain
_known: set[str] = set()


def masked(value: Any, secret: bool = False) -> Any:
    """Returns a value with `***` in place of secrets. All output about a run passes through here.

    Secrets are the values of settings and environment variables such as `hub_token` and
    `WANDB_API_KEY`, passwords in URLs, authorization headers, and access tokens of common services.
    The values of settings are also masked wherever they appear later.

    Args:
        value: text, or a tree of dictionaries, lists and other values.
        secret: whether the value belongs to a setting with a secret value.
    """
    variables = [v for k, v in os.environ.items() if len(v) >= _LONG and _SECRET_VARIABLE.match(k)]
    return _masked(value, secret, variables)


def _masked(value: Any, secret: bool, variables: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            _masked(key, False, variables): _masked(
                item, _SECRET_SETTING.fullmatch(str(key)) is not None, variables
            )
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_masked(item, secret, variables) for item in value]
    if secret and value not in (None, ""):
        if len(str(value)) >= _LONG:
            _known.add(str(value))
        return _MASK
    if not isinstance(value, str):
        return value
    for known in sorted({*_known, *variables}, key=len, reverse=True):
        value = value.replace(known, _MASK)
    lowered = value.lower()
    for pattern in _SECRETS if any(hint in lowered for hint in _HINTS) else ():
        value = pattern.sub(rf"\1{_MASK}\2", value)
    return value


def neutral(text: str) -> str:
    """Masks secrets, and escapes characters that could control a terminal (`\\x1b`, `\\u202e`).

    Newlines are kept. All text from data, files or servers passes through this function before it
    reaches a terminal. Wrapping the result in rich's `Text` also disables markup.
    """
    text = masked(text)
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


def facts(named: Mapping[str, str]) -> Table:
    """Returns names and values, one pair per line, without a frame. Both may come from data."""
    drawn = Table.grid(padding=(0, 2))
    for name, value in named.items():
        drawn.add_row(Text(neutral(name), "dim"), Text(neutral(value)))
    return drawn


def print_conclusions(console: Console, conclusions: Iterable[Mapping[str, str]]) -> None:
    """Prints the conclusions from `as_json`, one per line, with their levels in color."""
    for conclusion in conclusions:
        level = conclusion["level"]
        line = Text(f"{level:<6}", _LEVEL_STYLES[level])
        console.print(line.append(neutral(conclusion["text"]), "default"), soft_wrap=True)


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

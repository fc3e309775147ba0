"""Terminal output: masked secrets, escaped text, lines, tables, intervals and streams.

This module defines how text and tables look. Other modules define their contents.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter, FileIO, TextIOWrapper
from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
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


class Terminal(Console):
    """A console that leaves it to the caller that the reader of its output has ended.

    Rich would exit with status 1.
    """

    def on_broken_pipe(self) -> None:
        raise


class _Column:
    """A column of a `NumberTable`: its heading and cells, and the widths that these need.

    Attributes:
        most: the width without line breaks.
        words: the width with line breaks between words.
        parts: the width if names also break after `/`, `_` and `-`.
    """

    def __init__(self, heading: str, cells: Sequence[str], numbers: bool) -> None:
        self.heading, self.cells = neutral(heading), cells
        texts = [self.heading, *(_plain(c) if numbers else c for c in cells)]
        self.most = _widest(line for text in texts for line in text.split("\n"))
        self.words = _widest(word for text in texts for word in text.split())
        names, others = (texts[:1], texts[1:]) if numbers else (texts, [])
        parts = _widest(part for text in names for part in _parts(text))
        self.parts = max(parts, _widest(word for text in others for word in text.split()))


@dataclass(frozen=True)
class NumberTable:
    """A table of numbers and intervals for `console.print`; see `table`.

    Rich breaks the words in the widest columns of a table that is too wide. Here, each column is at
    least as wide as its longest word. If the words do not fit, names break after `/`, `_` and `-`,
    and if that is not enough, the table continues below.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str] | None]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        room = options.max_width
        yield Text(_broken(neutral(self.title), room), "bold")
        rows = [row for row in self.rows if row is not None]
        cells = list(zip_longest(*rows, fillvalue="")) or [()] * len(self.headings)
        left = [_Column(h, own, True) for h, own in zip(self.headings[1:], cells[1:], strict=True)]
        names = _Column(self.headings[0], [neutral(name) for name in cells[0]], False)
        while left:
            count = len(left)
            while count > 1 and sum(c.parts for c in (names, *left[:count])) > room - 2 * count - 3:
                count -= 1
            yield self._drawn([names, *left[:count]], room)
            left = left[count:]

    def _drawn(self, columns: Sequence[_Column], room: int) -> Table:
        least: list[int] = []
        # The gap between two columns consists of padding and the box's own separator.
        for kind, gap in (("words", 3), ("words", 2), ("parts", 2)):
            least = [getattr(column, kind) for column in columns]
            free = room - gap * len(columns) - 1
            if sum(least) <= free:
                break
        widths = [column.most for column in columns]
        while sum(widths) > max(free, sum(least)):
            reducible = [i for i, width in enumerate(widths) if width > least[i]]
            widths[max(reducible, key=widths.__getitem__)] -= 1
        drawn = Table(box=SIMPLE_HEAD, padding=(0, 1) if gap == 3 else (0, 1, 0, 0))
        for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
            heading = Text(_broken(column.heading, width))
            drawn.add_column(
                heading, justify="right" if i else "left", width=width, overflow="fold"
            )
        at = 0
        for row in self.rows:
            if row is None:
                drawn.add_section()
                continue
            name, *numbers = (column.cells[at] for column in columns)
            drawn.add_row(Text(_broken(name, widths[0])), *numbers)
            at += 1
        return drawn


@dataclass(frozen=True)
class Facts:
    """Names and values for `console.print`, one pair per line. Both may come from data."""

    named: Mapping[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        drawn = Table.grid(padding=(0, 2))
        width = options.max_width - _widest(map(neutral, self.named)) - 2
        drawn.add_column(no_wrap=True)
        drawn.add_column(overflow="fold")
        for name, value in self.named.items():
            drawn.add_row(Text(neutral(name), "dim"), Text(_broken(neutral(value), width)))
        yield drawn


def table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str] | None] = ()
) -> NumberTable:
    """Returns a table of numbers and intervals, with row names in the first column.

    Args:
        title, headings: text, which may come from data.
        rows: each row has a name, which may come from data, and cells with rich markup. `None`
            draws a separator line.
    """
    return NumberTable(title, headings, list(rows))


def _plain(markup: str) -> str:
    return Text.from_markup(markup).plain


def _widest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _parts(text: str) -> list[str]:
    """Splits text at spaces, and after `/`, `_` and `-`."""
    return re.findall(r"[^\s/_-]+[/_-]*|[/_-]+", text)


def _broken(text: str, width: int) -> str:
    """Breaks the words that are wider than `width` after `/`, `_` and `-`."""

    def lines_of(match: re.Match[str]) -> str:
        lines = [""]
        for part in _parts(match[0]):
            if lines[-1] and cell_len(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part
        return "\n".join(lines)

    return re.sub(r"\S+", lambda m: lines_of(m) if cell_len(m[0]) > width else m[0], text)


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


def with_streams(run: Callable[[], int]) -> int:
    """Returns the status of a command, or of its output if it cannot be written."""
    _open_closed_streams()
    _watch_output()
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
            if StandardOutput.problem:  # argparse ignores it
                raise StandardOutput.problem
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        status = 141
    except OSError as error:
        if error is not StandardOutput.problem:
            raise
        why = f"standard output cannot be written: {error.strerror}"
        sys.stderr.write(f"self-judge: error: {why}\n")
        status = 2
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _watch_output() -> None:
    """Writes standard output through `StandardOutput`."""
    StandardOutput.problem = None
    old = sys.stdout
    known = isinstance(old, TextIOWrapper) and old is sys.__stdout__
    buffer = old.buffer if known else None
    if not isinstance(getattr(buffer, "raw", buffer), FileIO):  # replaced, or a Windows terminal
        return
    raw = StandardOutput(old.fileno(), "w", closefd=False)
    sys.stdout = TextIOWrapper(
        BufferedWriter(raw) if isinstance(buffer, BufferedWriter) else raw,  # PYTHONUNBUFFERED
        **{name: getattr(old, name) for name in ("encoding", "errors")},
        **{name: getattr(old, name) for name in ("line_buffering", "write_through")},
    )


class StandardOutput(FileIO):
    """Standard output that remembers why it could not be written."""

    problem: OSError | None = None

    def write(self, content: Any, /) -> Any:
        try:
            return super().write(content)
        except OSError as error:
            StandardOutput.problem = error
            raise


def _open_closed_streams() -> None:
    """Replaces standard streams that the caller closed, such as with `>&-`.

    Otherwise, Python has `None` in their place, and the next file that is opened takes the number
    of a stream, so that whatever libraries print would be written to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end

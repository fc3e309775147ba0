"""Writes docs/api.md: every public name with its signature and the start of its docstring.

make api
"""

from __future__ import annotations

import dataclasses
import inspect
from itertools import groupby
from pathlib import Path
from typing import Any

import self_judge

PAGE = Path(__file__).parent / "api.md"
MANY = 30  # a class with more fields than this refers to its own documentation
HEAD = """# API

This page lists the public names of `self_judge` by package; `make api` writes it from docstrings.

`help(self_judge.NAME)` shows the whole docstring: arguments, shapes, errors. `__version__` is the
version.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of docs/api.md, with the packages in the order in which they import each other."""
    parts = [HEAD]
    for package, modules in groupby(self_judge._NAMES_OF, lambda name: name.partition(".")[0]):
        names = [name for module in modules for name in self_judge._NAMES_OF[module]]
        entries = [entry(name, getattr(self_judge, name)) for name in names]
        parts.append(f"## {package}\n\n{''.join(entries)}")
    return "\n".join(parts)


def entry(name: str, value: Any) -> str:
    """One name: its signature without annotations, and the first paragraph of its docstring."""
    about = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return f"- `{name}({', '.join(parameters(value))})`: {about}\n"


def parameters(value: Any) -> list[str]:
    """The parameters with their defaults, as they are written in a call."""
    if dataclasses.is_dataclass(value) and len(dataclasses.fields(value)) > MANY:
        return ["…"]
    words, marked = [], False
    for one in inspect.signature(value).parameters.values():
        if one.kind is one.KEYWORD_ONLY and not marked:
            words.append("*")
            marked = True
        marked = marked or one.kind is one.VAR_POSITIONAL
        default = "" if one.default is one.empty else f"={one.default!r}"
        stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        words.append(f"{stars}{one.name}{default}")
    return words


if __name__ == "__main__":
    main()

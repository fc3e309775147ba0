"""Writes docs/api.md: all public names with signatures and the first paragraph of docstrings.

Run it with `make api`.
"""

from __future__ import annotations

import dataclasses
import inspect
from itertools import groupby
from pathlib import Path
from typing import Any

import self_judge

PAGE = Path(__file__).parent / "api.md"
MANY = 30  # for a class with more fields, the page shows "…" instead of all parameters
HEAD = """# API

This page lists the public names of `self_judge` by package; `make api` writes it from docstrings.

`help(self_judge.NAME)` shows the whole docstring: arguments, shapes, errors. `__version__` is the
version.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Returns the text of docs/api.md, with the packages in import order."""
    parts = [HEAD]
    for package, modules in groupby(self_judge._NAMES_OF, lambda name: name.partition(".")[0]):
        names = [name for module in modules for name in self_judge._NAMES_OF[module]]
        entries = [entry(name, getattr(self_judge, name)) for name in names]
        parts.append(f"## {package}\n\n{''.join(entries)}")
    return "\n".join(parts)


def entry(name: str, value: Any) -> str:
    """Formats a name: its signature without annotations and the first docstring paragraph."""
    about = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    return f"- `{name}({', '.join(parameters(value))})`: {about}\n"


def parameters(value: Any) -> list[str]:
    """Lists the parameters with their defaults, as written in a call."""
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

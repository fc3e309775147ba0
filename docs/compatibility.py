"""Writes the results of the fast tests to docs/compatibility.md, with the installed versions.

`make test-oldest` and `make test-newest` run it: `python docs/compatibility.py NAME JUNIT_XML`.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parent / "compatibility.md"
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy",
)  # fmt: skip


def row(name: str, junit: str) -> str:
    """Formats a test run as a row of the table.

    Args:
        name: the first cell, `oldest` or `newest`.
        junit: the text of pytest's JUnit file.
    """
    suite = next(ElementTree.fromstring(junit).iter("testsuite"))
    tests, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    date = suite.attrib["timestamp"].split("T")[0]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    counts = f"{tests - failed - skipped} | {failed} | {skipped}"
    return f"| {name} | {date} | {platform.python_version()} | {counts} | {versions} |"


def updated(page: str, line: str) -> str:
    """Replaces the row of the table that begins with the same cell as the line."""
    name = line.split(" | ")[0]
    found, count = re.subn(rf"^{re.escape(name)} \|.*$", lambda _: line, page, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{PAGE.name}: expected one row that begins with {name!r}, found {count}")
    return found


def main(name: str, junit: Path) -> None:
    line = row(name, junit.read_text(encoding="utf-8"))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), line), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

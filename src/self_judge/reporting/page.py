"""Implements `self-judge report`, which writes an HTML page that works offline.

The page shows runs, tournaments and evaluations. This module writes the data, the style sheet, the
script and Plotly to one file. Text from the data cannot become markup. `collect.py` reads the
files, `charts.py` lists the curves, and `assets/report.js` draws them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from self_judge import __version__
from self_judge.console import Terminal, masked, say
from self_judge.reporting.charts import charts_json
from self_judge.reporting.collect import Limits, ReportData, collect
from self_judge.storage.atomic import atomic_write
from self_judge.storage.repository import refuse_overwriting


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
) -> Path:
    """Writes the HTML report and returns its path.

    Args:
        paths: folders and files of results; see `collect`.
        output: the path of the page (default: `report.html` in the first folder).
        limits: the limits on the content of the page.
        console: the console for the path and a summary.

    Raises:
        ValueError: there is no data for a report, or a file is broken. The message contains the
            path.
    """
    sources = [Path(path) for path in paths]
    if not sources:
        raise ValueError("a report needs at least one run folder")
    data = collect(sources, limits)
    first = sources[0] if sources[0].is_dir() else sources[0].parent
    target = Path(output) if output is not None else first / "report.html"
    inputs = (p for s in sources for p in ([s] if s.is_file() else s.rglob("*.json*")))
    refuse_overwriting([target], [*inputs, *sources])
    with atomic_write(target) as file:
        file.write(page(data))
    console = console or Terminal(stderr=True)
    shown = [
        f"{len(items):,} {noun}{'' if len(items) == 1 else 's'}"
        for items, noun in (
            (data.runs, "run"),
            (data.pairs, "pair"),
            (data.brackets, "tournament"),
            (data.judges, "judge"),
            (data.comparisons, "comparison"),
        )
        if items
    ]
    say(console, f"report: {target} ({', '.join(shown)})")
    return target


def report_on(path: Path, console: Console) -> None:
    """Writes a report on a command's output, or prints that the report requires Plotly."""
    if plotly_is_there():
        write_report([path], console=console)
    else:
        console.print("report.html needs Plotly: pip install 'self-judge\\[report]'")


def page(data: ReportData) -> str:
    """Returns the whole page as a string.

    Text from the data appears only in a JSON block, in which markup cannot begin or end. The
    content security policy allows only the two scripts whose hashes it lists. The page cannot load
    or send anything over a network.
    """
    parts = files("self_judge.reporting") / "assets"
    script = _inline((parts / "report.js").read_text(encoding="utf-8"))
    plotly = _inline(_plotly())
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    values = {
        "csp": policy,
        "style": (parts / "report.css").read_text(encoding="utf-8"),
        "data": json_block(masked({**_content(data), "charts": charts_json()})),
        "plotly": plotly,
        "script": script,
    }
    template = (parts / "report.html").read_text(encoding="utf-8")
    # Use a single pass, so that inserted text is not searched for placeholders.
    return re.sub(r"@(\w+)@", lambda match: values[match[1]], template)


def json_block(value: Any) -> str:
    """Returns JSON for a script element, without `<`, `>`, `&` or line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def plotly_is_there() -> bool:
    """Returns whether Plotly is installed (the extra `report`)."""
    return importlib.util.find_spec("plotly") is not None


def _plotly() -> str:
    if not plotly_is_there():
        raise ImportError("a report needs Plotly: pip install 'self-judge[report]'")
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _content(data: ReportData) -> dict[str, Any]:
    return {
        **dataclasses.asdict(data),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
    }


def _inline(script: str) -> str:
    """Prevents a script from closing its element. Also converts CR LF to LF, as browsers do."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

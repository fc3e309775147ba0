"""The page of a judge's evaluation: charts and tables in one HTML file that needs no network.

It draws `results.json` and computes nothing. Everything from data is escaped.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from html import escape
from typing import Any


def plotly_is_there() -> bool:
    """Whether the charts can be drawn (the extra `report`)."""
    return importlib.util.find_spec("plotly") is not None


def evaluation_page(results: Mapping[str, Any]) -> str:
    """The page as HTML; Plotly's script is in it."""
    from plotly.offline import get_plotlyjs

    charts = {"reliability": reliability_chart(results["overall"]["calibration"]),
              "accuracy": accuracy_chart(results)}  # fmt: skip
    shown = {name: chart for name, chart in charts.items() if chart}
    places = "".join(f'<div id="{name}" class="chart"></div>' for name in shown)
    title = f"Judge evaluation: {results['judge']['model']}"
    return _PAGE.format(
        title=escape(title),
        places=places,
        summary=_summary(results),
        details=escape(json.dumps(results, indent=2, ensure_ascii=False)),
        plotly=get_plotlyjs(),
        charts=_for_script(shown),
    )


def reliability_chart(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The reliability diagram as a Plotly figure: accuracy against confidence, bin by bin."""
    bins = [b for b in calibration["bins"] if b["n"]] if calibration else []
    if not calibration or not bins:
        return None
    accuracy = [b["accuracy"] for b in bins]
    title = f"Reliability (ECE {calibration['ece']:.3f}, Brier {calibration['brier']:.3f})"
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [0.5, 1],
                "y": [0.5, 1],
                "name": "calibrated",
                "line": {"dash": "dot", "color": "#888"},
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "judge",
                "x": [b["confidence"] for b in bins],
                "y": [a["value"] for a in accuracy],
                "text": [f"{b['n']:,} pairs" for b in bins],
                "marker": {"color": "#3b7dd8", "size": 9},
                "error_y": _error_bars(accuracy),
            },
        ],
        "layout": {
            "title": {"text": title},
            "xaxis": {"title": {"text": "confidence"}, "range": [0.48, 1.02]},
            "yaxis": {"title": {"text": "accuracy"}, "range": [-0.02, 1.02]},
        },
    }


def accuracy_chart(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy by subset, of the judge and its baselines, as a Plotly figure."""
    reports = {"all": results["overall"], **results["subsets"]}
    traces = []
    for name in results["overall"]["baselines"]:
        told = {
            subset: report["baselines"][name]
            for subset, report in reports.items()
            if report["baselines"][name]
        }
        if told:
            traces.append(
                {
                    "type": "bar",
                    "name": escape(name),
                    "x": [escape(subset) for subset in told],
                    "y": [e["value"] for e in told.values()],
                    "error_y": _error_bars(list(told.values())),
                }
            )
    layout = {
        "title": {"text": "Accuracy by subset"},
        "barmode": "group",
        "yaxis": {"range": [0, 1]},
        "shapes": [
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5,
             "line": {"dash": "dot", "color": "#888"}}
        ],
    }  # fmt: skip
    return {"data": traces, "layout": layout} if traces else None


def _error_bars(estimates: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [e["ci95"][1] - e["value"] for e in estimates],
        "arrayminus": [e["value"] - e["ci95"][0] for e in estimates],
        "thickness": 1,
    }


def _summary(results: Mapping[str, Any]) -> str:
    overall = results["overall"]
    longer, undecidable = overall["longer"], overall["undecidable"]
    rows = [
        ("accuracy", overall["accuracy"]),
        ("orders agree", overall["order_agreement"]),
        ("decided by position", overall["decided_by_position"]),
        ("first position wins", overall["first_position"]),
        ("longer response preferred", longer["preferred"]),
        ("accuracy where the better response is longer", longer["accuracy_better_is_longer"]),
        ("accuracy where the better response is shorter", longer["accuracy_better_is_shorter"]),
        *((f"accuracy by {n} alone", e) for n, e in overall["principles"].items()),
    ]
    if "compared_with" in results and results["compared_with"]["paired"]["overall"]:
        compared = results["compared_with"]
        paired = compared["paired"]["overall"]
        name = f"minus {compared['judge']['model']} (McNemar's p {paired['mcnemar_p']:.3g})"
        rows.append((f"accuracy {name}", paired["difference"]))
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{e['value']:.3f}</td>"
        f"<td>{e['ci95'][0]:.3f} – {e['ci95'][1]:.3f}</td><td>{e['n']:,}</td></tr>"
        for name, e in rows
        if e
    )
    share = undecidable["share"]
    told = "" if share is None else f"<tr><td>undecidable</td><td>{share:.3f}</td><td></td></tr>"
    return cells + told


def _for_script(value: Any) -> str:
    """JSON that cannot end the script it stands in."""
    text = json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d7dce1; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e3e7eb; --paper: #15181c; --line: #363c43; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }}
td + td {{ font-variant-numeric: tabular-nums; }}
.chart {{ height: 26rem; }}
pre {{ overflow: auto; font-size: .8rem; }}
h1 {{ font-size: 1.3rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
<thead><tr><th></th><th>value</th><th>95 % interval</th><th>pairs</th></tr></thead>
<tbody>{summary}</tbody>
</table>
{places}
<details><summary>All numbers</summary><pre>{details}</pre></details>
<script>{plotly}</script>
<script>
const charts = {charts};
function draw() {{
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
  for (const [name, chart] of Object.entries(charts)) {{
    const layout = {{ ...chart.layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: {{ color: ink }}, margin: {{ l: 55, r: 15, t: 50, b: 60 }},
      legend: {{ orientation: "h", y: -0.2 }} }};
    Plotly.react(name, chart.data, layout, {{ responsive: true, displaylogo: false }});
  }}
}}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
</script>
</body>
</html>
"""

"""Draws the results of the studies for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import self_rejection
from study import interval

FOLDER = Path(__file__).parents[1] / "docs" / "images"
# The ways of choosing that the plot of self-rejection shows; the table has all.
WAYS = ("best by gold", "knockout + 5 log π of JSFT per token", "most probable text",
        "knockout", "round robin, soft wins", "scalar reward by the letter")  # fmt: skip
Arms = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(study: str, arms: Arms) -> str | None:
    """Draws a study and returns the name of the file; `None` if the study has no plot.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plots need matplotlib: pip install -e '.[benchmarks]'") from None
    matplotlib.use("Agg")
    # Without these settings, the file would change with every run.
    matplotlib.rcParams |= {"svg.hashsalt": study, "svg.fonttype": "none", "font.size": 9}
    if study == "demo":
        return None
    figure = _by_n(arms) if study == "self_rejection" else _forest(study, arms)
    name = f"evidence-{study.replace('_', '-')}.svg"
    figure.savefig(FOLDER / name, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    return name


def _forest(study: str, arms: Arms) -> Any:
    """The mean of each arm, with its interval."""
    from matplotlib import pyplot

    key, label = {
        "judging": ("judged_right", "judge accuracy"),
        "real": ("right", "judge accuracy on held-out pairs"),
    }.get(study, ("gold", "gold score"))
    found = {arm: [x[key] for x in own if key in x] for arm, own in arms.items()}
    found = {arm: values for arm, values in found.items() if values}
    figure, ax = pyplot.subplots(figsize=(6, 0.6 + 0.28 * len(found)))
    for row, values in enumerate(found.values()):
        mean, low, high = interval(values)
        ax.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _by_n(arms: Arms) -> Any:
    """The gold score of some ways of choosing, against the number of samples."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 3.4))
    overall = arms["overall question"]
    shown = [(way, overall, way) for way in WAYS if way in overall[0]["gold_by_n"]]
    if principles := arms.get("four principles"):
        shown.append(("knockout", principles, "knockout, four principles"))
    for way, own, label in shown:
        sizes = [str(n) for n in self_rejection.SIZES if str(n) in own[0]["gold_by_n"][way]]
        points = [interval([x["gold_by_n"][way][n] for x in own]) for n in sizes]
        means, lows, highs = zip(*points, strict=True)
        numbers = [int(n) for n in sizes]
        ax.plot(numbers, means, marker="o", markersize=3, label=label)
        ax.fill_between(numbers, lows, highs, alpha=0.12)
    ax.set_xscale("log", base=2)
    ax.set_xticks(self_rejection.SIZES, [str(n) for n in self_rejection.SIZES])
    ax.set_xlabel("N, the number of samples")
    ax.set_ylabel("gold score of the chosen response")
    ax.legend(frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    ax.spines[["top", "right"]].set_visible(False)
    return figure

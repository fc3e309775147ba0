"""Prints the result tables of `self-judge eval`.

This module formats the values in `results.json`. It does not compute any results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from self_judge.console import NumberTable, ends, interval, number, print_conclusions, say, table

_BASELINES = {
    "swap-averaged judge": "judge, both orders",
    "judge, one order (as given)": "one order, as given",
    "judge, one order (swapped)": "one order, swapped",
    "the longer response": "the longer response",
}
# Each entry has the column heading in the table of subsets, the name in the table of all pairs, and
# a function that returns the value.
_BIASES = (
    ("orders agree", "orders agree", lambda r: r["order_agreement"]),
    ("by position", "decided by position", lambda r: r["decided_by_position"]),
    ("first wins", "first position wins", lambda r: r["first_position"]),
    ("longer wins", "longer preferred", lambda r: r["longer"]["preferred"]),
    ("right if longer", "accuracy, better is longer",
     lambda r: r["longer"]["accuracy_better_is_longer"]),
    ("right if shorter", "accuracy, better is shorter",
     lambda r: r["longer"]["accuracy_better_is_shorter"]),
)  # fmt: skip


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Prints the tables of an evaluation."""
    overall = results["overall"]
    console.print(_accuracy_table(results))
    _print_benchmarks(results, console)
    console.print(_bias_table(overall))
    if results["subsets"]:
        console.print(_subset_table(results["subsets"]))
    if overall["calibration"]:
        console.print(_reliability_table(overall["calibration"]))
    if overall["principle_agreement"]:
        console.print(_principle_table(overall))
    if overall["with_ties"]:
        console.print(_ties_table(overall))
    if "compared_with" in results:
        console.print(_compared_table(results["compared_with"]))
        _print_benchmarks(results["compared_with"], console)
    for reason, count in overall["undecidable"]["reasons"].items():
        say(console, f"undecidable, {reason}: {count:,}")
    for reason, count in results["skipped"].items():
        say(console, f"skipped, {reason}: {count:,}")
    for judged in (results, results.get("compared_with", {})):
        if tokens := judged.get("thought_tokens_per_pair"):
            say(console, f"{judged['judge']['model']} thinks {tokens:,.1f} tokens per pair")
    if results["pairs_per_second"]:
        say(console, f"{results['pairs_per_second']:.2f} pairs per second")
    print_conclusions(console, results["conclusions"])


def _accuracy_table(results: Mapping[str, Any]) -> NumberTable:
    reports = {**results["subsets"], "all": results["overall"]}
    return table(
        f"accuracy of {results['judge']['model']}, with 95% intervals",
        ("", "pairs", *_BASELINES.values()),
        (
            (name, f"{report['pairs']:,}", *(interval(report["baselines"][n]) for n in _BASELINES))
            for name, report in reports.items()
        ),
    )


def _print_benchmarks(results: Mapping[str, Any], console: Console) -> None:
    """Prints each benchmark's own metric."""
    for name, report in results["benchmarks"].items():
        rows = {**report["subsets"], "all": report["overall"]}
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        title = f"{name}: its own metric, for {results['judge']['model']}"
        cells = (
            (subset, *(interval(row[m]) if m in row else "" for m in metrics))
            for subset, row in rows.items()
            if subset
        )
        console.print(table(title, ("", *metrics), cells))
        if alone := report.get("unpaired"):
            say(console, f"{name}, Ties: {alone:,} prompts without a counterpart do not count")


def _bias_table(overall: Mapping[str, Any]) -> NumberTable:
    calibration = overall["calibration"] or {"ece": None, "brier": None}
    estimates = ((name, value(overall)) for _, name, value in _BIASES)
    return table(
        "position, length and calibration, all pairs",
        ("", "value", "95% interval", "pairs"),
        [
            *((name, number(e["value"]), ends(e), f"{e['n']:,}") for name, e in estimates if e),
            ("undecidable", number(overall["undecidable"]["share"])),
            ("p(A) + p(B)", number(overall["letter_mass"])),
            ("calibration error (ECE)", number(calibration["ece"])),
            ("Brier score", number(calibration["brier"])),
        ],
    )


def _subset_table(subsets: Mapping[str, Any]) -> NumberTable:
    biases = [(heading, value) for heading, _, value in _BIASES if heading != "first wins"]
    headings = ("", *(heading for heading, _ in biases), "ECE")
    rows = []
    for name, report in subsets.items():
        values = [(value(report) or {"value": None})["value"] for _, value in biases]
        values.append((report["calibration"] or {"ece": None})["ece"])
        rows.append((name, *map(number, values)))
    return table("by subset (the intervals are in results.json)", headings, rows)


def _reliability_table(calibration: Mapping[str, Any]) -> NumberTable:
    return table(
        "reliability: the judge's accuracy by confidence",
        ("confidence", "pairs", "mean confidence", "accuracy"),
        (
            (
                f"{b['low']:.2f} – {b['high']:.2f}",
                f"{b['n']:,}",
                number(b["confidence"]),
                interval(b["accuracy"]),
            )
            for b in calibration["bins"]
            if b["n"]
        ),
    )


def _principle_table(overall: Mapping[str, Any]) -> NumberTable:
    agreement, names = overall["principle_agreement"], list(overall["principles"])
    title = "principles: accuracy of each principle, and pairwise agreement (Cohen's κ)"
    kappa = agreement["fleiss_kappa"]
    pairwise = {
        frozenset(entry["principles"]): f"{entry['agreement']:.3f} ({number(entry['kappa'], 2)})"
        for entry in agreement["pairwise"]
    }
    return table(
        title + ("" if kappa is None else f"; Fleiss' κ {kappa:.3f}"),
        ("", "accuracy", *names),
        (
            (
                name,
                interval(overall["principles"][name]),
                *(pairwise.get(frozenset((name, other)), "") for other in names),
            )
            for name in names
        ),
    )


def _ties_table(overall: Mapping[str, Any]) -> NumberTable:
    ties = overall["with_ties"]
    return table(
        f"{overall['ties']:,} pairs are ties in the data; if the orders disagree, the judge's "
        "verdict counts as a tie",
        ("", "three-way agreement", "ties found", "mean margin, ties", "others"),
        [
            (
                "all",
                interval(ties["three_way_agreement"]),
                interval(ties["ties_called_ties"]),
                number(ties["mean_margin_ties"]),
                number(ties["mean_margin_others"]),
            )
        ],
    )


def _compared_table(compared: Mapping[str, Any]) -> NumberTable:
    paired = {**compared["paired"]["subsets"], "all": compared["paired"]["overall"]}
    theirs = {**compared["subsets"], "all": compared["overall"]}  # the subsets may differ
    return table(
        f"compared with {compared['judge']['model']}: paired difference (this judge − other)",
        ("", "other's accuracy", "difference", "only this right", "only other right",
         "McNemar's p"),
        (
            (
                name,
                interval(theirs.get(name, {}).get("accuracy")),
                interval(entry["difference"]),
                f"{entry['only_this_right']:,}",
                f"{entry['only_other_right']:,}",
                f"{entry['mcnemar_p']:.3g}",
            )
            for name, entry in paired.items()
            if entry
        ),
    )  # fmt: skip

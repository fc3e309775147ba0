"""`self-judge eval`: labeled comparisons -> verdicts -> numbers, as a table, JSON and a page.

Wiring: reading, judging, tallying and drawing are elsewhere; here they are put in order.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from self_judge import __version__
from self_judge.commands.judge import CHUNK, Case, judge_in_bulk
from self_judge.commands.judge_choice import JudgeChoice
from self_judge.commands.resumable import RankShards
from self_judge.console import neutral
from self_judge.data.benchmarks import BenchmarkSource, LabeledComparison, read_comparisons
from self_judge.datatypes import Verdict
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally, PairedTally, credit
from self_judge.judging.voting import verdict_from_json, verdict_json
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import atomic_write
from self_judge.storage.jsonl import read_journal, settings_path

VERDICTS, RESULTS = "verdicts.jsonl", "results.json"


@dataclass(frozen=True)
class JudgeEvaluation:
    """What to evaluate on.

    Args:
        sources: where the labeled comparisons are.
        max_pairs: the first so many of every source.
        chunk: comparisons between two writes to disk.
    """

    sources: Sequence[BenchmarkSource]
    max_pairs: int | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"--max-pairs must be at least 1, got {self.max_pairs}")

    def read(self, skipped: Counter[str] | None = None) -> Iterator[LabeledComparison]:
        """The comparisons of all sources; with several, a source's name opens its subsets."""
        for source in self.sources:
            for pair in itertools.islice(read_comparisons(source, skipped), self.max_pairs):
                if len(self.sources) > 1:
                    named = "/".join(p for p in (Path(source.path).name, pair.subset) if p)
                    pair = replace(pair, subset=named)
                yield pair


def run_eval(
    choice: JudgeChoice,
    evaluation: JudgeEvaluation,
    output: str | Path,
    *,
    compare: JudgeChoice | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a judge; returns what it writes to `output/results.json`.

    Verdicts go to `output/verdicts.jsonl` as they are made; the same call goes on after an
    interruption. Under `accelerate launch` each process judges its share, and the first does the
    rest.

    Args:
        compare: another judge, or the folder of an evaluation that is there already, to compare
            with on the same pairs, pair by pair; see `compared_judge`.
        overwrite: judge anew, whatever is there.
        console: where the table is printed.

    Raises:
        ValueError: data, model or templates cannot be used, or what is there belongs to another
            evaluation.
    """
    output, console = Path(output), console or Console()
    skipped: Counter[str] = Counter()
    rate = _judged(choice, evaluation, output / VERDICTS, skipped, overwrite, "judging")
    theirs: Path | None = None
    if isinstance(compare, JudgeChoice):
        theirs = output / "compared" / VERDICTS
        _judged(compare, evaluation, theirs, Counter(), overwrite, "judging, other model")
    elif compare is not None:
        theirs = compare / VERDICTS
    return RankShards.here(output / VERDICTS, evaluation.chunk).agreed(
        lambda: _results(choice, evaluation, output, theirs, skipped, rate, console)
    )


def _results(
    choice: JudgeChoice,
    evaluation: JudgeEvaluation,
    output: Path,
    theirs: Path | None,
    skipped: Counter[str],
    rate: float | None,
    console: Console,
) -> dict[str, Any]:
    """Written and shown; `theirs` are the verdicts of a judge to compare with."""
    results: dict[str, Any] = {
        "kind": "judge evaluation",
        "version": __version__,
        "judge": choice.settings(),
        "data": [asdict(source) for source in evaluation.sources],
        "skipped": dict(skipped),
        "pairs_per_second": rate,
        **_tallied(output / VERDICTS, choice.judge_templates().principles),
    }
    if theirs is not None:
        results["compared_with"] = _compared(output / VERDICTS, theirs)
    with atomic_write(output / RESULTS) as file:
        file.write(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print_results(results, console)
    told = neutral(f"written to {output}: {RESULTS}, {VERDICTS}")
    console.print(told, markup=False, highlight=False)
    report_on(output, console)
    return results


def compared_judge(choice: JudgeChoice, other: str) -> JudgeChoice | Path:
    """What `--compare` names: the folder of a finished evaluation, or a model judged alike."""
    folder = Path(other)
    return folder if (folder / VERDICTS).is_file() else replace(choice, model=other)


def _judged(
    choice: JudgeChoice,
    evaluation: JudgeEvaluation,
    path: Path,
    skipped: Counter[str],
    overwrite: bool,
    title: str,
) -> float | None:
    principles = choice.judge_templates().principles

    def cases() -> Iterator[Case]:
        skipped.clear()
        for pair in evaluation.read(skipped):
            yield _case(pair, principles)

    _, rate = judge_in_bulk(
        cases,
        path,
        choice,
        {"max_pairs": evaluation.max_pairs},
        chunk=evaluation.chunk,
        overwrite=overwrite,
        title=title,
    )
    return rate if rate == rate else None


def _case(pair: LabeledComparison, principles: Sequence[str]) -> Case:
    digest = pair.digest

    def line(verdict: Verdict) -> dict[str, Any]:
        return {
            "source": pair.source,
            "index": pair.index,
            "subset": pair.subset,
            "principle": pair.principle,
            "label": pair.label,
            "digest": digest,
            "characters": [len(pair.comparison.response_a), len(pair.comparison.response_b)],
            "verdict": verdict_json(verdict, principles),
        }

    return Case(
        pair.comparison,
        line,
        lambda written: written.get("digest") == digest and written.get("subset") == pair.subset,
    )


def _judged_pair(line: Mapping[str, Any], principles: Sequence[str]) -> JudgedPair:
    principle = line["principle"]
    place = principles.index(principle) if principle in principles else None
    a, b = line["characters"]
    return JudgedPair(line["label"], verdict_from_json(line["verdict"]), place, (a, b))


def _tallied(verdicts: Path, principles: Sequence[str]) -> dict[str, Any]:
    overall, subsets = JudgeTally(principles), dict[str, JudgeTally]()
    for line in read_journal(verdicts):
        pair = _judged_pair(line, principles)
        overall.add(pair)
        if line["subset"]:
            subsets.setdefault(line["subset"], JudgeTally(principles)).add(pair)
    return {
        "overall": overall.report(),
        "subsets": {name: subsets[name].report() for name in subsets},
    }


def _compared(verdicts: Path, theirs: Path) -> dict[str, Any]:
    own, settings = (
        json.loads(settings_path(path).read_text(encoding="utf-8"))["settings"]
        for path in (verdicts, theirs)
    )
    principles = settings["principles"]
    overall, subsets = PairedTally(), dict[str, PairedTally]()
    for ours, line in itertools.zip_longest(read_journal(verdicts), read_journal(theirs)):
        if ours is None or line is None or ours["digest"] != line["digest"]:
            raise ValueError(
                f"{theirs} is not about the same pairs as {verdicts}: evaluate both on the same "
                "data"
            )
        if ours["label"] == "tie":
            continue
        credits = [
            credit(_judged_pair(each, names).counted.preferred, each["label"])
            for each, names in ((ours, own["principles"]), (line, principles))
        ]
        overall.add(credits[0], credits[1])
        if ours["subset"]:
            subsets.setdefault(ours["subset"], PairedTally()).add(credits[0], credits[1])
    return {
        "judge": settings,
        **_tallied(theirs, principles),
        "paired": {
            "overall": overall.report(),
            "subsets": {name: tally.report() for name, tally in subsets.items()},
        },
    }


# -- for people ----------------------------------------------------------------------------------


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """The tables of an evaluation."""
    console.print(_accuracy_table(results))
    console.print(_bias_table(results))
    if results["subsets"]:
        console.print(_subset_table(results))
    overall = results["overall"]
    if overall["calibration"]:
        console.print(_reliability_table(overall["calibration"]))
    if overall["principle_agreement"]:
        console.print(_principle_table(overall))
    if overall["with_ties"]:
        console.print(_ties_table(overall))
    if "compared_with" in results:
        console.print(_compared_table(results))
    for reason, count in overall["undecidable"]["reasons"].items():
        console.print(Text(f"undecidable, {neutral(reason)}: {count:,}"))
    for reason, count in results["skipped"].items():
        console.print(Text(f"left out, {neutral(reason)}: {count:,}"))
    if results["pairs_per_second"]:
        console.print(f"{results['pairs_per_second']:.2f} pairs per second", highlight=False)


_BASELINES = {
    "swap-averaged judge": "judge, both orders",
    "judge, one order (as given)": "one order, as given",
    "judge, one order (swapped)": "one order, swapped",
    "the longer response": "the longer response",
}


def _accuracy_table(results: Mapping[str, Any]) -> Table:
    table = _table(f"accuracy of {results['judge']['model']}, with 95 % intervals")
    table.add_column("", overflow="fold")
    for heading in ("pairs", *_BASELINES.values()):
        table.add_column(heading, justify="right")
    for name, report in _reports(results):
        cells = [_interval(report["baselines"][n]) for n in _BASELINES]
        table.add_row(_named(name), f"{report['pairs']:,}", *cells)
    return table


# What stands in a table by subset: its heading there, its name in the table of all pairs, itself.
_BIASES = (
    ("orders agree", "orders agree", lambda r: r["order_agreement"]),
    ("by place", "decided by position", lambda r: r["decided_by_position"]),
    ("first wins", "first position wins", lambda r: r["first_position"]),
    ("longer wins", "longer preferred", lambda r: r["longer"]["preferred"]),
    (
        "right if longer",
        "accuracy, better is longer",
        lambda r: r["longer"]["accuracy_better_is_longer"],
    ),
    (
        "right if shorter",
        "accuracy, better is shorter",
        lambda r: r["longer"]["accuracy_better_is_shorter"],
    ),
)


def _bias_table(results: Mapping[str, Any]) -> Table:
    overall = results["overall"]
    table = _table("position, length and calibration, all pairs")
    for heading in ("", "value", "95 % interval", "pairs"):
        table.add_column(heading, justify="right" if heading else "left")
    for _, name, value in _BIASES:
        e = value(overall)
        if e is not None:
            ends = f"{e['ci95'][0]:.3f} – {e['ci95'][1]:.3f}"
            table.add_row(name, f"{e['value']:.3f}", ends, f"{e['n']:,}")
    calibration = overall["calibration"] or {"ece": None, "brier": None, "n": 0}
    for name, value in (
        ("undecidable", overall["undecidable"]["share"]),
        ("p(A) + p(B)", overall["letter_mass"]),
        ("calibration error (ECE)", calibration["ece"]),
        ("Brier score", calibration["brier"]),
    ):
        table.add_row(name, _number(value))
    return table


def _subset_table(results: Mapping[str, Any]) -> Table:
    table = _table("the same by subset (intervals: results.json)")
    table.add_column("", overflow="fold")
    shown = [(heading, value) for heading, _, value in _BIASES if heading != "first wins"]
    for heading in (*(heading for heading, _ in shown), "ECE"):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for name, report in results["subsets"].items():
        calibration = report["calibration"] or {"ece": None}
        cells = [value(report) for _, value in shown]
        table.add_row(
            _named(name),
            *("–" if e is None else f"{e['value']:.3f}" for e in cells),
            _number(calibration["ece"]),
        )
    return table


def _reliability_table(calibration: Mapping[str, Any]) -> Table:
    table = _table("reliability: how often the judge is right when it is so sure")
    for heading in ("confidence", "pairs", "mean confidence", "accuracy"):
        table.add_column(heading, justify="right")
    for b in calibration["bins"]:
        if b["n"]:
            ends = f"{b['low']:.2f} – {b['high']:.2f}"
            mean, accuracy = _number(b["confidence"]), _interval(b["accuracy"])
            table.add_row(ends, f"{b['n']:,}", mean, accuracy)
    return table


def _principle_table(overall: Mapping[str, Any]) -> Table:
    kappa = overall["principle_agreement"]["fleiss_kappa"]
    title = "principles: accuracy of each alone, and agreement (Cohen's κ) with the others"
    table = _table(title + ("" if kappa is None else f"; Fleiss' κ {kappa:.3f}"))
    names = list(overall["principles"])
    # Where it is narrow, names may be broken; numbers may not.
    table.add_column("", overflow="fold")
    table.add_column("accuracy", justify="right", no_wrap=True)
    for name in names:
        table.add_column(_named(name), justify="right", overflow="fold", min_width=7)
    pairwise = {}
    for entry in overall["principle_agreement"]["pairwise"]:
        x, y = entry["principles"]
        told = f"{entry['agreement']:.3f} ({_number(entry['kappa'], 2)})"
        pairwise[x, y] = pairwise[y, x] = told
    for name in names:
        others = ["" if name == other else pairwise[name, other] for other in names]
        table.add_row(_named(name), _interval(overall["principles"][name]), *others)
    return table


def _ties_table(overall: Mapping[str, Any]) -> Table:
    ties = overall["with_ties"]
    table = _table(f"{overall['ties']:,} pairs are ties in the data; a judge says tie when its "
                   "orders disagree")  # fmt: skip
    for heading in ("three-way agreement", "ties found", "mean margin, ties", "others"):
        table.add_column(heading, justify="right")
    table.add_row(
        _interval(ties["three_way_agreement"]),
        _interval(ties["ties_called_ties"]),
        _number(ties["mean_margin_ties"]),
        _number(ties["mean_margin_others"]),
    )
    return table


def _compared_table(results: Mapping[str, Any]) -> Table:
    compared = results["compared_with"]
    table = _table(f"paired with {compared['judge']['model']}: this judge minus that one")
    for heading in ("", "that one's accuracy", "difference", "only this right", "only that right",
                    "McNemar's p"):  # fmt: skip
        table.add_column(heading, justify="left" if not heading else "right")
    paired = {**compared["paired"]["subsets"], "all": compared["paired"]["overall"]}
    theirs = {**compared["subsets"], "all": compared["overall"]}
    for name, entry in paired.items():
        if entry:
            table.add_row(
                _named(name),
                _interval(theirs[name]["accuracy"]),
                _interval(entry["difference"]),
                f"{entry['only_this_right']:,}",
                f"{entry['only_other_right']:,}",
                f"{entry['mcnemar_p']:.3g}",
            )
    return table


def _table(title: str) -> Table:
    shown = Text(neutral(title), "bold")
    return Table(title=shown, title_justify="left", box=SIMPLE_HEAD)


def _named(name: str) -> Text:
    """A name from the data: neither markup nor anything else than text."""
    return Text(neutral(name))


def _reports(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [*results["subsets"].items(), ("all", results["overall"])]


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    low, high = estimate["ci95"]
    return f"{estimate['value']:.3f} [dim]{low:.3f}–{high:.3f}[/dim]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"

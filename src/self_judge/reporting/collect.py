"""Collects report data from run folders: series, pairs, brackets, reliability and settings.

This module reads the files from training, tournaments and evaluations, and limits the size of the
result. `page.py` writes the HTML.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from self_judge.evaluation.conclusions import (
    Conclusion,
    as_json,
    comparison_conclusions,
    judge_conclusions,
    training_conclusions,
)
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.judging.voting import verdict_from_json
from self_judge.reporting.compared_pairs import compared_pairs, cut
from self_judge.storage.atomic import loads
from self_judge.storage.jsonl import entries_of, read_lines
from self_judge.storage.run_dir import DATA, METRICS, PAIRS, RESULTS, RUN, SUMMARY, rollout_files

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits that keep a report small, regardless of the size of the runs.

    Attributes:
        pairs: the maximum number of sampled pairs from all runs, spread evenly over the steps.
        points: the maximum number of points per curve. Longer curves are averaged over windows.
        brackets: the maximum number of tournaments.
        characters: the maximum number of characters in a text. Longer texts are cut, and the page
            shows the number of missing characters.
    """

    pairs: int = 400
    points: int = 1500
    brackets: int = 40
    characters: int = 6000

    def __post_init__(self) -> None:
        for name in ("pairs", "points", "brackets", "characters"):
            if getattr(self, name) < (2 if name == "points" else 0):
                raise ValueError(f"the report limit {name}={getattr(self, name)} is too small")


@dataclass
class ReportData:
    """The content of a report page.

    Attributes:
        runs: the name, kind, series by metric, run.json and data.json of every run.
        pairs: sampled pairs with their verdicts (see `rollout_log.write_rollouts`).
        brackets: tournaments with their contexts and responses.
        gold: the gold scores of demos, with answers before and after training.
        judges: the quality, bias and reliability of judges on labeled pairs.
        benchmarks: the metrics that benchmarks define for themselves, by subset.
        paired: the differences in accuracy between two judges on the same pairs.
        comparisons: win rates of one policy against another, with the first judged answers.
        conclusions: the conclusions on each result, with its name under `about`.
        notes: messages about omitted or averaged data.
    """

    runs: list[Line] = field(default_factory=list)
    pairs: list[Line] = field(default_factory=list)
    brackets: list[Line] = field(default_factory=list)
    gold: list[Line] = field(default_factory=list)
    judges: list[Line] = field(default_factory=list)
    benchmarks: list[Line] = field(default_factory=list)
    paired: list[Line] = field(default_factory=list)
    comparisons: list[Line] = field(default_factory=list)
    conclusions: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect(paths: Sequence[Path], limits: Limits | None = None) -> ReportData:
    """Reads runs, tournaments and evaluations.

    Args:
        paths: folders, or single files from `tournament --brackets`, `eval` or `compare`. A folder
            is a run folder or contains run folders one level below. Files with brackets or results
            in the folder itself are also read.
        limits: limits on the data.

    Raises:
        ValueError: a path does not exist or has no data for a report, or a file is broken. The
            message contains the path.
    """
    limits = limits or Limits()
    data = ReportData()
    folders: list[Path] = []
    for path in {os.path.realpath(path): path for path in paths}.values():
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        found = _folders(path)
        loose = _loose_files(path, data, limits)
        if not found and not loose:
            raise ValueError(
                f"{path}: nothing to report on: no {METRICS} from training, no {RESULTS} from an "
                "evaluation or comparison, and no tournament with brackets (self-judge "
                "tournament --brackets)"
            )
        folders += [folder for folder in found if folder not in folders]
    names = _names(folders)
    for folder, name in zip(folders, names, strict=True):
        with entries_of(folder / METRICS):
            data.runs.append(_run(folder, name, data, limits))
    _sample_pairs(folders, data, limits)
    for run in data.runs:
        if run["averaged"] > 1:
            data.notes.append(
                f"{run['name']}: curves are averages over windows of {run['averaged']} logs"
            )
    return data


def _conclude(about: str, conclusions: Sequence[Conclusion], data: ReportData) -> None:
    data.conclusions += [{"about": about, **line} for line in as_json(conclusions)]


# -- runs ----------------------------------------------------------------------------------------


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    below = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("checkpoint-"))
    return [p for p in (path, *below) if (p / METRICS).is_file()]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest distinct suffixes of the paths.

    If there are several paths, each suffix has at least two parts.
    """
    # A single run a/jsft becomes `jsft`. The runs x/a/jsft and x/b/jsft become `a/jsft` and
    # `b/jsft`.
    parts = [f.resolve().parts for f in folders]
    length = 1 if len(folders) < 2 else 2
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


def run_conclusions(folder: Path) -> list[Conclusion]:
    """Returns the conclusions on a training run, from its folder."""
    return _run_conclusions(_points(folder)[0], _json(folder / DATA))


Points = dict[str, tuple[list[int], list[float | None]]]


def _run_conclusions(points: Points, counts: Line) -> list[Conclusion]:
    series = {key: values for key, (_, values) in points.items()}
    prompts = sum(c.get("records", 0) for c in counts.values() if isinstance(c, dict))
    return training_conclusions(series, prompts or None)


def _points(folder: Path) -> tuple[Points, int]:
    """Returns the steps and values of each logged metric, and the number of logs."""
    points: Points = {}
    logs = 0
    for line in read_lines(folder / METRICS):
        logs += "train_runtime" not in line
        for key, value in line.items():
            if key in ("step", "time", "epoch") or isinstance(value, str):
                continue
            if not (value is None or isinstance(value, (int, float))):
                raise TypeError(f"{key!r} is not a number")
            steps, values = points.setdefault(key, ([], []))
            steps.append(operator.index(line["step"]))
            values.append(value)
    return points, logs


def _run(folder: Path, name: str, data: ReportData, limits: Limits) -> Line:
    points, logs = _points(folder)
    counts = _json(folder / DATA)
    _conclude(name, _run_conclusions(points, counts), data)
    lengths = points.get("completions/mean_length")
    if lengths and lengths[1][0]:
        # In the first step, the policy equals the reference.
        first = lengths[1][0]
        points["completions/length_drift"] = (
            lengths[0],
            [None if v is None else v / first for v in lengths[1]],
        )
    about = _json(folder / RUN)
    longest = max((len(steps) for steps, _ in points.values()), default=0)
    return {
        "name": name,
        "folder": str(folder),
        "kind": about.get("kind") or ("self_judge" if "judge/margin" in points else "jsft"),
        "logs": logs,
        "averaged": math.ceil(longest / limits.points),
        "series": {
            key: _thinned(steps, values, limits.points) for key, (steps, values) in points.items()
        },
        "about": about,
        "data": counts,
    }


def _thinned(steps: list[int], values: list[float | None], most: int) -> Line:
    """Averages values over equal windows into at most `most` points.

    A window with a missing value becomes `None`.
    """
    window = math.ceil(len(steps) / most)
    if window > 1:
        chunks = [values[i : i + window] for i in range(0, len(values), window)]
        steps = [steps[min(i + window, len(steps)) - 1] for i in range(0, len(steps), window)]
        values = [
            None if None in chunk else math.fsum(v or 0.0 for v in chunk) / len(chunk)
            for chunk in chunks
        ]
    return {"step": steps, "value": values}


def _json(path: Path) -> Line:
    if not path.is_file():
        return {}
    try:
        content = loads(path.read_bytes(), nan_is_null=True)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


# -- pairs ---------------------------------------------------------------------------------------


def _sample_pairs(folders: Sequence[Path], data: ReportData, limits: Limits) -> None:
    """Selects pairs evenly over the saved steps, with an equal share for each run."""
    with_pairs = [(i, rollout_files(f)) for i, f in enumerate(folders)]
    with_pairs = [(i, files) for i, files in with_pairs if files]
    if not with_pairs:
        return
    share = limits.pairs // len(with_pairs)
    there = 0
    for run, files in with_pairs:
        there += sum(path.read_bytes().count(b"\n") for _, path in files)
        chosen = _evenly(files, share)
        for place, (_, path) in enumerate(chosen):
            own = share * (place + 1) // len(chosen) - share * place // len(chosen)
            lines = itertools.islice(read_lines(path), own)
            data.pairs += [_pair(line, run, limits) for line in lines]
    if len(data.pairs) < there:
        data.notes.append(
            f"this page shows {len(data.pairs):,} of the {there:,} pairs on disk, spread evenly "
            "over the steps"
        )


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` evenly spread items, including the first and the last item."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _pair(line: Line, run: int, limits: Limits) -> Line:
    kept = dict(line)
    for name in ("context", "prompt", "chosen", "rejected"):
        if isinstance(kept.get(name), str):
            kept[name] = cut(kept[name], limits.characters)
    return {"run": run, **kept}


# -- tournaments and judges ----------------------------------------------------------------------


def _loose_files(path: Path, data: ReportData, limits: Limits) -> bool:
    """Reads the files that do not belong to a run, and returns whether there are any."""
    found = False
    name = (path.parent if path.name == RESULTS else path).name
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with entries_of(file):
            found |= _loose_file(path, file, name, data, limits)
    return found


def _loose_file(path: Path, file: Path, name: str, data: ReportData, limits: Limits) -> bool:
    if file.suffix == ".jsonl" and file.name != METRICS:
        kind = _kind(file)
        if kind == "bracket":
            _add_brackets(file, data, limits)
        elif kind == "judged":
            _add_verdicts(name, read_lines(file), data)
        return kind is not None
    if file.name in (RESULTS, SUMMARY) or (file == path and file.suffix == ".json"):
        results = _json(file)
        if file.name == SUMMARY and isinstance(results.get("examples"), list):
            data.gold.append({"name": name, **results})
        elif file.name == SUMMARY and file != path:
            return False  # of a training run, which is read from its other files
        elif isinstance(results.get("length_controlled_win_rate"), dict):
            _add_comparison(name, results, data)
            pairs = compared_pairs(file.with_name(PAIRS), limits.pairs, limits.characters)
            data.comparisons[-1]["pairs"] = pairs
        elif file == path or isinstance(results.get("overall"), dict):
            _add_evaluation(name, results, data)
        else:
            return False  # results from another program
        return True
    return False


def _kind(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        first = next(read_lines(file), {})
    except ValueError:
        return None  # a file from another program
    if isinstance(first.get("bracket"), list) and isinstance(first.get("responses"), list):
        return "bracket"
    return "judged" if "probabilities" in first and "gold" in first else None


def _add_brackets(file: Path, data: ReportData, limits: Limits) -> None:
    there = 0
    for line in read_lines(file):
        there += 1
        if len(data.brackets) < limits.brackets:
            data.brackets.append(
                {
                    "source": file.name,
                    "context": cut(_context(line), limits.characters),
                    "responses": [cut(r, limits.characters) for r in line["responses"]],
                    "winner": line["winner"],
                    "rounds": line["bracket"],
                    "principles": line.get("principles"),
                    "prior": line.get("prior"),
                    "gold_scores": line.get("gold_scores"),
                    "gold_reasons": line.get("gold_reasons"),
                }
            )
    if there > limits.brackets:
        data.notes.append(f"{file.name}: showing {limits.brackets} of {there:,} tournaments")


def _context(line: Mapping[str, Any]) -> str:
    context = line.get("context")
    if isinstance(context, str):
        return context
    prompt = line.get("prompt", "")
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(str(message.get("content", "")) for message in prompt)


def _add_verdicts(name: str, lines: Iterable[Line], data: ReportData) -> None:
    """Adds a judge from the lines that the demo wrote with `judged_line`."""
    tally = JudgeTally(())  # the lines do not contain the names of principles
    for line in lines:
        given = dict(enumerate(line["probabilities"] or ()))
        verdict = verdict_from_json({"probabilities": given, "undecidable_because": "undecided"})
        tally.add(JudgedPair(line["gold"], verdict, None, (len(line["a"]), len(line["b"]))))
    report = tally.report()
    data.judges.append(_judge(name, report))
    _conclude(name, judge_conclusions(report), data)


def _add_comparison(name: str, results: Line, data: ReportData) -> None:
    """Adds a comparison of two policies from its `results.json`."""
    kept = (
        *("prompts", "wins", "ties", "losses", "win_rate", "length_controlled_win_rate"),
        *("both_orders", "longer_wins_all", "order_agreement", "characters", "policies"),
    )
    missing = [key for key in kept if key not in results]
    if missing:
        raise ValueError(f"{name}: not the results of a comparison: {', '.join(missing)} missing")
    a, b = results["policies"]
    data.comparisons.append({"name": f"{a} against {b}", **{key: results[key] for key in kept}})
    _conclude(f"{a} against {b}", comparison_conclusions(results), data)


def _add_evaluation(name: str, results: Line, data: ReportData) -> None:
    """Adds the evaluation of a judge from its `results.json`, for all pairs and by subset."""
    if not isinstance(results.get("overall"), dict):
        raise ValueError(
            f"{name}: not the results of a judge's evaluation (self-judge eval) or of a comparison "
            "of policies (self-judge compare)"
        )
    _add_reports(name, results, data)
    for reason, count in (results.get("skipped") or {}).items():
        data.notes.append(f"{name}: skipped, {reason}: {count:,}")
    other = results.get("compared_with")
    # Results from other programs may also have this key.
    if isinstance(other, dict) and isinstance(other.get("overall"), dict):
        _add_reports(f"{name} · compared", other, data)
        paired = other.get("paired") or {}
        by_subset = {"all": paired.get("overall"), **(paired.get("subsets") or {})}
        data.paired += [
            {"name": f"{name} · {subset} against {_model(other) or 'the other'}", **numbers}
            for subset, numbers in by_subset.items()
            if numbers
        ]


def _add_reports(name: str, results: Line, data: ReportData) -> None:
    model = _model(results)
    titled = f"{name} ({model})" if model else name
    data.judges.append(_judge(titled, results["overall"]))
    _conclude(titled, judge_conclusions(results["overall"]), data)
    for subset, numbers in (results.get("subsets") or {}).items():
        data.judges.append(_judge(f"{name} · {subset}", numbers))
    benchmarks = results.get("benchmarks")
    # Results from other programs may also have this key.
    for benchmark, own in benchmarks.items() if isinstance(benchmarks, dict) else ():
        if not isinstance(own, dict) or not isinstance(own.get("subsets"), dict):
            continue
        subsets = {"all": own["overall"], **own["subsets"]}
        rows = [{"name": name, "metrics": m} for name, m in subsets.items() if name]
        data.benchmarks.append(
            {"name": f"{benchmark}: {titled}", "rows": rows, "unpaired": own.get("unpaired")}
        )


def _model(results: Line) -> str | None:
    """Returns the name of the judge model if the results contain it, as those of `eval` do."""
    judge = results.get("judge")
    return judge.get("model") if isinstance(judge, dict) else None


def _judge(name: str, numbers: Line) -> Line:
    """Returns the parts of a `JudgeTally.report` that the page shows."""
    kept = (
        *("pairs", "accuracy", "order_agreement", "decided_by_position", "first_position"),
        *("longer", "letter_mass", "calibration", "principles", "baselines"),
    )
    undecidable = (numbers.get("undecidable") or {}).get("share")
    return {"name": name, "undecidable": undecidable, **{key: numbers.get(key) for key in kept}}

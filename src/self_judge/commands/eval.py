"""`self-judge eval` evaluates a judge on labeled comparisons, and writes JSON and an HTML page.

This module calls other modules that read the data, judge the pairs, and compute and draw the
results.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from self_judge import __version__
from self_judge.commands.judge import CHUNK, Item, judge_in_bulk
from self_judge.commands.resumable import RankShards
from self_judge.console import Terminal, masked, say
from self_judge.data.benchmarks import BenchmarkSource, Share, read_comparisons, share_of
from self_judge.data.labeled_pairs import LabeledComparison
from self_judge.evaluation.benchmark_metrics import BenchmarkTally
from self_judge.evaluation.conclusions import as_json, judge_conclusions
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally, PairedTally, credit
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.voting import verdict_from_json
from self_judge.prompting.thoughts import answer_of
from self_judge.reporting.eval_tables import print_results
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import loads, write_json
from self_judge.storage.jsonl import entries_of, read_journal, settings_path
from self_judge.storage.repository import refuse_overwriting
from self_judge.storage.run_dir import PAIRS, RESULTS, VERDICTS

# The fields of a pair in a line of the output.
_LINE = ("source", "index", "subset", "principle", "label", "digest", "benchmark", "part")
_ANEW = ": the file was changed or damaged: evaluate again with --overwrite"
_ALL = ""  # the key for all pairs, alongside the subset names


@dataclass(frozen=True)
class JudgeEvaluation:
    """The labeled pairs of an evaluation.

    Args:
        sources: sources of labeled comparisons.
        max_pairs: the maximum number of pairs from each source, spread evenly over its subsets (see
            `share_of`); default: all.
        chunk: number of comparisons per write to disk.
    """

    sources: Sequence[BenchmarkSource]
    max_pairs: int | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"--max-pairs must be at least 1, got {self.max_pairs}")
        for number, source in enumerate(self.sources):
            if source in self.sources[:number]:
                raise ValueError(f"{source.label}: the source is given twice")

    @cached_property
    def _shares(self) -> list[Share | None]:
        most = self.max_pairs
        return [None if most is None else share_of(source, most) for source in self.sources]

    def read(self, skipped: Counter[str] | None = None) -> Iterator[LabeledComparison]:
        """Yields all comparisons. With several sources, subset names include source names."""
        for source, share in zip(self.sources, self._shares, strict=True):
            for pair in read_comparisons(source, skipped, share):
                if len(self.sources) > 1:
                    named = "/".join(p for p in (Path(source.label).name, pair.subset) if p)
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
    """Evaluates a judge and returns the contents of `output/results.json`.

    The function appends verdicts to `output/verdicts.jsonl`. After an interruption, the same call
    resumes. Under `accelerate launch`, each process judges its shard of the pairs, and the main
    process computes the results.

    Args:
        compare: another judge, or the folder of a finished evaluation, for a paired comparison on
            the same pairs; see `compared_judge`.
        overwrite: whether to judge from scratch even if verdicts exist.
        console: the console for the tables.

    Raises:
        ValueError: the data, the model or the templates cannot be used, or `output` contains
            another evaluation.
    """
    output, console = Path(output), console or Terminal()
    compared = output / "compared" / VERDICTS
    files = [output / RESULTS, output / VERDICTS, compared]
    refuse_overwriting(files, [source.label for source in evaluation.sources])
    if (output / PAIRS).exists():
        raise ValueError(f"{output} contains a policy comparison: choose another output folder")
    if isinstance(compare, Path):
        refuse_overwriting([output], [compare])
    skipped: Counter[str] = Counter()
    rate = _judged(choice, evaluation, output / VERDICTS, skipped, overwrite, "judging")
    theirs: Path | None = None
    if isinstance(compare, JudgeChoice):
        theirs = compared
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
    """Writes and prints the results. The file `theirs` contains the other judge's verdicts."""
    results: dict[str, Any] = {
        "kind": "judge evaluation",
        "version": __version__,
        "judge": choice.settings(),
        "data": [asdict(replace(source, path=source.label)) for source in evaluation.sources],
        "skipped": dict(skipped),
        "pairs_per_second": rate,
        **_tallied(output / VERDICTS, choice.principles),
    }
    results["conclusions"] = as_json(judge_conclusions(results["overall"]))
    if theirs is not None:
        results["compared_with"] = _compared(output / VERDICTS, theirs)
    write_json(output / RESULTS, masked(results))
    print_results(results, console)
    say(console, f"written to {output}: {RESULTS}, {VERDICTS}")
    report_on(output / RESULTS, console)  # ignore other files in the folder
    return results


def compared_judge(other: str, **settings: Any) -> JudgeChoice | Path:
    """Interprets `--compare` as the folder of a finished evaluation or as a judge to run.

    Args:
        settings: see `JudgeChoice.of`.
    """
    folder = Path(other)
    return folder if (folder / VERDICTS).is_file() else JudgeChoice.of(other, **settings)


def _judged(
    choice: JudgeChoice,
    evaluation: JudgeEvaluation,
    path: Path,
    skipped: Counter[str],
    overwrite: bool,
    title: str,
) -> float | None:
    def items() -> Iterator[Item]:
        skipped.clear()
        used = False
        for pair in evaluation.read(skipped):
            shown = (pair.comparison.response_a, pair.comparison.response_b)
            line = {
                **{name: getattr(pair, name) for name in _LINE},
                "characters": [len(answer_of(text) or "") for text in shown],
            }
            yield Item(pair.comparison, line)
            used = True
        if not used:
            found = "; ".join(f"{why}: {count:,}" for why, count in skipped.items())
            named = ", ".join(source.label for source in evaluation.sources)
            raise ValueError(f"{named}: no pair can be judged ({found})")

    _, rate = judge_in_bulk(
        items,
        path,
        choice,
        {"max_pairs": evaluation.max_pairs},
        known_by=("digest", "subset"),
        chunk=evaluation.chunk,
        overwrite=overwrite,
        title=title,
    )
    return rate if rate == rate else None


def _judged_pair(line: Mapping[str, Any], principles: Sequence[str]) -> JudgedPair:
    principle = line["principle"]
    index = principles.index(principle) if principle in principles else None
    a, b = line["characters"]
    return JudgedPair(line["label"], verdict_from_json(line["verdict"]), index, (a, b))


def _tallied(verdicts: Path, principles: Sequence[str]) -> dict[str, Any]:
    tallies = {_ALL: JudgeTally(principles)}
    own = BenchmarkTally()
    thoughts, count = 0.0, 0  # tokens of the judge's thoughts, and pairs
    with entries_of(verdicts, remedy=_ANEW):
        for _, found in itertools.groupby(
            read_journal(verdicts), lambda line: (line["source"], line["index"])
        ):
            lines = list(found)
            pairs = [_judged_pair(line, principles) for line in lines]
            for line, pair in zip(lines, pairs, strict=True):
                thoughts, count = thoughts + line["verdict"].get("thought_tokens", 0.0), count + 1
                for name in dict.fromkeys((_ALL, line["subset"] or _ALL)):
                    tallies.setdefault(name, JudgeTally(principles)).add(pair)
            # Earlier versions did not write the benchmark.
            parts = [line.get("part", "") for line in lines]
            own.add(lines[0].get("benchmark", ""), lines[0]["subset"], parts, pairs)
    mean = thoughts / count if thoughts else None
    return {"thought_tokens_per_pair": mean, **_reports(tallies), "benchmarks": own.report()}


def _reports(tallies: dict[str, Any]) -> dict[str, Any]:
    overall = tallies.pop(_ALL).report()
    return {"overall": overall, "subsets": {name: t.report() for name, t in tallies.items()}}


def _settings(verdicts: Path) -> dict[str, Any]:
    path = settings_path(verdicts)
    with entries_of(path, remedy=_ANEW):
        settings = dict(loads(path.read_bytes())["settings"])
        return {**settings, "principles": list(settings["principles"])}


def _compared(verdicts: Path, theirs: Path) -> dict[str, Any]:
    own, settings = (_settings(path) for path in (verdicts, theirs))
    principles = settings["principles"]
    paired = {_ALL: PairedTally()}
    for ours, line in itertools.zip_longest(read_journal(verdicts), read_journal(theirs)):
        if ours is None or line is None or ours.get("digest") != line.get("digest"):
            raise ValueError(
                f"{theirs} and {verdicts} have different pairs: evaluate both judges on the same "
                "data"
            )
        with entries_of(theirs, remedy=_ANEW):
            if ours["label"] == "tie":
                continue
            credits = [
                credit(_judged_pair(each, names).counted.preferred, each["label"])
                for each, names in ((ours, own["principles"]), (line, principles))
            ]
        for name in dict.fromkeys((_ALL, ours["subset"] or _ALL)):
            paired.setdefault(name, PairedTally()).add(credits[0], credits[1])
    return {"judge": settings, **_tallied(theirs, principles), "paired": _reports(paired)}

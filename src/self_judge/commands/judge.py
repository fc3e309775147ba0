"""Judges many comparisons in chunks and writes the verdicts to a resumable file.

`eval` and `compare` use `judge_in_bulk`. `run_judge` implements `self-judge judge`, which adds
verdicts to the records of a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from rich.console import Console

from self_judge.commands.resumable import ResumableJob, Work, input_and_output, input_reader
from self_judge.console import Terminal, print_conclusions, say
from self_judge.data.records import RecordRef, question_columns
from self_judge.data.sources import question_of
from self_judge.datatypes import Comparison
from self_judge.evaluation.conclusions import as_json, judge_conclusions
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.voting import verdict_from_json, verdict_json
from self_judge.storage.jsonl import entries_of, read_journal

CHUNK = 64  # number of comparisons per write to disk; a killed process loses at most one chunk


class Item(NamedTuple):
    """A comparison to judge, and the fields of its output line except the verdict."""

    comparison: Comparison
    line: dict[str, Any]


def judge_in_bulk(
    items: Callable[[], Iterator[Item]],
    output: Path,
    choice: JudgeChoice,
    settings: Mapping[str, Any],
    *,
    field: str = "verdict",
    known_by: Sequence[str] = (),
    chunk: int = CHUNK,
    overwrite: bool = False,
    title: str = "judging",
    console: Console | None = None,
) -> tuple[int, float]:
    """Judges all items, writes one line per item in order, and resumes an interrupted call.

    Args:
        items: returns the items from the start at every call.
        settings: settings other than `choice` that the lines depend on.
        field: key of the verdict in a line.
        known_by: the fields that must be equal in an existing line and its item; default: all.
        output, chunk, title: see `ResumableJob`.
        overwrite, console: see `ResumableJob.run`.

    Returns:
        The number of lines, and the number of pairs judged per second (NaN if unknown).

    Raises:
        ValueError: an item cannot be used, or the existing file was written for other items or
            settings.
    """
    principles = choice.principles

    def load() -> Work[Item]:
        judge = choice.load()

        def judged(batch: list[Item]) -> list[dict[str, Any]]:
            before = judge.thought_tokens
            verdicts = judge.compare([item.comparison for item in batch])
            # Verdicts share thoughts about equal prompts, so each gets the mean of its chunk.
            tokens = (judge.thought_tokens - before) / len(batch)
            cost = {"thought_tokens": round(tokens, 1)} if tokens else {}
            return [
                {**item.line, field: {**verdict_json(verdict, principles), **cost}}
                for item, verdict in zip(batch, verdicts, strict=True)
            ]

        return judged

    def is_line_of(written: Mapping[str, Any], item: Item) -> bool:
        names = known_by or (written.keys() | item.line.keys()) - {field}
        there, given = (
            {name: line[name] for name in names if name in line} for line in (written, item.line)
        )
        return there == given

    job = ResumableJob(
        items,
        output,
        {**choice.settings(), **settings},
        is_line_of,
        mismatch="it does not match line {number} of the input",
        title=title,
        things="pairs",
        chunk=chunk,
    )
    return job.run(load, overwrite=overwrite, console=console)


def run_judge(
    source: str | Path,
    target: str | Path,
    choice: JudgeChoice,
    *,
    field: str = "verdict",
    columns: Mapping[str, str] | None = None,
    chunk: int = CHUNK,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Adds the judge's verdict as `field` to every input line and returns the number of lines.

    Under `accelerate launch`, each process judges the pairs in its shard of the lines, and the main
    process joins the shards.

    Args:
        source: a file of any supported type (see `files.FORMATS`), with `context` (a string) or
            `prompt` (a string or messages), and with `response_a` and `response_b`, or `responses`
            with two strings.
        target: the output, with one line per input line, in order. An interrupted call resumes.
        columns: the input's own column names; see `map_columns`.

    Raises:
        ValueError: a line cannot be used; the message names the file, line number and field.
    """
    source, target = input_and_output(source, target, choice.models)
    read = input_reader(source, console, _used, columns)

    def items() -> Iterator[Item]:
        for where, line in read():
            yield Item(_comparison(line, where, field), line)

    console = console or Terminal(stderr=True)
    total, rate = judge_in_bulk(
        items,
        target,
        choice,
        {"field": field},
        field=field,
        chunk=chunk,
        overwrite=overwrite,
        console=console,
    )
    if PartialState().is_main_process and target.is_file():
        _summarize(target, field, rate, console)
    return total


def _summarize(target: Path, field: str, rate: float, console: Console) -> None:
    """Prints what the verdicts in a file came to."""
    tally, preferred = JudgeTally(()), Counter[str | None]()
    with entries_of(target):
        for line in read_journal(target):
            verdict = verdict_from_json(line[field])
            preferred[verdict.preferred] += 1
            tally.add(JudgedPair("tie", verdict, None, (0, 0)))  # the pairs have no labels
    report = tally.report()
    agreement = report["order_agreement"]
    say(
        console,
        f"{target}: {report['pairs']:,} pairs"
        + (f", {rate:.2f} per second" if rate == rate else "")
        + f"; a is preferred in {preferred['a']:,}, b in {preferred['b']:,}, neither in "
        f"{preferred[None]:,}"
        + (f"; orders agree in {agreement['value']:.0%}" if agreement else ""),
    )
    print_conclusions(console, as_json(judge_conclusions(report)))


def _used(line: Mapping[str, Any]) -> list[str]:
    listed = line.get("responses") is not None
    return question_columns(line) + (["responses"] if listed else ["response_a", "response_b"])


def _comparison(line: dict[str, Any], where: RecordRef, field: str) -> Comparison:
    if field in line:
        raise where.error(field, "already exists; choose another key with --field NAME")
    context, _ = question_of(line, where)
    if line.get("responses") is not None:
        responses = where.texts(line, "responses")
        if len(responses) != 2:
            raise where.error("responses", f"expected two strings, got {len(responses)}")
        a, b = responses
    else:
        a, b = where.text(line, "response_a"), where.text(line, "response_b")
    return Comparison(context, a, b)

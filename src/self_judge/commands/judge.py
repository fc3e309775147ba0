"""Many comparisons judged in chunks into a file that an interruption does not lose.

`judge_in_bulk` serves `eval` and `compare`; `run_judge` is `self-judge judge`: JSON lines in, the
same lines with verdicts out. It does not know what the verdicts are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from self_judge.commands.judge_choice import JudgeChoice
from self_judge.commands.resumable import ResumableJob, Work, input_and_output
from self_judge.data.files import read_raw
from self_judge.data.records import RecordRef
from self_judge.datatypes import Comparison
from self_judge.judging.voting import verdict_json
from self_judge.prompting.judge_templates import dialogue_text

CHUNK = 64  # comparisons judged between two writes: what a kill costs at most


class Case(NamedTuple):
    """A comparison to judge, and what its line holds beside the verdict."""

    comparison: Comparison
    line: dict[str, Any]


def judge_in_bulk(
    cases: Callable[[], Iterator[Case]],
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
    """Writes one line per case, in order; resumes where an earlier call was stopped.

    Args:
        cases: gives the cases from scratch at every call.
        settings: what the lines depend on beside `choice`.
        field: where the verdict stands in a line.
        known_by: what a line that is there must share with its case; default: all.
        output, chunk, title: see `ResumableJob`.
        overwrite, console: see `ResumableJob.run`.

    Returns:
        The number of lines, and how many pairs per second were judged (NaN if unknown).

    Raises:
        ValueError: a case cannot be used, or the file there belongs to other cases or settings.
    """
    principles = choice.judge_templates().principles

    def load() -> Work[Case]:
        judge = choice.load()

        def judged(batch: list[Case]) -> list[dict[str, Any]]:
            verdicts = judge.compare([case.comparison for case in batch])
            return [
                {**case.line, field: verdict_json(verdict, principles)}
                for case, verdict in zip(batch, verdicts, strict=True)
            ]

        return judged

    def is_line_of(written: Mapping[str, Any], case: Case) -> bool:
        # Dictionaries, not values, are compared: in one, the NaN of Python's JSON equals itself.
        names = known_by or (written.keys() | case.line.keys()) - {field}
        there, given = (
            {name: line[name] for name in names if name in line} for line in (written, case.line)
        )
        return there == given

    job = ResumableJob(
        cases,
        output,
        {**choice.settings(), **settings},
        is_line_of,
        mismatch="it is not the verdict on line {number} of this input",
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
    chunk: int = CHUNK,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Writes every input line with the judge's verdict under `field`; returns their number.

    Under `accelerate launch` each process judges its share of the lines, and the first joins them.

    Args:
        source: JSON lines with `context` (a text) or `prompt` (a text or messages), and
            `response_a` and `response_b`, or `responses` with two texts.
        target: one line per line of the input, in order; resumed after an interruption.

    Raises:
        ValueError: a line that cannot be used; file, line number and field are named.
    """
    source, target = input_and_output(source, target)

    def cases() -> Iterator[Case]:
        for number, line in enumerate(read_raw(str(source))):
            yield Case(_comparison(line, RecordRef(str(source), number), field), line)

    total, _ = judge_in_bulk(
        cases,
        target,
        choice,
        {"field": field},
        field=field,
        chunk=chunk,
        overwrite=overwrite,
        console=console,
    )
    return total


def _comparison(line: dict[str, Any], where: RecordRef, field: str) -> Comparison:
    if field in line:
        raise where.error(field, "is there already; write the verdict elsewhere with --field NAME")
    if "context" in line:
        context = where.text(line, "context")
    elif isinstance(line.get("prompt"), str):
        context = where.text(line, "prompt").strip()
    elif "prompt" in line:
        context = dialogue_text(where.messages(line["prompt"], "prompt"))
    else:
        raise where.error("context", "is missing, and there is no 'prompt' either")
    if "responses" in line:
        responses = where.items(line, "responses")
        if len(responses) != 2 or not all(isinstance(r, str) for r in responses):
            raise where.error("responses", "expected a list of two texts")
        a, b = responses
    else:
        a, b = where.text(line, "response_a"), where.text(line, "response_b")
    return Comparison(context, a, b)

"""Checks the clock, turn markers in data, lengths that tell labels, and other judges.

As in `findings.py`, each function yields findings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from self_judge.check.findings import Finding, note, problem, warning
from self_judge.config.schema import JSFTRun, SelfJudgeRun
from self_judge.datatypes import PreferenceRecord
from self_judge.judging.choice import JudgeChoice
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.prompting.template_source import CLOCK
from self_judge.training.setup import already_rendered

_MANY = 20  # with fewer pairs, the lengths may be chance


def other_judge_findings(choice: JudgeChoice) -> Iterator[Finding]:
    """Names the judges of a run, and checks that the keys of their endpoints exist."""
    where = "self_judge_args.judge"
    yield note(
        where,
        f"judged by {', '.join(choice.members)}. The estimates do not include the memory, the time "
        "and the thoughts of judges other than the initial model",
    )
    for name, member in choice.members.items():
        variable = member and member.api_key_env
        if variable and not os.environ.get(variable):
            yield problem(where, f"{name}: the environment variable {variable} has no key: set it")


def clock_findings(encoder: ChatEncoder, run: JSFTRun | SelfJudgeRun) -> Iterator[Finding]:
    """Checks for a chat template that reads the clock."""
    date = encoder.chat_template_kwargs.get(CLOCK)
    if date is None:
        return
    about = f"templates.chat_template_kwargs.{CLOCK}"
    yield note(
        about,
        "the chat template reads the clock: all prompts in this run, and later prompts to the "
        f"trained model, contain the date {date}. Set this key to choose another date",
    )
    saved = load_judge_settings(run.model.model_name_or_path, run.model.revision)
    known = {**(run.templates.chat_template_kwargs or {})}
    known |= saved.chat_template_kwargs if saved else {}
    if isinstance(run, SelfJudgeRun) and saved is not None and CLOCK not in known:
        yield warning(
            about,
            "the model's judge.json does not contain the date in the prompts that the model was "
            "trained on: set this key to that date",
        )


def rendered_findings(
    records: Sequence[PreferenceRecord], encoder: ChatEncoder
) -> Iterator[Finding]:
    """Checks for turn markers in texts, a sign that a chat template was already applied."""
    rendered = already_rendered(records, encoder)
    if rendered is not None:
        yield warning("dataset.sources", rendered)


def chosen_longer(records: Sequence[PreferenceRecord]) -> float | None:
    """Returns the share of pairs in which the better response is longer."""
    longer = [len(pair.chosen) > len(pair.rejected) for r in records for pair in r.pairs]
    return sum(longer) / len(longer) if longer else None


def length_findings(records: Sequence[PreferenceRecord]) -> Iterator[Finding]:
    """Checks whether the lengths of responses alone tell the better one."""
    longer = chosen_longer(records)
    if longer is None or sum(len(record.pairs) for record in records) < _MANY:
        return
    if not 0.1 < longer < 0.9:
        yield warning(
            "dataset.sources",
            f"the better response is longer in {longer:.0%} of the pairs, so the judge may learn "
            "length alone: balance the lengths",
        )

"""Findings on texts: chat templates that read the clock, and data that was rendered before.

It yields findings in words, as `findings.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from self_judge.check.findings import Finding, note, warning
from self_judge.config.schema import JSFTRun, SelfJudgeRun
from self_judge.datatypes import PreferenceRecord
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.chat_template import CLOCK
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.training.setup import already_rendered


def clock_findings(encoder: ChatEncoder, run: JSFTRun | SelfJudgeRun) -> Iterator[Finding]:
    """A template that reads the clock."""
    date = encoder.chat_template_kwargs.get(CLOCK)
    if date is None:
        return
    about = f"templates.chat_template_kwargs.{CLOCK}"
    yield note(
        about,
        "the chat template reads the clock: every prompt of the run, and of the model it writes, "
        f"has the date {date}; set this key to choose another",
    )
    saved = load_judge_settings(run.model.model_name_or_path)
    known = {**(run.templates.chat_template_kwargs or {})}
    known |= saved.chat_template_kwargs if saved else {}
    if isinstance(run, SelfJudgeRun) and saved is not None and CLOCK not in known:
        yield warning(
            about,
            "the model's judge.json does not tell the date of its training: set this key to that "
            "date",
        )


def rendered_findings(
    records: Sequence[PreferenceRecord], encoder: ChatEncoder
) -> Iterator[Finding]:
    """Texts with turn markers: data that a chat template has rendered before."""
    rendered = already_rendered(records, encoder)
    if rendered is not None:
        yield warning("dataset.sources", rendered)

"""`self-judge tournament` picks the best of N responses for each record of a file.

This module reads and writes the files. Other packages implement sampling, judging and brackets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from rich.console import Console

from self_judge.adapters import fingerprint
from self_judge.commands.policies import check_prompt, encoder_of, load_sampler
from self_judge.commands.resumable import (
    RankShards,
    ResumableJob,
    Work,
    input_and_output,
    input_reader,
)
from self_judge.config.self_training import SamplingSettings
from self_judge.console import Terminal, say
from self_judge.data.records import RecordRef, prompt_columns, question_columns
from self_judge.data.sources import question_of
from self_judge.datatypes import Message, Response, stable_seed
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.judging.choice import JudgeChoice, date_of
from self_judge.judging.panel import AnyJudge, Panel
from self_judge.judging.tournament import Bracket, judged_knockouts
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.thoughts import with_answers
from self_judge.storage.jsonl import read_journal

# Lines per chunk. The judge processes one round of all tournaments in a chunk together.
CHUNK = 256
ADDED = ("winner", "response", "unanswered", "principles", "bracket")


@dataclass(frozen=True)
class TournamentJob:
    """The judge, the policy and the settings of tournaments.

    Args:
        judge: the judge.
        sampling: sampling parameters for the responses.
        policy: the model to sample from; default: the judge, on its servers if there are any.
        n: number of responses per prompt.
        seed: seed for sampling, brackets and random winners.
        brackets: whether to write the principles, the matches and the judge's probabilities.
        max_prompts: the number of records to use, from the start of the file; default: all.
        prior: the weight of the mean log probability per token that the judge's model gives to a
            sampled response. With 0, only the judge decides.

    Raises:
        ValueError: a number is below 1, or the weight is negative or not finite.
    """

    judge: JudgeChoice
    sampling: SamplingSettings
    policy: str | None = None
    n: int = 16
    seed: int = 0
    brackets: bool = False
    max_prompts: int | None = None
    prior: float = 0.0

    def __post_init__(self) -> None:
        for option, value in (("--n", self.n), ("--max-prompts", self.max_prompts)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if not 0 <= self.prior < math.inf:
            raise ValueError(f"--prior must be 0 or a positive number, got {self.prior}")

    @functools.cached_property
    def policy_encoder(self) -> ChatEncoder | None:
        return None if self.policy is None else encoder_of(self.policy)

    def settings(self) -> dict[str, Any]:
        """Returns all settings that affect a line. They must be the same when a call resumes."""
        settings = {
            **self.judge.settings(),
            "policy": self.policy,
            "policy_weights": fingerprint(self.policy) if self.policy is not None else None,
            **dataclasses.asdict(self.sampling),
            "n": self.n,
            "seed": self.seed,
            "brackets": self.brackets,
        }
        if self.prior:
            settings["prior"] = self.prior
        if self.policy_encoder is not None:
            dates = date_of(self.policy_encoder)
            settings |= {f"policy_{name}": date for name, date in dates.items()}
        return settings

    def load(self) -> Work[Entry]:
        """Loads the judge and returns a function that runs a chunk of tournaments."""
        judge = self.judge.load()
        sampler = functools.cache(lambda: self._sampler(judge))  # loaded on first use
        initial = self._initial(judge) if self.prior else None

        def played(entries: list[Entry]) -> list[dict[str, Any]]:
            responses, priors = self._with_samples(entries, sampler, initial)
            knockouts = judged_knockouts(
                judge,
                [entry.context for entry in entries],
                responses,
                seeds=[stable_seed(self.seed, entry.number) for entry in entries],
                priors=priors if self.prior else None,
            )
            principles = judge.principles if self.brackets else None
            return [
                played_line(e.line, responses[i], knockouts[i], principles, priors[i])
                for i, e in enumerate(entries)
            ]

        return played

    def _sampler(self, judge: AnyJudge) -> TransformersSampler | VLLMSampler:
        if self.policy is not None and self.policy_encoder is not None:
            return load_sampler(self.policy, self.policy_encoder, self.sampling)
        encoder = self.judge.encoder  # or an error, if the judge cannot answer
        assert not isinstance(judge, Panel)
        if isinstance(judge.scorer, VLLMScorer):
            return VLLMSampler(judge.scorer.engine, encoder, self.sampling)
        model: Any = judge.model
        return TransformersSampler(model, encoder, self.sampling)

    def _initial(self, judge: AnyJudge) -> TransformersSampler:
        """Returns what computes the log probabilities of the prior."""
        if isinstance(judge, Panel) or judge.in_process is None:
            raise ValueError(
                "--prior needs the log probabilities of the judge's model, and so one judge in "
                "this process: it does not work with a panel, a server or an endpoint"
            )
        if self.policy_encoder is not None:
            own, other = (e.tokenizer.get_vocab() for e in (judge.encoder, self.policy_encoder))
            if own != other:
                raise ValueError("--prior needs a judge and a policy with the same tokenizer")
        model: Any = judge.model
        return TransformersSampler(model, judge.encoder, self.sampling)

    def _with_samples(
        self,
        entries: list[Entry],
        sampler: Callable[[], TransformersSampler | VLLMSampler],
        initial: TransformersSampler | None,
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Returns each entry's responses and their prior. If an entry has none, they are sampled.

        The prior is empty without `initial`. With it, no entry has responses.
        """
        missing = [entry for entry in entries if entry.responses is None]
        sampled: list[list[Response]] = []
        priors: list[list[float]] = [[] for _ in entries]
        if missing:
            prompts = [sampler().encoder.encode_prompt(entry.prompt or []) for entry in missing]
            seeds = [stable_seed(self.seed, "sample", entry.number) for entry in missing]
            sampled = sampler().sample(prompts, self.n, seeds)
            if initial is not None:
                means = initial.mean_log_probs(prompts, sampled)
                priors = [[self.prior * mean for mean in own] for own in means]
        rest = iter(sampled)
        responses = [
            [response.judged for response in next(rest)] if entry.responses is None
            else entry.responses
            for entry in entries
        ]  # fmt: skip
        return responses, priors


class Entry(NamedTuple):
    """One validated record of the input. Numbers start at 1."""

    line: dict[str, Any]
    number: int
    context: str
    responses: list[str] | None
    prompt: list[Message] | None


def run_tournament(
    source: str | Path,
    target: str | Path,
    job: TournamentJob,
    *,
    columns: Mapping[str, str] | None = None,
    chunk: int = CHUNK,
    overwrite: bool = False,
    console: Console | None = None,
) -> int:
    """Adds `winner` (an index) and `response` to every input line and returns the line count.

    After an interruption, the same call resumes after the last complete chunk. Under `accelerate
    launch`, each process runs the tournaments in its shard of the lines, and the main process joins
    the shards in order. Except for rounding, the result is the same as with one process.

    Args:
        source: a file of any supported type (see `files.FORMATS`). Each record has `context` or
            `prompt` (a string or messages), and `responses`. If a record with a prompt has no
            responses, they are sampled first.
        target: the output, with one line per input line, in order. The settings are written to a
            file next to the output.
        columns: the input's own column names; see `map_columns`.
        chunk: the number of lines that are processed together and then written to disk.
        overwrite: whether to start from scratch even if the target exists.

    Raises:
        ValueError: a line cannot be used (the message names the file, line number and field), or
            the target was written for another input or with other settings.
    """
    source, target = input_and_output(source, target, [*job.judge.models, job.policy])
    read = input_reader(source, console, _used, columns, job.max_prompts, ADDED)
    encoder = functools.cache(lambda: job.policy_encoder or job.judge.encoder)
    sampled_only = job.prior > 0
    world_size = RankShards.here(target, chunk).world_size
    lines = ResumableJob(
        lambda: (_entry(line, where, encoder, sampled_only) for where, line in read()),
        target,
        {**job.settings(), "chunk": chunk, "processes": world_size},
        _is_line_of,
        mismatch="it does not match the input",
        title="tournament",
        things="lines",
        chunk=chunk,
        may_be_longer=job.max_prompts is not None,  # a line does not depend on the number of lines
    )
    console = console or Terminal(stderr=True)
    total, rate = lines.run(job.load, overwrite=overwrite, console=console)
    if PartialState().is_main_process and target.is_file():
        _summarize(target, rate, console)
    return total


def _summarize(target: Path, rate: float, console: Console) -> None:
    """Prints what the tournaments in a file came to."""
    lines = responses = unanswered = longer = contested = by_lot = 0
    for line in read_journal(target):
        texts = line["responses"]
        lines, responses = lines + 1, responses + len(texts)
        unanswered += len(line.get("unanswered", ()))
        contested += len(texts) > 1
        longer += len(line["response"]) > sum(map(len, texts)) / len(texts)
        by_lot += sum(match["by_lot"] for matches in line.get("bracket", ()) for match in matches)
    say(
        console,
        f"{target}: {lines:,} tournament{'s' if lines > 1 else ''} with {responses:,} responses"
        + (f", {rate:.2f} per second" if rate == rate else "")
        + (
            f"; the winner is longer than the mean response in {longer / contested:.0%}"
            if contested
            else ""
        )
        + (f"; {by_lot:,} matches were undecidable and drawn by lot" if by_lot else "")
        + (f"; {unanswered:,} responses had no answer" if unanswered else ""),
    )


def played_line(
    line: Mapping[str, Any],
    responses: Sequence[str],
    bracket: Bracket,
    principles: Sequence[str] | None,
    prior: Sequence[float] = (),
) -> dict[str, Any]:
    """Returns the line plus the winner and, if `principles` is given, the bracket and its prior.

    The line's own values of these keys are left out. The key `unanswered` lists the indices of
    responses without an answer, if there are any.
    """
    written = {
        **{name: value for name, value in line.items() if name not in ADDED},
        "responses": list(responses),
        "winner": bracket.winner,
        "response": responses[bracket.winner],
    }
    answered = with_answers(responses)
    if len(answered) < len(responses):
        written["unanswered"] = [k for k in range(len(responses)) if k not in answered]
    if principles is not None:
        written["principles"] = list(principles)
        written["bracket"] = bracket_json(bracket)
        if prior:
            written["prior"] = list(prior)
    return written


def _used(line: Mapping[str, Any]) -> list[str]:
    """Returns the columns that a tournament uses, or replaces in its output."""
    sampled = prompt_columns(line) if line.get("responses") is None else []
    return [*question_columns(line), *sampled, "responses", *ADDED]


def _is_line_of(written: Mapping[str, Any], entry: Entry) -> bool:
    given = {
        name: value
        for name, value in entry.line.items()
        if name not in ADDED and (name != "responses" or value is not None)
    }
    return {name: written.get(name) for name in given} == given


def bracket_json(bracket: Bracket) -> list[list[dict[str, Any]]]:
    """Returns a bracket's rounds as plain data, with the judge's probabilities in each match."""
    return [
        [
            {
                "a": match.a,
                "b": match.b,
                "winner": match.winner,
                "by_lot": match.by_lot,
                "probabilities": match.verdict.probabilities if match.verdict else None,
            }
            for match in matches
        ]
        for matches in bracket.rounds
    ]


def _entry(
    line: dict[str, Any],
    where: RecordRef,
    encoder: Callable[[], ChatEncoder],
    sampled_only: bool,
) -> Entry:
    context, messages = question_of(line, where)
    for name in ("responses", "prior") if sampled_only else ():
        if line.get(name) is not None:
            raise where.error(name, "must be absent: with --prior, responses are sampled here")
    if line.get("responses") is not None:
        return Entry(line, where.index + 1, context, where.texts(line, "responses"), messages)
    if messages is None:
        raise where.error("responses", "is missing, and so is a 'prompt' to sample responses for")
    check_prompt(encoder(), messages, where)
    return Entry(line, where.index + 1, context, None, messages)

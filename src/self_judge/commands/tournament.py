"""`self-judge tournament`: JSON lines in, JSON lines out, the best of N responses per line.

It knows files and the order of the work; sampling, judging and brackets are in earlier packages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from self_judge.commands.judge_choice import JudgeChoice, fingerprint, load_sampler
from self_judge.commands.resumable import RankShards, ResumableJob, Work, input_and_output
from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Message, stable_seed
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import Bracket, judged_knockouts
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.storage.jsonl import parse_lines

# Lines in memory at a time: all their matches of a round are judged together.
CHUNK = 256
ADDED = ("responses", "winner", "response", "principles", "bracket")


class Entry(NamedTuple):
    """One line of the input, checked."""

    line: dict[str, Any]
    place: int
    context: str
    responses: list[str] | None
    prompt: list[Message] | None


def run_tournament(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path,
    policy: str | Path | None = None,
    n: int = 16,
    max_new_tokens: int = 768,
    temperature: float = 1.0,
    top_p: float = 0.9,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    brackets: bool = False,
    chunk: int = CHUNK,
    overwrite: bool = False,
    servers: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Writes every input line with `winner` (its index) and `response`; returns their number.

    The same call goes on after an interruption, chunk by chunk. Under `accelerate launch` each
    process plays its share of the lines, and the first joins them in order; the result is that of
    one process, up to rounding.

    Args:
        source: JSON lines with `context` and `responses`, or with `prompt` (a text or messages), to
            which `n` responses are sampled first.
        target: one line per line of the input, in order; beside it stands a file with the settings.
        model: the judging model, with its `judge.json`.
        policy: who samples; default: the judging model.
        brackets: also write every match with the judge's probabilities, under which principles.
        chunk: lines played together and then written to disk.
        overwrite: begin anew, whatever is there.
        servers: URLs of `vllm serve` replicas of `model`, which then judge, and sample unless
            there is a `policy`, in place of this process.

    Raises:
        ValueError: a line that cannot be used (file, line number and field are named), or the
            target belongs to another input or other settings.
    """
    source, target = input_and_output(source, target)
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")

    def load() -> Work[Entry]:
        judge = JudgeChoice(
            str(model), batch_size=batch_size, max_length=max_length, servers=tuple(servers)
        ).load()
        sampler = functools.cache(lambda: _sampler(judge, policy, settings))  # where it is needed

        def played(entries: list[Entry]) -> list[dict[str, Any]]:
            responses = _with_samples(entries, sampler, n, seed)
            knockouts = judged_knockouts(
                judge,
                [entry.context for entry in entries],
                responses,
                seeds=[stable_seed(seed, entry.place) for entry in entries],
            )
            principles = judge.templates.principles if brackets else None
            return [
                _played(entry.line, texts, bracket, principles)
                for entry, texts, bracket in zip(entries, responses, knockouts, strict=True)
            ]

        return played

    job = ResumableJob(
        lambda: _entries(source),
        target,
        {
            "model": str(model),
            "weights": fingerprint(str(model)),
            "policy": str(policy) if policy is not None else None,
            "policy_weights": fingerprint(str(policy)) if policy is not None else None,
            **asdict(settings),
            "n": n,
            "max_length": max_length,
            "seed": seed,
            "brackets": brackets,
            "chunk": chunk,
            "processes": RankShards.here(target, chunk).world_size,
        },
        _is_line_of,
        mismatch="it is not what this input comes to",
        title="tournament",
        things="lines",
        chunk=chunk,
    )
    total, _ = job.run(load, overwrite=overwrite, console=console)
    return total


def _played(
    line: Mapping[str, Any],
    responses: Sequence[str],
    bracket: Bracket,
    principles: Sequence[str] | None,
) -> dict[str, Any]:
    written = {
        **line,
        "responses": list(responses),
        "winner": bracket.winner,
        "response": responses[bracket.winner],
    }
    if principles is not None:
        written["principles"] = list(principles)
        written["bracket"] = bracket_json(bracket)
    return written


def _is_line_of(written: Mapping[str, Any], entry: Entry) -> bool:
    return not any(
        written.get(name) != value
        for name, value in entry.line.items()
        if name not in ADDED or (name == "responses" and value is not None)
    )


def bracket_json(bracket: Bracket) -> list[list[dict[str, Any]]]:
    """The rounds of a bracket, each match with the judge's probabilities, as plain data."""
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


def _entries(path: Path) -> Iterator[Entry]:
    number = 0
    with path.open("rb") as file:
        for number, line in parse_lines(file, path):
            yield _entry(line, number, f"{path}, line {number}")
    if not number:
        raise ValueError(f"{path}: it has no lines")


def _entry(line: dict[str, Any], number: int, where: str) -> Entry:
    responses, context, prompt = line.get("responses"), line.get("context"), line.get("prompt")
    if responses is not None and (
        not isinstance(responses, list)
        or not responses
        or not all(isinstance(r, str) for r in responses)
    ):
        raise ValueError(f"{where}: 'responses' must be a non-empty list of texts")
    messages: list[Message] | None = None
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in prompt
    ):
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
    elif prompt is not None:
        raise ValueError(f"{where}: 'prompt' must be a text or a list of messages")
    if context is None and messages:
        context = dialogue_text(messages)
    if not isinstance(context, str):
        raise ValueError(f"{where}: it needs a text as 'context', or a 'prompt'")
    if responses is None and not messages:
        raise ValueError(f"{where}: it needs 'responses', or a 'prompt' to sample responses to")
    return Entry(line, number, context, responses, messages)


def _sampler(
    judge: Judge, policy: str | Path | None, settings: SamplingSettings
) -> TransformersSampler | VLLMSampler:
    if policy is not None:
        return load_sampler(str(policy), settings)
    if isinstance(judge.scorer, VLLMScorer):
        return VLLMSampler(judge.scorer.engine, judge.encoder, settings)
    model: Any = judge.model
    return TransformersSampler(model, judge.encoder, settings)


def _with_samples(
    chunk: Sequence[Entry],
    sampler: Callable[[], TransformersSampler | VLLMSampler],
    n: int,
    seed: int,
) -> list[list[str]]:
    own = [list(e.responses or ()) for e in chunk]
    asked = [(i, e) for i, e in enumerate(chunk) if e.responses is None]
    if asked:
        prompts = [sampler().encoder.encode_prompt(e.prompt or []) for _, e in asked]
        seeds = [stable_seed(seed, "sample", e.place) for _, e in asked]
        for (i, _), sampled in zip(asked, sampler().sample(prompts, n, seeds), strict=True):
            own[i] = [r.text for r in sampled]
    return own

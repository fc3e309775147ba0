"""`self-judge tournament`: JSON lines in, JSON lines out, the best of N responses per line.

It knows files and the order of the work; sampling, judging and brackets are in earlier packages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from self_judge.commands.judge import JudgeChoice, fingerprint
from self_judge.commands.shares import Shares
from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Message, stable_seed
from self_judge.errors import JournalError
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import Bracket, judged_knockouts
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.judge_json import encoder_as_taught, load_judge_settings
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.storage.jsonl import Journal, open_journal, settings_path

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
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: the output would overwrite the input")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    total = sum(1 for _ in _entries(source))  # checks every line before a model is loaded
    if not total:
        raise ValueError(f"{source}: it has no lines")
    shares = Shares.here(target, chunk)
    begun = {
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
        "processes": shares.count,
    }
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} lines"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        disable=shares.own > 0,
    )
    if not overwrite and shares.agreed(lambda: _is_finished(target, begun, source, total)):
        return total
    # Before the output is begun: what is wrong with the model leaves nothing behind.
    judge = JudgeChoice(
        str(model), batch_size=batch_size, max_length=max_length, servers=tuple(servers)
    ).load()
    with open_journal(shares.path, begun, overwrite=overwrite) as journal, bar:
        task = bar.add_task("tournament", total=total)
        done = _checked(journal, (e for _, c in shares.dealt(_entries(source)) for e in c))
        # Whole chunks again: the same lines then as without interruption.
        journal.cut(done // chunk * chunk if done < shares.size(total) else done)
        sampler: TransformersSampler | VLLMSampler | None = None
        skipped = journal.lines
        for number, entries in shares.dealt(_entries(source)):
            bar.update(task, completed=min(total, (number + 1) * chunk))
            if skipped > 0:
                skipped -= len(entries)
                continue
            if sampler is None and any(e.responses is None for e in entries):
                sampler = _sampler(judge, policy, settings)
            responses = _with_samples(entries, sampler, n, seed)
            played = judged_knockouts(
                judge,
                [e.context for e in entries],
                responses,
                seeds=[stable_seed(seed, e.place) for e in entries],
            )
            principles = judge.templates.principles if brackets else None
            journal.append(
                [
                    _played(entry.line, texts, bracket, principles)
                    for entry, texts, bracket in zip(entries, responses, played, strict=True)
                ]
            )
    shares.join(begun)
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


def _checked(journal: Journal, entries: Iterator[Entry]) -> int:
    """The number of lines that are there; raises where they are not those of the input."""
    for number, written in enumerate(journal.read(), start=1):
        entry = next(entries, None)
        if entry is None or any(
            written.get(name) != value
            for name, value in entry.line.items()
            if name not in ADDED or (name == "responses" and value is not None)
        ):
            raise JournalError(
                f"{journal.path}, line {number}: it is not what this input comes to: give another "
                "output, or --overwrite"
            )
    return journal.lines


def _is_finished(target: Path, begun: Mapping[str, Any], source: Path, total: int) -> bool:
    """Whether an earlier call wrote, or joined, all lines."""
    if not target.exists() or not settings_path(target).exists():
        return False
    with open_journal(target, begun) as journal:
        return journal.lines == total and _checked(journal, _entries(source)) == total


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
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg}") from error
            if not isinstance(line, dict):
                raise ValueError(f"{where}: expected an object, got {type(line).__name__}")
            yield _entry(line, number, where)


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
    if policy is None and isinstance(judge.scorer, VLLMScorer):
        return VLLMSampler(judge.scorer.engine, judge.encoder, settings)
    if policy is None:
        model: Any = judge.model
        return TransformersSampler(model, judge.encoder, settings)
    saved = load_judge_settings(policy)
    encoder = encoder_as_taught(load_tokenizer(policy), saved)
    loaded: Any = load_model(policy, device="auto")
    return TransformersSampler(loaded, encoder, settings)


def _with_samples(
    chunk: Sequence[Entry], sampler: TransformersSampler | VLLMSampler | None, n: int, seed: int
) -> list[list[str]]:
    asked = [(i, e) for i, e in enumerate(chunk) if e.responses is None]
    own = [list(e.responses or ()) for e in chunk]
    if asked and sampler is not None:
        prompts = [sampler.encoder.encode_prompt(e.prompt or []) for _, e in asked]
        seeds = [stable_seed(seed, "sample", e.place) for _, e in asked]
        for (i, _), sampled in zip(asked, sampler.sample(prompts, n, seeds), strict=True):
            own[i] = [r.text for r in sampled]
    return own

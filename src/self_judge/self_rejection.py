"""`self-judge tournament`: JSON lines in, JSON lines out, the best of N responses per line.

It knows files and the order of the work; sampling, judging and brackets are on floors below.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from self_judge.comparison import Message
from self_judge.encoding import ChatEncoder
from self_judge.judge import Judge
from self_judge.models import load_judge_settings, load_model, load_tokenizer
from self_judge.sampling import SamplingSettings, TransformersSampler, stable_seed
from self_judge.templates import dialogue_text
from self_judge.tournament import Bracket, judged_knockouts
from self_judge.whole_file import written_whole

# Lines in memory at a time: all their matches of a round are judged together.
CHUNK = 256


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
    console: Console | None = None,
) -> int:
    """Writes every input line with `winner` (its index) and `response`; returns their number.

    Under `accelerate launch` each process plays its share of the lines, and the first joins them in
    order; the result is that of one process, up to rounding.

    Args:
        source: JSON lines with `context` and `responses`, or with `prompt` (a text or messages), to
            which `n` responses are sampled first.
        target: written whole or not at all.
        model: the judging model, with its `judge.json`.
        policy: who samples; default: the judging model.
        brackets: also write every match with the judge's probabilities, under which principles.

    Raises:
        ValueError: a line that cannot be used; file, line number and field are named.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    if n < 1:
        raise ValueError(f"--n must be at least 1, got {n}")
    total = sum(1 for _ in _entries(source))  # checks every line before a model is loaded
    if not total:
        raise ValueError(f"{source}: it has no lines")
    processes = PartialState(cpu=not torch.cuda.is_available())
    device = processes.device if processes.num_processes > 1 else None
    judge = Judge.from_pretrained(
        model, batch_size=batch_size, max_length=max_length, device=device
    )
    sampler: TransformersSampler | None = None
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} lines"),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        disable=not processes.is_main_process,
    )
    shares = [target]
    if processes.num_processes > 1:
        shares = [target.with_name(f"{target.name}.{i}") for i in range(processes.num_processes)]
    with bar, written_whole(shares[processes.process_index]) as out:
        task = bar.add_task("tournament", total=total)
        for number, chunk in enumerate(_chunks(_entries(source))):
            bar.update(task, advance=len(chunk))
            if number % processes.num_processes != processes.process_index:
                continue
            if sampler is None and any(e.responses is None for e in chunk):
                sampler = _sampler(judge, policy, settings)
            responses = _with_samples(chunk, sampler, n, seed)
            played = judged_knockouts(
                judge,
                [e.context for e in chunk],
                responses,
                seeds=[stable_seed(seed, e.place) for e in chunk],
            )
            for entry, own, bracket in zip(chunk, responses, played, strict=True):
                line = {
                    **entry.line,
                    "responses": own,
                    "winner": bracket.winner,
                    "response": own[bracket.winner],
                }
                if brackets:
                    line["principles"] = list(judge.templates.principles)
                    line["bracket"] = bracket_json(bracket)
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    processes.wait_for_everyone()
    if len(shares) > 1 and processes.is_main_process:
        _join(shares, target)
    return total


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while chunk := list(itertools.islice(entries, CHUNK)):
        yield chunk


def _join(shares: Sequence[Path], target: Path) -> None:
    """Puts the shares' chunks together in turn, as they were dealt out, and removes the shares."""
    with contextlib.ExitStack() as stack, written_whole(target) as out:
        files = [stack.enter_context(share.open(encoding="utf-8")) for share in shares]
        for file in itertools.cycle(files):
            lines = list(itertools.islice(file, CHUNK))
            out.writelines(lines)
            if len(lines) < CHUNK:
                break  # the last chunk, or the empty one after it
    for share in shares:
        share.unlink()


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
) -> TransformersSampler:
    if policy is None:
        model: Any = judge.model
        return TransformersSampler(model, judge.encoder, settings)
    saved = load_judge_settings(policy)
    encoder = ChatEncoder(load_tokenizer(policy), saved.chat_template if saved else None)
    loaded: Any = load_model(policy)
    loaded.to(next(judge.model.parameters()).device)
    return TransformersSampler(loaded, encoder, settings)


def _with_samples(
    chunk: Sequence[Entry], sampler: TransformersSampler | None, n: int, seed: int
) -> list[list[str]]:
    asked = [(i, e) for i, e in enumerate(chunk) if e.responses is None]
    own = [list(e.responses or ()) for e in chunk]
    if asked and sampler is not None:
        prompts = [sampler.encoder.encode_prompt(e.prompt or []) for _, e in asked]
        seeds = [stable_seed(seed, "sample", e.place) for _, e in asked]
        for (i, _), sampled in zip(asked, sampler.sample(prompts, n, seeds), strict=True):
            own[i] = [r.text for r in sampled]
    return own

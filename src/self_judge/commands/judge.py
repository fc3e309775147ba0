"""Many comparisons judged in chunks into a file that an interruption does not lose.

`judge_in_bulk` serves `eval` and `compare`; `run_judge` is `self-judge judge`: JSON lines in, the
same lines with verdicts out. It does not know what the verdicts are used for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from self_judge.commands.shares import Shares
from self_judge.config.schema import TemplateArgs
from self_judge.config.self_training import PackingChoice
from self_judge.config.yaml import build, read_yaml
from self_judge.console import neutral
from self_judge.data.files import read_raw
from self_judge.data.records import RecordRef
from self_judge.datatypes import Comparison, Verdict
from self_judge.errors import ConfigError, JournalError
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import VLLMScorer
from self_judge.judging.judge import Judge
from self_judge.judging.voting import verdict_json
from self_judge.models import load_tokenizer
from self_judge.prompting.judge_json import JudgeSettings, encoder_as_taught, resolve_judge
from self_judge.prompting.judge_templates import JudgeTemplates, dialogue_text
from self_judge.storage.jsonl import Journal, open_journal, settings_path

CHUNK = 64  # comparisons judged between two writes: what a kill costs at most

_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
_SLICES, _SLICE_BYTES = 64, 65536


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge, and how it is run.

    Args:
        model: a folder or Hub name.
        templates: a YAML file with `templates:`, instead of the model's `judge.json`.
        batch_size, max_length, packing: see `Judge`.
        dtype, revision, trust_remote_code: see `models.load_model`.
        servers: URLs of `vllm serve` replicas of the model, which judge in place of this process.
    """

    model: str
    templates: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    packing: PackingChoice = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    servers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.judge_templates()  # a mistake shows before anything is read or loaded

    def template_args(self) -> TemplateArgs | None:
        if self.templates is None:
            return None
        tree = read_yaml(Path(self.templates))
        given = tree.get("templates")
        if not isinstance(given, Mapping) or "judge" not in given:
            raise ConfigError(
                f"{self.templates}: it has no templates.judge; see configs/templates for examples"
            )
        try:
            args: TemplateArgs = build(TemplateArgs, given, "templates")
        except ValueError as error:
            raise ConfigError(f"{self.templates}: {error}") from error
        return args

    def resolved(self) -> JudgeSettings:
        """What it judges with.

        Raises:
            ValueError: there are no templates, or they cannot work.
        """
        args = self.template_args()
        return resolve_judge(
            self.model,
            args.judge_templates() if args else None,
            remedy="give judge templates with --templates FILE, e.g. "
            "configs/templates/instructions.yaml",
        )

    def judge_templates(self) -> JudgeTemplates:
        return self.resolved().templates

    def load(self) -> Judge:
        """The judge; under `accelerate launch` on this process's device."""
        args, settings = self.template_args(), self.resolved()
        tokenizer = load_tokenizer(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        asked = (args.chat, args.chat_template_kwargs, (args.user, args.assistant)) if args else ()
        encoder = encoder_as_taught(tokenizer, settings, *asked)
        if self.servers:
            return Judge(
                VLLMScorer(VLLMServers(self.servers)),
                encoder,
                settings.templates,
                token_id_a=settings.token_id_a,
                token_id_b=settings.token_id_b,
                max_length=self.max_length,
            )
        return Judge.from_pretrained(
            self.model,
            settings.templates,
            encoder=encoder,
            token_id_a=settings.token_id_a,
            token_id_b=settings.token_id_b,
            batch_size=self.batch_size,
            max_length=self.max_length,
            packing=self.packing,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def settings(self) -> dict[str, Any]:
        """What every verdict depends on, as plain data: a resumed run must have the same."""
        args, settings = self.template_args(), self.resolved()
        templates = json.dumps(settings.templates.to_dict(), sort_keys=True)
        asked = (args.chat, args.user, args.assistant, args.chat_template_kwargs) if args else ()
        chat_template = settings.chat_template
        taught = (chat_template, dict(settings.chat_template_kwargs)) if chat_template else ()
        chat = json.dumps([asked, taught], sort_keys=True)
        return {
            "model": self.model,
            "revision": self.revision,
            "weights": fingerprint(self.model),
            "templates": _hash(templates.encode(), chat.encode()),
            "principles": list(settings.templates.principles),
            "max_length": self.max_length,
            "dtype": self.dtype,
        }


def fingerprint(model: str) -> str | None:
    """A hash that tells one local checkpoint from another; `None` for a Hub name.

    Of weight files it takes names, sizes and 64 slices spread over each: reading all of a large
    model would take minutes, and training changes every slice.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    parts: list[bytes] = []
    for file in sorted({f for pattern in _WEIGHTS for f in folder.glob(pattern)}):
        size = file.stat().st_size
        parts += [file.name.encode(), str(size).encode()]
        step = max(_SLICE_BYTES, size // _SLICES)
        with file.open("rb") as reader:
            for start in range(0, size, step):
                reader.seek(start)
                parts.append(reader.read(_SLICE_BYTES))
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts.append(str(base and fingerprint(base)).encode())
    return _hash(*parts)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


class Case(NamedTuple):
    """A comparison to judge, and how its line is written and known again.

    Attributes:
        comparison: what is judged.
        line: the line written for a verdict.
        is_in: whether a written line is this case's.
    """

    comparison: Comparison
    line: Callable[[Verdict], dict[str, Any]]
    is_in: Callable[[Mapping[str, Any]], bool]


def judge_in_bulk(
    cases: Callable[[], Iterator[Case]],
    output: Path,
    load: Callable[[], Judge],
    settings: Mapping[str, Any],
    *,
    chunk: int = CHUNK,
    overwrite: bool = False,
    shares: Shares | None = None,
    title: str = "judging",
    console: Console | None = None,
) -> tuple[int, float]:
    """Writes one line per case, in order; goes on where an earlier call was stopped.

    The cases are run through twice: first to check them all, and the lines that are there, before a
    model is loaded. No more than a chunk of them is in memory.

    Args:
        cases: gives the cases anew at every call.
        output: the file; beside it stands one with the settings.
        load: loads the judge, if there is something to judge.
        settings: what the verdicts depend on; see `JudgeChoice.settings`.
        chunk: cases judged together and then written to disk.
        overwrite: begin anew.
        shares: how the cases are shared out over processes; default: this one judges all.

    Returns:
        The number of lines, and how many pairs per second were judged (NaN if unknown).

    Raises:
        ValueError: a case cannot be used, or the file there belongs to other cases or settings.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    console = console or Console(stderr=True)
    shares = shares or Shares(output, chunk)
    if shares.count > 1 and not overwrite:
        whole = shares.agreed(lambda: _joined(cases(), output, settings))
        if whole is not None:
            return whole, math.nan
    with open_journal(shares.path, settings, overwrite=overwrite) as journal:
        total, done = _checked(cases(), journal, shares)
        own = shares.size(total)
        if done < own:
            # Whole chunks again: verdicts are then the same, to the bit, as without interruption.
            journal.cut(done // chunk * chunk)
            if journal.lines and shares.own == 0:
                console.print(
                    neutral(f"{output}: goes on after {journal.lines:,} of {own:,}"),
                    markup=False,
                    highlight=False,
                )
            todo = itertools.islice(
                (case for _, dealt in shares.dealt(cases()) for case in dealt), journal.lines, None
            )
            _judge(todo, journal, load(), own, shares, title, console)
        rate = journal.timed / journal.seconds if journal.seconds else math.nan
    shares.join(settings)
    return total, rate * shares.count


def _joined(cases: Iterator[Case], output: Path, settings: Mapping[str, Any]) -> int | None:
    """The number of lines, if an earlier call of several processes wrote all of them."""
    if not output.exists() or not settings_path(output).exists():
        return None
    with open_journal(output, settings) as journal:
        total, done = _checked(cases, journal, Shares(output, 1))
        return total if done == total else None


def share_bar(things: str, console: Console, shares: Shares) -> Progress:
    """The bar of a process's share; the first process alone shows one."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,}/{task.total:,} " + things),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=shares.own > 0,
    )


def _judge(
    todo: Iterator[Case],
    journal: Journal,
    judge: Judge,
    total: int,
    shares: Shares,
    title: str,
    console: Console,
) -> None:
    with share_bar("pairs", console, shares) as bar:
        task = bar.add_task(title, total=total, completed=journal.lines)
        while batch := list(itertools.islice(todo, shares.chunk)):
            started = time.perf_counter()
            verdicts = judge.compare([case.comparison for case in batch])
            rows = [case.line(v) for case, v in zip(batch, verdicts, strict=True)]
            journal.append(rows, time.perf_counter() - started)
            bar.update(task, advance=len(batch))


def _checked(cases: Iterator[Case], journal: Journal, shares: Shares) -> tuple[int, int]:
    """The number of cases, and how many of a process's own have their line.

    Raises:
        ValueError: the lines that are there are not those of its first cases.
    """
    written = journal.read()
    total = place = 0
    for total, case in enumerate(cases, start=1):
        if (total - 1) // shares.chunk % shares.count != shares.own:
            continue
        place += 1
        line = next(written, None)
        if line is not None and not case.is_in(line):
            raise JournalError(
                f"{journal.path}, line {place}: it is not the verdict on line {total} of this "
                "input: give another output, or --overwrite"
            )
    if not total:
        raise ValueError("there are no pairs to judge")
    if journal.lines > place:
        raise JournalError(
            f"{journal.path} has {journal.lines:,} lines, the input {place:,} pairs for it: give "
            "another output, or --overwrite"
        )
    return total, journal.lines


# -- self-judge judge ----------------------------------------------------------------------------


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
        target: one line per line of the input, in order; gone on with after an interruption.

    Raises:
        ValueError: a line that cannot be used; file, line number and field are named.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.resolve() == target.resolve():
        raise ValueError(f"{target}: the output would overwrite the input")
    principles = choice.judge_templates().principles

    def cases() -> Iterator[Case]:
        for number, line in enumerate(read_raw(str(source))):
            yield _case(line, RecordRef(str(source), number), field, principles)

    total, _ = judge_in_bulk(
        cases,
        target,
        choice.load,
        {**choice.settings(), "field": field},
        chunk=chunk,
        overwrite=overwrite,
        shares=Shares.here(target, chunk),
        console=console,
    )
    return total


def _case(line: dict[str, Any], where: RecordRef, field: str, principles: Sequence[str]) -> Case:
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
    return Case(
        Comparison(context, a, b),
        lambda verdict: {**line, field: verdict_json(verdict, principles)},
        lambda written: {k: v for k, v in written.items() if k != field} == line,
    )

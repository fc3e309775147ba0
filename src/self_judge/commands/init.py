"""Implements `self-judge init`, which writes run files for a model and data.

This module looks at the model, the data and this machine, and chooses settings that fit. It writes
the files, but does not load weights or train.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from datasets import disable_progress_bars
from rich.console import Console
from rich.prompt import Prompt

from self_judge.check.check import RefusedError, Report, jsft_estimate, prepare, self_judge_estimate
from self_judge.check.cost import Cost, device_for
from self_judge.check.memory import GIB
from self_judge.check.model_size import Size, empty_model, size_of
from self_judge.check.text_findings import chosen_longer, length_findings
from self_judge.commands.align.stages import (
    FILES,
    JSFT,
    PAIRS,
    PROMPTS,
    SELF_JUDGE,
    TEMPLATES,
    absolute,
    refuse_existing,
    stages,
)
from self_judge.config.hardware import fit_to_machine
from self_judge.config.schema import load_run
from self_judge.config.yaml import read_yaml
from self_judge.console import Terminal, say
from self_judge.data.files import read_records
from self_judge.data.records import first_question, is_held_out, is_named
from self_judge.data.sources import PreferenceData, load_preferences
from self_judge.datatypes import PreferenceRecord
from self_judge.errors import ConfigError, DataError
from self_judge.models import load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.atomic import atomic_write
from self_judge.storage.jsonl import write_lines
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.setup import this_machine

HELD_OUT = 0.1
_SHIPPED = ("instructions", "hh", "uf_principles")  # the sources of templates, the first one first
_DEFAULT = ("overall",)
_SAMPLED = 100  # the number of records that are encoded to measure lengths
_LENGTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16_384, 32_768)
_LEFT_OUT = ("skipped ", "removed ", "unused ")  # counts of what is not in the records
_FEW = 20  # held-out records
_FITS = 0.85  # of the device's memory
# Usual names of columns, for data without the names of TRL.
_GUESSES = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "user", "context"),
    "chosen": ("chosen", "good", "better", "best", "preferred", "accepted", "winner", "positive"),
    "rejected": ("rejected", "bad", "worse", "worst", "dispreferred", "loser", "negative"),
}


@dataclass(frozen=True)
class InitJob:
    """A model and data to write run files for.

    Args:
        folder: the folder for the files, and later for the runs.
        model: a folder, or a model ID on the Hub.
        data: preference data: a file, a folder or a dataset ID on the Hub.
        columns: the data's own column names; see `map_columns`.
        principles: the judge's principles, from the shipped templates; default: `overall`.
        ask: whether to ask for what cannot be found out. Otherwise, defaults are used.
    """

    folder: Path
    model: str
    data: str
    columns: Mapping[str, str] = field(default_factory=dict)
    principles: Sequence[str] = ()
    ask: bool = False


def run_init(job: InitJob, console: Console | None = None) -> None:
    """Writes the run files, the judge templates and the held-out data to a folder.

    Raises:
        ValueError: the model, the data or the principles cannot be used, or a file exists.
    """
    console = console or Terminal(stderr=True)
    for name in (str(job.folder.resolve()), job.model, job.data, *job.columns.values()):
        if "${" in name:
            raise ConfigError(f"{name}: '${{' begins a reference in run files: rename it")
    refuse_existing(job.folder)
    catalog = _catalog()
    principles = tuple(job.principles) or _DEFAULT
    unknown = [name for name in principles if name not in catalog]
    if unknown:
        raise ConfigError(
            f"--principles {unknown[0]}: unknown; there are templates for {', '.join(catalog)}"
        )
    model = _Model(job.model)
    say(console, model.described)
    data = _Data(job, console)
    say(console, data.described)
    for what, count in data.left_out.items():
        say(console, f"{what}: {count:,}")
    disable_progress_bars()
    plan = _plan(job, model, data, {name: catalog[name] for name in principles}, console)
    for name, text in plan.files.items():
        with atomic_write(job.folder / name) as file:
            file.write(text)
    prompts = [_line(record) for record in data.held_out]
    write_lines(job.folder / PROMPTS, prompts)
    pairs = [
        {**_line(record), "chosen": pair.chosen, "rejected": pair.rejected}
        for record in data.held_out
        for pair in record.pairs
    ]
    write_lines(job.folder / PAIRS, pairs)
    say(console, f"{plan.described}\nwritten to {job.folder}: {', '.join(FILES)}")
    stages(job.folder)  # checks the run files


def print_next(folder: Path, console: Console | None = None) -> None:
    """Prints the commands that continue in a folder of run files."""
    console = console or Terminal(stderr=True)
    say(console, "next:")
    for words in (["check", str(folder / JSFT)], *(stage.words for stage in stages(folder))):
        say(console, f"  {shlex.join(['self-judge', *words])}")


def _line(record: PreferenceRecord) -> dict[str, Any]:
    return {"prompt": [dict(message) for message in record.prompt]}


def _catalog() -> dict[str, dict[str, str]]:
    """Returns the shipped judge templates by principle."""
    found: dict[str, dict[str, str]] = {}
    for name in _SHIPPED:
        for principle, template in read_yaml(name)["templates"]["judge"].items():
            found.setdefault(principle, template)
    return found


class _Model:
    """The model's tokenizer and size."""

    def __init__(self, name: str) -> None:
        self.name = absolute(name)
        self.tokenizer = load_tokenizer(name)
        self.size: Size = size_of(empty_model(name))

    @property
    def described(self) -> str:
        template = "has a chat template"
        if self.tokenizer.chat_template is None:
            template = "has no chat template, so turns begin with 'Human:' and 'Assistant:'"
        context = f"a context of {self.size.context:,} tokens, " if self.size.context else ""
        millions = self.size.parameters / 1e6
        return f"model: {self.name}, {millions:,.0f} million parameters, {context}{template}"


class _Data:
    """The records, with the columns that they are read from."""

    def __init__(self, job: InitJob, console: Console) -> None:
        self.path = absolute(job.data)
        self.columns = dict(job.columns)
        self.left_out: dict[str, int] = {}
        try:
            self.records = self._load()
        except DataError:
            guessed = {} if self.columns else _guessed(job, console)
            if not guessed:
                raise
            self.columns = guessed
            self.records = self._load()
        self.pairs = [pair for record in self.records for pair in record.pairs]
        if not self.pairs:
            why = "".join(f"; {what}: {count:,}" for what, count in self.left_out.items())
            raise DataError(f"{job.data}: there are no pairs to train a judge on{why}")
        self.held_out = [r for r in self.records if is_held_out(first_question(r), HELD_OUT)]

    def _load(self) -> list[PreferenceRecord]:
        source = {"path": self.path, "columns": self.columns}
        found: PreferenceData = load_preferences(source, subset="all", held_out=HELD_OUT)
        self.left_out = {k: n for k, n in found.counts.items() if k.startswith(_LEFT_OUT)}
        return list(found.records)

    @property
    def described(self) -> str:
        few = ", too few for reliable figures (use more data)" if len(self.held_out) < _FEW else ""
        lengths = f"the better response is longer in {chosen_longer(self.records):.0%} of the pairs"
        lengths = next((finding.text for finding in length_findings(self.records)), lengths)
        mapped = ", ".join(f"{name} from {column!r}" for name, column in self.columns.items())
        return (
            f"data: {self.path}, {len(self.records):,} records with {len(self.pairs):,} pairs"
            + (f" ({mapped})" if mapped else "")
            + f"; {len(self.held_out):,} records are held out{few}; {lengths}"
        )


def _guessed(job: InitJob, console: Console) -> dict[str, str]:
    """Guesses the columns by their usual names, and asks for the others in a terminal."""
    raw = next((record for _, record in read_records(job.data)), {})
    texts = [str(name) for name, value in raw.items() if isinstance(value, str)]
    columns: dict[str, str] = {}
    for name, usual in _GUESSES.items():
        fitting = [c for c in texts if c not in columns.values() and is_named(c, usual)]
        if len(fitting) == 1:
            columns[name] = fitting[0]
        elif job.ask and texts:
            first: Any = {"default": fitting[0]} if fitting else {}
            question = f"Which column contains the {name} text?"
            columns[name] = Prompt.ask(question, choices=texts, console=console, **first)
        else:
            return {}
    say(console, f"{job.data}: columns are read as {columns}; other names: --columns")
    return columns


@dataclass(frozen=True)
class _Choice:
    """Settings of both runs."""

    lora: bool
    batch: int
    max_length: int
    new_tokens: int
    jsft_batch: int
    self_judge_batch: int
    epochs: int


@dataclass(frozen=True)
class _Plan:
    """The contents of the files, and a description of the choices."""

    files: dict[str, str]
    described: str


def _plan(
    job: InitJob,
    model: _Model,
    data: _Data,
    templates: Mapping[str, Mapping[str, str]],
    console: Console,
) -> _Plan:
    encoder = _encoder(model)
    sample = data.records[:: max(1, len(data.records) // _SAMPLED)][:_SAMPLED]
    longest, response, examples = _lengths(sample, encoder, JudgeTemplates(templates))
    context = model.size.context or _LENGTHS[-1]
    new_tokens = _rounded(response)
    examples = round(examples * len(data.records) / len(sample))
    shared: dict[str, Any] = {
        "max_length": min(context, max(_rounded(longest), 2 * new_tokens)),
        "new_tokens": new_tokens,
        # Small data needs small batches for enough steps.
        "jsft_batch": _power_of_two(examples // 50, 8, 128),
        "self_judge_batch": _power_of_two(len(data.records) // 20, 8, 64),
        "epochs": 1 if examples > 5000 else 3,
    }
    if shared["max_length"] <= new_tokens:
        raise ConfigError(
            f"{job.model}: its context of {context:,} tokens is too short for the responses in "
            f"{job.data}, which have up to {response:,} tokens: choose another model"
        )
    device = device_for(None, this_machine())

    @cache
    def peak(chosen: _Choice) -> int:
        files = _files(job, model, data, templates, chosen)
        try:
            return max(cost.memory.peak for cost in _costs(files, sample, len(data.records)))
        except RefusedError as refused:
            about, error = refused.args
            raise ConfigError(f"{job.data}, with {job.model}: {about}: {error}") from None

    def fits(chosen: _Choice) -> bool:
        return not device.memory or peak(chosen) < _FITS * device.memory

    # If not even one sequence at a time fits, other batches need not be tried.
    small = [_Choice(lora, 1, **shared) for lora in (False, True)]
    chosen = next(filter(fits, small), None)
    if chosen is None:
        chosen = small[-1]
        say(console, f"warning: even LoRA with one sequence at a time may not fit {device.name}")
    else:
        larger = (replace(chosen, batch=batch) for batch in (8, 4, 2))
        chosen = next(filter(fits, larger), chosen)
    files = _files(job, model, data, templates, chosen)
    described = (
        f"chosen: {'LoRA' if chosen.lora else 'full fine-tuning'} with {chosen.batch} sequences at "
        f"a time, which take about {peak(chosen) / GIB:.1f} of {device.memory / GIB:.0f} GiB on "
        f"{device.name}; sequences up to {chosen.max_length:,} tokens, responses up to "
        f"{chosen.new_tokens:,}"
    )
    return _Plan(files, described)


def _encoder(model: _Model) -> ChatEncoder:
    words = read_yaml(_SHIPPED[0])["templates"]
    return ChatEncoder(model.tokenizer, None, words["user"], words["assistant"])


def _lengths(
    sample: Sequence[PreferenceRecord], encoder: ChatEncoder, templates: JudgeTemplates
) -> tuple[int, int, int]:
    """Returns the lengths of nearly all examples and responses, and the number of examples."""
    rows, _ = jsft_dataset(
        sample, encoder, templates, encoder.letter_ids(templates), max_length=None
    )
    lengths = sorted(map(len, rows["input_ids"]))
    chosen = [pair.chosen for record in sample for pair in record.pairs]
    responses = sorted(len(encoder.encode_content(text)) for text in chosen)
    return _nearly_all(lengths), _nearly_all(responses), len(lengths)


def _nearly_all(sorted_lengths: Sequence[int]) -> int:
    return sorted_lengths[min(len(sorted_lengths) - 1, round(0.98 * len(sorted_lengths)))]


def _rounded(length: int) -> int:
    """Returns the next usual length with some room."""
    return next((n for n in (64, 128, *_LENGTHS) if n >= 1.1 * length), _LENGTHS[-1])


def _power_of_two(number: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(0, number.bit_length() - 1)))


def _costs(
    files: Mapping[str, str], sample: Sequence[PreferenceRecord], records: int
) -> Iterator[Cost]:
    """Yields the estimated costs of both runs, from the estimates of `self-judge check`."""
    machine = this_machine()
    device = device_for(None, machine)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        jsft: Any = load_run(Path(folder) / JSFT, [], "jsft")
        # The JSFT model does not exist yet.
        base = [f"model.model_name_or_path={json.dumps(jsft.model.model_name_or_path)}"]
        base += [
            f"templates.{name}={json.dumps(getattr(jsft.templates, name))}"
            for name in ("judge", "user", "assistant")
        ]
        self_judge: Any = load_run(Path(folder) / SELF_JUDGE, base, "self_judge")
    for run in (jsft, self_judge):
        fitted, _ = fit_to_machine(run, machine)
        report = Report("", "jsft", records=records, encoded=len(sample))
        prepared = prepare(report, fitted, fitted, machine, device, None)
        if run is jsft:
            letters = prepared.encoder.letter_ids(prepared.judge.templates)
            yield jsft_estimate(prepared, letters, sample)
        elif (cost := self_judge_estimate(prepared, sample)) is not None:
            yield cost


# -- files ---------------------------------------------------------------------------------------


def _files(
    job: InitJob,
    model: _Model,
    data: _Data,
    templates: Mapping[str, Mapping[str, str]],
    chosen: _Choice,
) -> dict[str, str]:
    source: dict[str, Any] = {"path": data.path}
    if data.columns:
        source["columns"] = data.columns
    dataset = f"dataset:\n  sources: [{_flow(source)}]\n  held_out: {HELD_OUT}\n"
    adapter = _flow({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    adapter = f"peft_config: {adapter}  # LoRA; without this line, all weights are trained"
    adapter = adapter if chosen.lora else f"# {adapter}"
    every = f"per_device_train_batch_size: {chosen.batch}\n  save_steps: 100\n  logging_steps: 5\n"
    every += "  resume_from_checkpoint: true\n  report_to: none  # or wandb, trackio, …\n"
    written = "written by self-judge init; `self-judge keys` lists all keys"
    jsft = f"""\
# JSFT: the model learns to answer and to judge ({written})
extends: {TEMPLATES}  # what the judge is asked
model: {_flow({"model_name_or_path": model.name})}
{dataset}{adapter}
jsft_args:
  max_length: {chosen.max_length}
  global_batch_size: {chosen.jsft_batch}{_merge(chosen)}
training_args:
  output_dir: {_flow(str(job.folder / "jsft"))}
  num_train_epochs: {chosen.epochs}
  learning_rate: {"2.0e-4" if chosen.lora else "2.0e-5"}
  {every}"""
    self_judge = f"""\
# Self-training: the JSFT model judges its own answers ({written})
model: {_flow({"model_name_or_path": str(job.folder / "jsft")})}
{dataset}{adapter}
self_judge_args:
  max_length: {chosen.max_length}
  max_new_tokens: {chosen.new_tokens}
  global_batch_size: {chosen.self_judge_batch}
  beta: 0.1  # higher keeps the policy closer to the JSFT model
training_args:
  output_dir: {_flow(str(job.folder / "policy"))}
  num_train_epochs: {chosen.epochs}
  learning_rate: {"5.0e-6" if chosen.lora else "1.0e-6"}
  {every}"""
    return {TEMPLATES: _template_file(templates), JSFT: jsft, SELF_JUDGE: self_judge}


def _merge(chosen: _Choice) -> str:
    return "\n  merge_adapter: true  # self-training starts from whole weights" * chosen.lora


def _flow(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _template_file(templates: Mapping[str, Mapping[str, str]]) -> str:
    """Returns a file with judge templates, as text that is easy to edit."""
    words = read_yaml(_SHIPPED[0])["templates"]
    lines = [
        "# What the judge is asked about a pair. Change the criterion, or add principles.",
        "# {context}, {response_a} and {response_b} are replaced; the letter follows `assistant`.",
        "templates:",
        f"  user: {json.dumps(words['user'])}  # turn markers, for a model without a chat template",
        f"  assistant: {json.dumps(words['assistant'])}",
        "  judge:",
    ]
    for principle, template in templates.items():
        lines.append(f"    {principle}:")
        for role, text in template.items():
            lines += [f"      {role}: |-", textwrap.indent(text, " " * 8)]
    return "\n".join(lines) + "\n"

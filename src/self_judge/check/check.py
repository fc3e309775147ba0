"""Checks a run before training, for `self-judge check` and `init`.

This module prepares a run as training does, but encodes only a sample of the records by default.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import get_peft_model

from self_judge.adapters import adapter_config
from self_judge.check import findings, text_findings
from self_judge.check.cost import Cost, Training, device_for, jsft_cost, self_judge_cost, setting_of
from self_judge.check.examples import (
    Encoded,
    Example,
    Figures,
    encoded_rows,
    shared_units,
    summary,
)
from self_judge.check.findings import Finding, note, problem, warning
from self_judge.check.memory import Device, Sharding
from self_judge.check.model_size import empty_model, shallow_model, size_of
from self_judge.config.hardware import Machine, fit_to_machine
from self_judge.config.schema import JSFTRun, SelfJudgeRun, kind_of_run, load_run
from self_judge.data.records import judge_context
from self_judge.datatypes import Comparison, PreferenceRecord
from self_judge.judging.choice import JudgeChoice
from self_judge.models import check_files, check_vocabulary
from self_judge.packing.prefix_tree import shared_length
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import JudgeSettings
from self_judge.prompting.judge_prompt import encode_orders
from self_judge.prompting.thoughts import answers_of
from self_judge.runtime import unwrapped
from self_judge.training import setup
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.self_training.prompts import PromptPreparer

T = TypeVar("T")
_ORDERS = tuple(f"{x} response first: the next token is the verdict" for x in ("first", "second"))
EXAMPLES = 400  # the default number of records to encode; all records are read


@dataclass(frozen=True, slots=True)
class Letter:
    """The token for the letter A or B, and the end of the lead-in before the letter."""

    letter: str
    id: int
    token: str
    after: str


@dataclass(slots=True)
class Report:
    """The result of a check.

    Attributes:
        config, kind: the run file and the kind of run.
        about: a short description of the run: model, batch, chat template, …
        sources, held_out: counts for each source of training and evaluation data; see
            `PreferenceData.counts_by_source`.
        letters: the tokens for the letters A and B.
        encoded, records: the number of encoded records and the total number of records.
        counts: the number of examples by kind, and by the reason for truncating or skipping them.
        letter_counts: the number of judge examples with each letter as the answer (JSFT).
        chosen_longer: the share of pairs in which the better response is longer, or `None`.
        figures, examples: statistics and examples for every kind of sequence.
        cost: the cost estimate, or `None` if a problem prevents an estimate.
        findings: all findings. A problem means that the run would go wrong.
    """

    config: str
    kind: str
    about: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    held_out: dict[str, dict[str, int]] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    encoded: int = 0
    records: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    letter_counts: dict[str, int] = field(default_factory=dict)
    chosen_longer: float | None = None
    figures: list[Figures] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    cost: Cost | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Converts the report to plain JSON data."""
        found = dataclasses.asdict(self)
        found |= {"needs": found.pop("cost"), "samples": found.pop("examples")}
        worst = self.findings[0].level if self.findings else "note"  # they are sorted
        level = {"problem": "red", "warning": "amber", "note": "green"}[worst]
        return {**found, "problems": len(self.problems), "level": level}


def check(
    config: str,
    overrides: Sequence[str] = (),
    *,
    examples: int = EXAMPLES,
    gpu: str | None = None,
    processes: int | None = None,
    sharding: Sharding | None = None,
) -> Report:
    """Checks a run and returns a report.

    Args:
        config, overrides: the run file and overrides, as passed to the training command.
        examples: the number of records to encode, evenly spread over the data; 0 encodes all.
        gpu: the GPU to estimate for, as a key of `memory.GPUS` (default: the local device).
        processes: the number of processes to estimate for. The default is one per local GPU, or one
            if `gpu` is set, but at least the number of processes in this launch.
        sharding: how the processes shard the model (default: as in `training_args`). Set this if
            only a launcher file enables sharding.

    Raises:
        ValueError: a file, setting or record cannot be used.
    """
    if examples < 0:
        raise ValueError(f"--examples must be 0 (all) or positive, got {examples}")
    kind = kind_of_run(config, overrides)
    given: Any = load_run(config, overrides, kind)
    if processes is None:
        gpus = torch.cuda.device_count() if gpu is None else 1
        processes = max(1, gpus, int(os.environ.get("WORLD_SIZE", "1")))
    here = dataclasses.replace(setup.this_machine(), processes=processes)
    there = here
    if gpu is not None:
        there = Machine(True, True, True, True, here.trackers, here.cpu_count, processes)
    run, lacking = fit_to_machine(given, there)
    report = Report(str(config), kind, findings=[warning("this machine", x) for x in lacking])
    local, _ = fit_to_machine(given, here)
    device = device_for(gpu, there)
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        _look(prepare(report, run, local, there, device, sharding), examples)
    except RefusedError as refused:
        report.findings.append(_refusal(*refused.args))
    finally:
        if shown:
            enable_progress_bars()
    report.findings.sort(key=lambda f: ("problem", "warning", "note").index(f.level))
    return report


class RefusedError(Exception):
    """Raised to end the check early. The arguments are the run's rejected part and the error."""


def _refusal(about: str, error: ValueError | TypeError) -> Finding:
    return problem(about, " ".join(str(error).split()))


def _or_refused(about: str, make: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return make(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise RefusedError(about, error) from error


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared run and its report.

    Attributes:
        run: the run, adapted to the requested `machine`.
        training: the model, its device and the settings. The trainer's arguments are for the local
            machine, because arguments for another machine cannot be validated here.
        judge: the settings of the initial model as a judge, or else those of the other judge.
        choice: the judge, if it is another one than the initial model.
    """

    report: Report
    run: Any
    machine: Machine
    training: Training
    encoder: ChatEncoder
    judge: JudgeSettings
    choice: JudgeChoice | None


def prepare(
    report: Report,
    run: Any,
    local: Any,
    machine: Machine,
    device: Device,
    sharding: Sharding | None,
) -> Prepared:
    """Prepares a run as training does, without weights. `local` is the run for this machine."""
    jsft, asked = isinstance(run, JSFTRun), run.model
    make: Any = setup.jsft_config if jsft else setup.self_judge_config
    args = _or_refused("training_args", make, local, machine.processes)
    model: Any = empty_model(
        asked.model_name_or_path,
        dtype=asked.dtype,
        revision=asked.revision,
        trust_remote_code=asked.trust_remote_code,
    )
    adapter: Any = _or_refused("peft_config", setup.lora_config, run.peft_config)
    if adapter is None and not jsft:
        adapter = adapter_config(asked.model_name_or_path, asked.revision)
        if adapter is not None:
            adapter.inference_mode = False
    if adapter is not None:
        if str(getattr(adapter, "init_lora_weights", "")).startswith(("pissa", "olora")):
            adapter.init_lora_weights = True  # the others need weights, which are not loaded here
        model = _or_refused("peft_config", get_peft_model, model, adapter)
    make = setup.jsft_chat_setup if jsft else setup.self_judge_chat_setup
    encoder, judge = _or_refused("templates", make, run)
    choice = None if jsft else _or_refused("self_judge_args.judge", setup.judge_choice, run, judge)
    if judge is None and choice is not None:  # another judge judges
        judge = JudgeSettings(choice.judge_templates())
    setting = setting_of(run, args, machine, sharding, model)
    training = Training(model, args, setting, device)
    return Prepared(report, run, machine, training, encoder, judge, choice)


def _look(prepared: Prepared, examples: int) -> None:
    """Fills in the report."""
    report, run, encoder = prepared.report, prepared.run, prepared.encoder
    model, args = prepared.training.model, prepared.training.args
    templates, found = prepared.judge.templates, report.findings
    report.about = _about(prepared)
    for look in (
        lambda: check_vocabulary(model, encoder.tokenizer),
        lambda: check_files(run.model.model_name_or_path),
    ):
        try:
            look()
        except ValueError as error:
            found.append(_refusal("model", error))
    found += _packing(run, args, unwrapped(model))
    found += findings.setting_findings(run, args)
    found += findings.chat_findings(encoder)
    found += text_findings.clock_findings(encoder, run)
    if prepared.choice is not None:
        found += text_findings.other_judge_findings(prepared.choice)
    elif isinstance(run, SelfJudgeRun):
        found += findings.judge_findings(
            templates, encoder, run.model.model_name_or_path, run.model.revision
        )
    letters = None
    try:
        letters = encoder.letter_ids(
            templates, prepared.judge.token_id_a, prepared.judge.token_id_b
        )
        lead_in = templates[templates.principles[0]].assistant
        report.letters = [
            Letter(x, i, str(encoder.tokenizer.convert_ids_to_tokens(i)), lead_in[-24:])
            for x, i in zip("AB", letters, strict=True)
        ]
    except ValueError as error:
        if prepared.choice is None or prepared.choice.needs_initial:
            found.append(_refusal("letters", error))
    records = _records(report, run, encoder, examples)
    if letters is None:
        return
    if isinstance(run, JSFTRun):
        report.cost = jsft_estimate(prepared, letters, records)
    else:
        report.cost = self_judge_estimate(prepared, records)
    if report.cost is None:
        return
    found += findings.memory_findings(report.cost)
    own: Any = run.jsft_args if isinstance(run, JSFTRun) else run.self_judge_args
    if isinstance(run, SelfJudgeRun) and prepared.machine.cuda:
        found += findings.engine_findings(own, report.cost, prepared.training.setting.bf16)
    longest = max(f.tokens["max"] for f in report.figures)
    found += findings.model_findings(size_of(model), run, own.max_length, longest)


def _about(prepared: Prepared) -> dict[str, str]:
    run, args, encoder = prepared.run, prepared.training.args, prepared.encoder
    inner: Any = unwrapped(prepared.training.model)
    template = "from the run file or judge.json"
    if encoder.chat_template == encoder.tokenizer.chat_template:
        template = "the tokenizer's own"
    if encoder.tokenizer.chat_template is None and run.templates.chat is None:
        template = "turn markers from the run file"
    return {
        "model": f"{run.model.model_name_or_path} ({type(inner).__name__}, "
        f"{str(inner.dtype).removeprefix('torch.')})",
        "trained": f"LoRA r {run.peft_config.get('r', 8)}" if run.peft_config else "all weights",
        "batch": f"{args.per_device_train_batch_size} (per device) × "
        f"{args.gradient_accumulation_steps} (accumulation steps) × "
        f"{prepared.machine.processes} (processes)",
        "chat template": template,
        "output": str(args.output_dir),
    }


def _packing(run: Any, args: Any, whole: Any) -> Iterable[Finding]:
    model: Any = shallow_model(
        whole,
        attn_implementation=run.model.attn_implementation,
        trust_remote_code=run.model.trust_remote_code,
    )
    if model is None:
        text = "not checked, because no small version of this model can be built. The run checks "
        return [note("packing", f"{text}packing in a trial on the whole model")]
    adapter = setup.lora_config(run.peft_config)
    model = model if adapter is None else get_peft_model(model, adapter)
    return findings.packing_findings(model, run, args)


def _records(
    report: Report, run: Any, encoder: ChatEncoder, examples: int
) -> list[PreferenceRecord]:
    """Reads all records and returns evenly spaced records to encode."""
    train, held_out = setup.load_data(run, lambda line: None)
    report.sources = train.counts_by_source
    report.held_out = held_out.counts_by_source if held_out else {}
    report.chosen_longer = text_findings.chosen_longer(train.records)
    report.findings += findings.data_findings(train, held_out, run.dataset)
    report.findings += text_findings.rendered_findings(train.records, encoder)
    if report.kind == "jsft":
        report.findings += text_findings.length_findings(train.records)
    report.records = len(train.records)
    report.encoded = count = min(examples or report.records, report.records)
    return [train.records[i * report.records // count] for i in range(count)]


def jsft_estimate(
    prepared: Prepared, letters: tuple[int, int], records: Sequence[PreferenceRecord]
) -> Cost:
    """Encodes records of a JSFT run, fills in the report and estimates the cost."""
    report, own, encoder = prepared.report, prepared.run.jsft_args, prepared.encoder
    ignored = own.ignore_index
    dataset, report.counts = _or_refused(
        "jsft_args.max_length",
        jsft_dataset,
        records,
        encoder,
        prepared.judge.templates,
        letters,
        max_length=own.max_length,
        ignore_index=ignored,
    )
    rows = dataset.to_list()
    report.examples, report.figures = summary(encoded_rows(rows), encoder, ignored)
    answers = Counter(
        next(x for x in r["labels"] if x != ignored) for r in rows if r["kind"] == "judge"
    )
    report.letter_counts = {x: answers[i] for x, i in zip("AB", letters, strict=True)}
    report.findings += findings.example_findings(report.counts, report.letter_counts)
    total = round(len(rows) * report.records / report.encoded)
    units = shared_units(rows, ignored, shared=own.packing != "off")
    return jsft_cost(prepared.training, units, total)


def self_judge_estimate(prepared: Prepared, records: Sequence[PreferenceRecord]) -> Cost | None:
    """Encodes records of a self-training run, fills in the report and estimates the cost."""
    report, own, encoder = prepared.report, prepared.run.self_judge_args, prepared.encoder
    prepare = PromptPreparer(encoder, own.max_length, own.max_new_tokens, "train", False)
    rows = [prepare(row, i)["prompt_ids"] for i, row in enumerate(setup.prompt_rows(records))]
    prompts = [ids for ids in rows if ids]
    shorter = sum(
        len(encoder.encode_prompt(r.prompt)) > len(ids) > 0
        for r, ids in zip(records, rows, strict=True)
    )
    report.counts = {
        "prompts": len(prompts),
        "prompts: lost their oldest exchanges": shorter,
        "prompts: left out because they do not fit": len(records) - len(prompts),
    }
    report.findings += findings.prompt_findings(len(prompts), shorter, len(records), own)
    if not prompts:
        return None
    kept = [r for r, ids in zip(records, rows, strict=True) if ids]
    asked, responses, judged = _judged(prepared, kept)
    shown = [Encoded("prompts", "prompt for sampling", ids) for ids in prompts]
    report.examples, report.figures = summary([*shown, *asked], encoder)
    return self_judge_cost(
        prepared.training,
        own,
        len(prepared.judge.templates),
        [len(ids) for ids in prompts],
        responses,
        judged,
        round(len(prompts) * report.records / report.encoded),
    )


def _judged(
    prepared: Prepared, records: Sequence[PreferenceRecord]
) -> tuple[list[Encoded], list[int], list[tuple[int, int]]]:
    """Encodes the pairs in the data as judge prompts.

    Returns:
        The judge prompts for the pairs that fit; the lengths of all better responses; and for each
        pair that fits, the number of tokens in all its judge prompts (shared tokens are counted
        once) and in its longest judge prompt if both responses had the maximum length.
    """
    report, own, encoder = prepared.report, prepared.run.self_judge_args, prepared.encoder
    templates = prepared.judge.templates
    limit = min(own.max_length, size_of(prepared.training.model).context or own.max_length)
    asked: list[Encoded] = []
    responses: list[int] = []
    judged: list[tuple[int, int]] = []
    tight = 0
    for record in records:
        for pair in record.pairs[:1]:
            given = Comparison(judge_context(record), pair.chosen, pair.rejected)
            comparison = answers_of(given) or given
            texts = (comparison.response_a, comparison.response_b)
            chosen, rejected = map(len, map(encoder.encode_content, texts))
            responses.append(len(encoder.encode_content(pair.chosen)))
            orders = {
                principle: both
                for principle in templates
                if (both := encode_orders(encoder, templates, principle, comparison, limit))
            }
            if len(orders) < len(templates):
                continue
            asked += [
                Encoded(f"judge, {p}", f"judge, {p}, {order}", ids, swapped=other)
                for p, both in orders.items()
                for order, ids, other in zip(_ORDERS, both, both[::-1], strict=True)
            ]
            longest = max(len(ids) for both in orders.values() for ids in both)
            at_limit = longest - chosen - rejected + 2 * own.max_new_tokens
            tight += at_limit > limit
            unique = sum(
                len(a) + len(b) - shared_length(np.asarray(a), np.asarray(b))
                for a, b in orders.values()
            )
            judged.append((unique, min(at_limit, limit)))
    report.findings += findings.judge_prompt_findings(
        len(responses) - len(judged), tight, len(responses), own.max_new_tokens, limit
    )
    return asked, responses, judged

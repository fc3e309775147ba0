"""What a run would do, found out before anything is trained: `self-judge check`.

It prepares the run as the recipes do, on some of its records, and gives what it saw as plain data.
How that is shown: `view.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from datasets.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from peft import PeftConfig, PeftModel, get_peft_model

from self_judge.check import findings as traps
from self_judge.check.cost import (
    Needs,
    comparisons_per_prompt,
    device_for,
    jsft_work,
    needs_of,
    self_judge_work,
    setting_of,
)
from self_judge.check.examples import Figures, Sample, figures_of, jsft_samples, sample_of
from self_judge.check.findings import Finding, share_trap
from self_judge.check.memory import Sharding
from self_judge.check.model_size import empty_model, shallow_model, size_of
from self_judge.config.hardware import Machine, fit_to_machine
from self_judge.config.schema import JSFTRun, SelfJudgeRun, kind_of_run, load_run
from self_judge.data.records import judge_context
from self_judge.data.sources import PreferenceData
from self_judge.datatypes import Comparison, PreferenceRecord
from self_judge.models import check_vocabulary
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import JudgeSettings
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.self_training.prompts import PromptPreparer
from self_judge.training.setup import (
    jsft_chat_setup,
    jsft_config,
    load_data,
    lora_config,
    prompt_rows,
    self_judge_chat_setup,
    self_judge_config,
    this_machine,
)

T = TypeVar("T")
EXAMPLES = 400  # records that are encoded; all are read


@dataclass(frozen=True, slots=True)
class Letter:
    """A letter's token, and the end of the judge's lead-in that it follows."""

    letter: str
    id: int
    token: str
    after: str


@dataclass(slots=True)
class Report:
    """What a check found.

    Attributes:
        config, kind: the file, and which run it describes.
        about: the run in a few words: model, data, batch, …
        sources, held_out: what was read, by source; see `PreferenceData.counts_by_source`.
        letters: how the two letters were found.
        encoded, records: how many records were encoded, and how many there are.
        counts: examples by kind, and why examples were cut or left out.
        letter_counts: how often each letter is the answer (JSFT).
        chosen_longer: share of the pairs whose better response is the longer text.
        figures, samples: of all kinds of sequences.
        needs: the estimate; `None` where a problem stands before it.
        findings: traps; the run is wrong if one of them is a problem.
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
    samples: list[Sample] = field(default_factory=list)
    needs: Needs | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "problems": len(self.problems)}


def check(
    config: str,
    overrides: Sequence[str] = (),
    *,
    examples: int = EXAMPLES,
    gpu: str | None = None,
    processes: int | None = None,
    sharding: Sharding | None = None,
) -> Report:
    """Checks a run.

    Args:
        config, overrides: as for the run.
        examples: records to encode, evenly spread over the data; 0: all.
        gpu: estimate for this kind of GPU instead of this machine (a key of `memory.GPUS`).
        processes: estimate for so many (default: one per GPU of this machine, or this launch's).
        sharding: how they spread what they hold, where a file for the launcher says it.

    Raises:
        ValueError: a file, setting or record that cannot be used at all.
    """
    if examples < 0:
        raise ValueError(f"--examples must be 0 (all) or positive, got {examples}")
    kind = kind_of_run(config, overrides)
    given: Any = load_run(config, overrides, kind)
    here = this_machine()
    if processes is None:
        gpus = torch.cuda.device_count() if gpu is None else 1
        processes = max(1, gpus, int(os.environ.get("WORLD_SIZE", "1")))
    there = dataclasses.replace(here, processes=processes)
    if gpu is not None:
        there = Machine(True, True, True, True, here.trackers, here.cpu_count, processes)
    run, lacking = fit_to_machine(given, there)
    # Settings are built as on this machine, which alone can check them.
    local, _ = fit_to_machine(given, dataclasses.replace(here, processes=processes))
    report = Report(str(config), kind)
    report.findings += [Finding("warning", "this machine", text) for text in lacking]
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        _Check(report, run, local, there, gpu, sharding, examples).go()
    finally:
        if shown:
            enable_progress_bars()
    order = {"problem": 0, "warning": 1, "note": 2}
    report.findings.sort(key=lambda f: order[f.level])
    return report


class _RefusedError(Exception):
    """Without this part there is nothing more to look at."""


@dataclass
class _Check:
    """One check on its way; every part adds to the report."""

    report: Report
    run: Any
    local: Any
    machine: Machine
    gpu: str | None
    sharding: Sharding | None
    examples: int

    def go(self) -> None:
        jsft = isinstance(self.run, JSFTRun)
        make: Any = jsft_config if jsft else self_judge_config
        try:
            args = self._or_refused("training_args", make, self.local, self.machine.processes)
            model, adapted = self._model()
            make = jsft_chat_setup if jsft else self_judge_chat_setup
            encoder, settings = self._or_refused("templates", make, self.run)
        except _RefusedError:
            return
        self._about(args, model, encoder)
        self._packing(args, model)
        self.report.findings += traps.setting_traps(self.run, args)
        self.report.findings += traps.chat_traps(encoder)
        if isinstance(self.run, SelfJudgeRun):
            name = self.run.model.model_name_or_path
            self.report.findings += traps.judge_traps(settings.templates, encoder, name)
        templates = settings.templates
        letters = self._letters(encoder, settings)
        train = self._data()
        records = _spread(train.records, self.examples or len(train.records))
        self.report.records, self.report.encoded = len(train.records), len(records)
        if letters is None:
            return
        try:
            if isinstance(self.run, JSFTRun):
                self._jsft(self.run, args, adapted, encoder, templates, letters, records)
            else:
                self._self_judge(self.run, args, adapted, encoder, templates, records)
        except _RefusedError:
            return
        longest = max((f.tokens["max"] for f in self.report.figures), default=0)
        own = self.run.jsft_args if jsft else self.run.self_judge_args
        self.report.findings += traps.model_traps(
            size_of(adapted), self.run, own.max_length, longest
        )

    def _problem(self, about: str, error: object) -> None:
        text = " ".join(str(error).split())
        self.report.findings.append(Finding("problem", about, text))

    def _packing(self, args: Any, whole: Any) -> None:
        asked = self.run.model
        model: Any = shallow_model(
            whole,
            attn_implementation=asked.attn_implementation,
            trust_remote_code=asked.trust_remote_code,
        )
        if model is None:
            text = "how prefixes are shared is tried on the model itself when the run starts"
            self.report.findings.append(Finding("note", "packing", text))
            return
        adapter = lora_config(self.run.peft_config)
        model = model if adapter is None else get_peft_model(model, adapter)
        self.report.findings += traps.packing_traps(model, self.run, args)

    def _or_refused(self, about: str, make: Any, *given: Any) -> Any:
        """What `make` gives; a refusal becomes a problem of the report."""
        try:
            return make(*given)
        except (ValueError, TypeError) as error:
            self._problem(about, error)
            raise _RefusedError from error

    def _model(self) -> tuple[Any, Any]:
        """The empty model as it is loaded, and with what is trained."""
        asked = self.run.model
        model: Any = empty_model(
            asked.model_name_or_path,
            dtype=asked.dtype,
            revision=asked.revision,
            trust_remote_code=asked.trust_remote_code,
        )
        config: Any = self._or_refused("peft_config", lora_config, self.run.peft_config)
        folder = os.path.join(asked.model_name_or_path, "adapter_config.json")
        if config is None and isinstance(self.run, SelfJudgeRun) and os.path.isfile(folder):
            config = PeftConfig.from_pretrained(asked.model_name_or_path)
            config.inference_mode = False
        if config is None:
            return model, model
        return model, self._or_refused("peft_config", get_peft_model, model, config)

    def _about(self, args: Any, model: Any, encoder: ChatEncoder) -> None:
        try:
            check_vocabulary(model, encoder.tokenizer)
        except ValueError as error:
            self._problem("model", error)
        run, own = self.run, encoder.chat_template == encoder.tokenizer.chat_template
        adapter = run.peft_config and f"LoRA r {run.peft_config.get('r', 8)}"
        batch = (
            f"{args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated "
            f"× {self.machine.processes} processes"
        )
        template = "the tokenizer's own" if own else "from the run file or judge.json"
        if encoder.tokenizer.chat_template is None and run.templates.chat is None:
            template = "turn markers of the run file"
        self.report.about = {
            "model": f"{run.model.model_name_or_path} ({type(model).__name__}, "
            f"{str(model.dtype).removeprefix('torch.')})",
            "trained": adapter or "all weights",
            "batch": batch,
            "chat template": template,
            "output": str(args.output_dir),
        }

    def _letters(self, encoder: ChatEncoder, settings: JudgeSettings) -> tuple[int, int] | None:
        templates = settings.templates
        try:
            ids = encoder.letter_ids(templates, settings.token_id_a, settings.token_id_b)
        except ValueError as error:
            self._problem("letters", error)
            return None
        lead_in = templates[templates.principles[0]].assistant
        self.report.letters = [
            Letter(x, i, str(encoder.tokenizer.convert_ids_to_tokens(i)), lead_in[-24:])
            for x, i in zip("AB", ids, strict=True)
        ]
        return ids

    def _data(self) -> PreferenceData:
        rationales = isinstance(self.run, JSFTRun) and self.run.uses_rationales
        train, held_out = load_data(self.run.dataset, lambda line: None, rationales=rationales)
        self.report.sources = train.counts_by_source
        self.report.held_out = held_out.counts_by_source if held_out else {}
        pairs = [p for r in train.records for p in r.pairs]
        if pairs:
            longer = sum(len(p.chosen) > len(p.rejected) for p in pairs)
            self.report.chosen_longer = longer / len(pairs)
        self.report.findings += traps.data_traps(train, held_out)
        return train

    # -- JSFT ----------------------------------------------------------------------------------

    def _jsft(
        self,
        run: JSFTRun,
        args: Any,
        model: Any,
        encoder: ChatEncoder,
        templates: JudgeTemplates,
        letters: tuple[int, int],
        records: Sequence[PreferenceRecord],
    ) -> None:
        own, report = run.jsft_args, self.report
        dataset, counts = self._or_refused(
            "jsft_args.max_length",
            lambda: jsft_dataset(
                records, encoder, templates, letters,
                max_length=own.max_length, ignore_index=own.ignore_index,
            ),
        )  # fmt: skip
        rows = dataset.to_list()
        report.counts = counts
        report.samples = jsft_samples(rows, encoder, own.ignore_index)
        for kind in dict.fromkeys((r["kind"], r["principle"]) for r in rows):
            chosen = [r for r in rows if (r["kind"], r["principle"]) == kind]
            found = figures_of(
                "SFT" if kind[0] == "sft" else f"judge, {kind[1]}",
                [r["input_ids"] for r in chosen],
                encoder,
                [r["labels"] for r in chosen],
                own.ignore_index,
            )
            report.figures += [found] if found else []
        answers = [
            next(x for x in r["labels"] if x != own.ignore_index)
            for r in rows
            if r["kind"] == "judge"
        ]
        report.letter_counts = {x: answers.count(i) for x, i in zip("AB", letters, strict=True)}
        report.findings += traps.example_traps(counts, report.letter_counts)
        units = _units(rows, own.ignore_index, shared=own.packing != "off")
        total = round(len(rows) * report.records / report.encoded)
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        setting = setting_of(
            run, args, self.machine, self.sharding, adapter=isinstance(model, PeftModel)
        )
        report.needs = needs_of(
            model,
            jsft_work(units, args),
            setting,
            device_for(self.gpu, self.machine, setting.bf16),
            args,
            total,
            {"examples": step * setting.processes},
            "memory: the longest example of a thousand randomly drawn micro-batches",
        )
        report.findings += traps.memory_traps(report.needs)

    # -- self-training -------------------------------------------------------------------------

    def _self_judge(
        self,
        run: SelfJudgeRun,
        args: Any,
        model: Any,
        encoder: ChatEncoder,
        templates: JudgeTemplates,
        records: Sequence[PreferenceRecord],
    ) -> None:
        own, report = run.self_judge_args, self.report
        prepare = PromptPreparer(encoder, own.max_length, own.max_new_tokens, "train", False)
        rows = [prepare(row, i) for i, row in enumerate(prompt_rows(records))]
        kept = [(r, row) for r, row in zip(records, rows, strict=True) if row["prompt_ids"]]
        whole = [encoder.encode_prompt(r.prompt) for r in records]
        shorter = sum(
            len(ids) > len(row["prompt_ids"]) > 0 for ids, row in zip(whole, rows, strict=True)
        )
        report.counts = {
            "prompts": len(kept),
            "prompts: lost their oldest exchanges": shorter,
            "prompts: left out, do not fit": len(records) - len(kept),
        }
        report.findings += traps.prompt_traps(
            len(kept), shorter, len(records), own.max_length, own.max_new_tokens
        )
        if not kept:
            raise _RefusedError
        prompts = [row["prompt_ids"] for _, row in kept]
        report.samples.append(sample_of("prompt, as it is sampled from", prompts[0], encoder))
        report.figures += _some(figures_of("prompts", prompts, encoder))
        context = size_of(model).context
        limit = min(own.max_length, context or own.max_length)
        judged = self._judge_prompts(run, [r for r, _ in kept], encoder, templates, limit)
        responses = [len(encoder.encode_content(p.chosen)) for r, _ in kept for p in r.pairs[:1]]
        response = sum(responses) / len(responses) if responses else own.max_new_tokens
        response = min(response, own.max_new_tokens)
        work = self_judge_work(list(map(len, prompts)), response, judged, run, args, len(templates))
        # Without an adapter to switch off, the judge is a copy of all weights.
        adapter = isinstance(model, PeftModel)
        setting = setting_of(
            run, args, self.machine, self.sharding, adapter=adapter, reference=not adapter
        )
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        everywhere = step * setting.processes
        played = comparisons_per_prompt(own.num_generations, own.pair_selection)
        report.needs = needs_of(
            model,
            work,
            setting,
            device_for(self.gpu, self.machine, setting.bf16),
            args,
            round(len(kept) * report.records / report.encoded),
            {
                "prompts": everywhere,
                "responses": everywhere * own.num_generations,
                "comparisons": everywhere * played,
                "judge prompts": everywhere * played * 2 * len(templates),
            },
            f"memory: responses of {own.max_new_tokens} tokens; time: sampling runs to that "
            f"limit, the responses that are judged and learned from have {response:.0f}"
            + (" (the mean of the data's better ones)" if responses else ""),
        )
        report.findings += traps.memory_traps(report.needs)
        if own.use_vllm and own.vllm_mode == "colocate" and self.machine.cuda:
            report.findings += traps.engine_traps(own, report.needs, setting.bf16)

    def _judge_prompts(
        self,
        run: SelfJudgeRun,
        records: Sequence[PreferenceRecord],
        encoder: ChatEncoder,
        templates: JudgeTemplates,
        limit: int,
    ) -> list[tuple[float, float]]:
        """Encodes the data's own pairs as the judge will be asked; the lengths of each."""
        own, report = run.self_judge_args, self.report
        by_principle: dict[str, list[list[int]]] = {}
        lengths: list[tuple[float, float]] = []
        no_fit = tight = total = 0
        for record in records:
            for pair in record.pairs[:1]:
                total += 1
                case = Comparison(judge_context(record), pair.chosen, pair.rejected)
                asked = [encoder.encode_orders(templates, p, case, limit) for p in templates]
                whole = [orders for orders in asked if orders is not None]
                no_fit += len(whole) < len(asked)
                if len(whole) < len(asked):
                    continue
                for principle, orders in zip(templates, whole, strict=True):
                    by_principle.setdefault(principle, []).extend(orders)
                own_tokens = sum(
                    len(encoder.encode_content(text)) for text in (pair.chosen, pair.rejected)
                )
                longest = max(len(ids) for orders in whole for ids in orders)
                at_limit = longest - own_tokens + 2 * own.max_new_tokens
                tight += at_limit > limit
                unique = sum(len(a) + len(b) - _shared(a, b) for a, b in whole)
                lengths.append((unique, min(at_limit, limit)))
        for principle, ids in by_principle.items():
            for place, order in enumerate(("first response first", "second response first")):
                title = f"judge, {principle}, {order}: the next token is the verdict"
                report.samples.append(sample_of(title, ids[place], encoder))
            report.figures += _some(figures_of(f"judge, {principle}", ids, encoder))
        report.findings += share_trap(
            "warning", "self_judge_args.max_length", no_fit, total,
            "of the data's own pairs do not fit into a judge prompt",
            "such pairs are undecidable; raise max_length",
        )  # fmt: skip
        report.findings += share_trap(
            "warning", "self_judge_args.max_new_tokens", tight, total,
            f"of the prompts leave no room in a judge prompt for two responses of "
            f"{own.max_new_tokens} tokens within max_length {limit}",
            "the judge then loses context, or cannot decide; raise max_length or lower "
            "max_new_tokens", least=0.05,
        )  # fmt: skip
        return lengths


def _some(found: T | None) -> list[T]:
    return [] if found is None else [found]


def _spread(records: Sequence[T], count: int) -> list[T]:
    """`count` of them, evenly spread."""
    if count >= len(records):
        return list(records)
    return [records[i * len(records) // count] for i in range(count)]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _units(
    rows: Iterable[dict[str, Any]], ignore_index: int, shared: bool
) -> list[tuple[int, int, int]]:
    """(examples, tokens, trained tokens) of what is drawn together: twins share their start."""
    units: list[tuple[int, int, int]] = []
    before: list[int] = []
    for row in rows:
        ids = row["input_ids"]
        trained = sum(x != ignore_index for x in row["labels"])
        if row["twin"] and units and shared:
            n, tokens, scored = units[-1]
            units[-1] = (n + 1, tokens + len(ids) - _shared(before, ids), scored + trained)
        else:
            units.append((1, len(ids), trained))
        before = ids
    return units

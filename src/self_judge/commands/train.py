"""Runs JSFT and self-training from a run's configuration, and saves the results.

Other packages implement the steps. This module calls the steps in order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from self_judge.adapters import FILES, check_mergeable
from self_judge.commands.align.stages import next_words
from self_judge.commands.run_summary import RunSummary, judge_accuracy
from self_judge.config.hardware import Run, fit_to_machine, threads_for
from self_judge.config.schema import JSFTRun, SelfJudgeRun
from self_judge.config.self_training import PackingChoice
from self_judge.console import Terminal, masked, say
from self_judge.data.hub import workers_end_with_parent
from self_judge.datatypes import PreferenceRecord
from self_judge.errors import ModelError
from self_judge.inference.lockstep import check_connected
from self_judge.judging.choice import resolve_judge
from self_judge.models import (
    apply_umask,
    check_vocabulary,
    clamp_to_context,
    load_model,
    merged_in_full,
)
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import save_judge_settings
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.runtime import own_device, unwrapped
from self_judge.storage.atomic import LAST, atomic_files, latest_complete, loads, write_json
from self_judge.storage.run_dir import DATA, RUN
from self_judge.training.callbacks import LiveProgress
from self_judge.training.fault_tolerance import only_job
from self_judge.training.identity.reference import probe_logits
from self_judge.training.identity.saved_weights import (
    check_configuration,
    check_loading,
    check_merged,
    check_saved,
    not_finite,
)
from self_judge.training.jsft.examples import JudgeAugmentedSFTCollator, jsft_dataset
from self_judge.training.jsft.trainer import JSFTTrainer
from self_judge.training.self_training.trainer import SelfJudgeTrainer
from self_judge.training.setup import (
    Say,
    already_rendered,
    jsft_chat_setup,
    jsft_config,
    judge_choice,
    load_data,
    lora_config,
    output_folder,
    pair_rows,
    prompt_rows,
    refuse_own_inputs,
    self_judge_chat_setup,
    self_judge_config,
    this_machine,
)

logger = logging.getLogger(__name__)


class TrainingStopped(Exception):  # noqa: N818  not an error
    """Raised after SIGTERM stops a run and a checkpoint is saved. The message names the step."""


# -- JSFT ----------------------------------------------------------------------------------------


def run_jsft(run: JSFTRun, console: Console | None = None) -> Path:
    """Runs judge-augmented SFT and returns the folder of the model.

    Raises:
        TrainingStopped: the process received SIGTERM; the model was saved in a checkpoint.
    """
    with _started(run, console) as (fitted, say):
        return _run_jsft(fitted, say, console)


def _run_jsft(run: JSFTRun, say: Say, console: Console | None) -> Path:
    args = jsft_config(run)
    set_seed(args.seed)
    encoder, settings = jsft_chat_setup(run)
    templates = settings.templates
    data, held_out = load_data(run, say)
    _warn_of_texts(encoder, data.records, say)
    model = _load_model(run, merge=True)
    trainer = jsft_trainer(
        model,
        encoder,
        templates,
        data.records,
        held_out.records if held_out else None,
        args,
        peft_config=lora_config(run.peft_config),
        max_length=run.jsft_args.max_length,
        ignore_index=run.jsft_args.ignore_index,
        num_proc=run.dataset.num_proc,
        packing=run.jsft_args.packing,
        max_skipped_steps=run.jsft_args.max_skipped_steps,
        say=say,
    )
    if run.jsft_args.merge_adapter and isinstance(trainer.model, PeftModel):
        check_configuration(trainer.model)
        check_mergeable(trainer.model)
        if broken := not_finite(trainer.model, trained_only=False):
            raise ModelError(f"the base model contains NaN or infinity (first: {broken[0]})")
    output = Path(str(args.output_dir))
    _save_json(output / DATA, data.counts_by_source)
    accuracy = None
    if run.jsft_args.judge_accuracy:
        dataset: Any = trainer.train_dataset
        tokens = statistics.fmean(map(len, dataset[:_SAMPLED]["input_ids"])) * _examples(trainer)
        judged = encoder, templates, encoder.letter_ids(templates)
        accuracy = judge_accuracy(*judged, held_out, args, run.jsft_args.max_length, tokens, say)
    summary = RunSummary(output, _console(console), accuracy)
    _train(trainer, run, args, say, LiveProgress("JSFT", _console(console)), summary)
    words = ["train", "CONFIG", f"model.model_name_or_path={output}"]
    _summarize(trainer, summary, words)
    save_jsft(trainer, encoder, templates, merge=run.jsft_args.merge_adapter)
    say(f"JSFT model and judge.json: {output}")
    if trainer.accelerator.is_main_process:
        summary.show()
    return output


def jsft_trainer(
    model: PreTrainedModel | PeftModel,
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    records: Sequence[PreferenceRecord],
    held_out: Sequence[PreferenceRecord] | None,
    args: SFTConfig,
    *,
    peft_config: LoraConfig | None = None,
    max_length: int | None = 2048,
    ignore_index: int = -100,
    num_proc: int | None = None,
    packing: PackingChoice = "auto",
    max_skipped_steps: int = 3,
    say: Say = logger.info,
) -> JSFTTrainer:
    """Encodes SFT and judge examples, and creates a `JSFTTrainer` for them.

    Args:
        records: training records.
        held_out: records for the evaluation loss, if `args` enables evaluation.
        packing: see `Packing`.
        max_skipped_steps: see `FaultToleranceMixin`.
        say: logs the number of examples and how many of them were truncated.
    """
    check_vocabulary(model, encoder.tokenizer)
    max_length = clamp_to_context(model.config, max_length)
    letters = encoder.letter_ids(templates)

    def encode(chosen: Sequence[PreferenceRecord]) -> tuple[Dataset, dict[str, int]]:
        with PartialState().main_process_first():
            return jsft_dataset(
                chosen, encoder, templates, letters,
                max_length=max_length, ignore_index=ignore_index, num_proc=num_proc,
            )  # fmt: skip

    train, counts = encode(records)
    say("training examples: " + ", ".join(f"{v:,} {k}" for k, v in counts.items()))
    evaluation = encode(held_out)[0] if held_out else None
    if evaluation is None:
        args.eval_strategy = "no"
    args.max_length = None  # examples are already truncated and counted
    return JSFTTrainer(
        model=model,
        args=args,
        data_collator=JudgeAugmentedSFTCollator(encoder.tokenizer, ignore_index),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=encoder.tokenizer,
        peft_config=peft_config,
        packing=packing,
        max_skipped_steps=max_skipped_steps,
        # Save judge.json with every checkpoint.
        on_saved=lambda folder: save_judge_settings(folder, encoder, templates, letters),
    )


def save_jsft(
    trainer: JSFTTrainer, encoder: ChatEncoder, templates: JudgeTemplates, *, merge: bool
) -> Path:
    """Saves the trained model and judge.json. With `merge`, the adapter is merged first."""
    output = Path(str(trainer.args.output_dir))
    tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
    tokenizer.chat_template = encoder.chat_template
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not (merge and isinstance(model, PeftModel)):
        trainer.save_model(str(output))
        return output
    if trainer.accelerator.is_main_process:
        with atomic_files(output, without=FILES) as folder:
            quantized = getattr(unwrapped(model), "quantization_method", None)
            expected = None if quantized else probe_logits(model)
            plain = merged_in_full(model)
            check_merged(plain, expected)
            check_loading(plain)
            plain.save_pretrained(folder)
            check_saved(plain, folder)
            apply_umask(folder)
            tokenizer.save_pretrained(folder)
            save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
            trainer.write_card(folder, output)
        if trainer.args.push_to_hub:
            trainer.push_folder()
    trainer.accelerator.wait_for_everyone()
    return output


# -- self-training -------------------------------------------------------------------------------


def run_self_judge(run: SelfJudgeRun, console: Console | None = None) -> Path:
    """Runs on-policy self-training and returns the folder of the policy.

    Raises:
        TrainingStopped: the process received SIGTERM; the policy was saved in a checkpoint.
    """
    with _started(run, console) as (fitted, say):
        return _run_self_judge(fitted, say, console)


def _run_self_judge(run: SelfJudgeRun, say: Say, console: Console | None) -> Path:
    args = self_judge_config(run)
    set_seed(args.seed)
    encoder, settings = self_judge_chat_setup(run)
    choice = judge_choice(run, settings)
    judge = None if choice is None else resolve_judge(choice)
    data, held_out = load_data(run, say)
    _warn_of_texts(encoder, data.records, say)
    if held_out is None:
        args.eval_strategy = "no"
    # An existing adapter is merged into the base if a new adapter is added; otherwise, it is
    # trained further.
    model = _load_model(run, merge=run.peft_config is not None)
    trainer = SelfJudgeTrainer(
        model=model,
        args=args,
        processing_class=encoder.tokenizer,
        encoder=encoder,
        judge=judge,
        judge_templates=settings.templates if settings else None,
        train_dataset=Dataset.from_list(prompt_rows(data.records)),
        eval_dataset=Dataset.from_list(pair_rows(held_out.records)) if held_out else None,
        peft_config=lora_config(run.peft_config),
        token_id_a=settings.token_id_a if settings else None,
        token_id_b=settings.token_id_b if settings else None,
    )
    output = Path(str(args.output_dir))
    _save_json(output / DATA, data.counts_by_source)
    accuracy = None
    if run.self_judge_args.judge_accuracy and settings and trainer.letters:
        judged = encoder, settings.templates, trainer.letters
        tokens = 2.0 * args.max_new_tokens * _examples(trainer)  # a lower estimate
        accuracy = judge_accuracy(*judged, held_out, args, args.max_length, tokens, say)
    summary = RunSummary(output, _console(console), accuracy)
    _train(trainer, run, args, say, LiveProgress("self-training", _console(console)), summary)
    model = run.model.model_name_or_path
    names = choice.models if choice else [model]
    words = ["compare", str(output), model, "--judge", *(names[:1] or ["JUDGE"])]
    words += ["--prompts", "PROMPTS"]
    _summarize(trainer, summary, [*words, "--output", "DIR"])
    trainer.save_model(str(output))
    say(f"policy: {output}")
    if trainer.accelerator.is_main_process:
        summary.show()
    return output


# -- shared --------------------------------------------------------------------------------------

_SAMPLED = 1000  # the number of examples from which the mean length is estimated


def _examples(trainer: JSFTTrainer | SelfJudgeTrainer) -> float:
    """Returns the number of examples in all steps, over all processes."""
    args: Any = trainer.args
    if args.max_steps > 0:
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return float(args.max_steps * per_step * args.world_size)
    dataset: Any = trainer.train_dataset
    return float(len(dataset) * args.num_train_epochs)


def _summarize(
    trainer: JSFTTrainer | SelfJudgeTrainer, summary: RunSummary, following: list[str]
) -> None:
    if trainer.accelerator.is_main_process:
        command = shlex.join(["self-judge", *(next_words(summary.folder) or following)])
        summary.write(trainer.accelerator.unwrap_model(trainer.model), command)
    trainer.accelerator.wait_for_everyone()


def _console(console: Console | None) -> Console:
    return console or Terminal(stderr=True)


def _speaker(console: Console | None) -> Say:
    console = _console(console)
    if not PartialState().is_main_process:
        return lambda line: None
    return lambda line: say(console, line)


@contextmanager
def _started(run: Run, console: Console | None) -> Iterator[tuple[Run, Say]]:
    """Connects the processes, locks the output folder, and adapts the run to this machine."""
    on_cpu = bool(run.training_args.get("use_cpu")) or own_device().type == "cpu"
    check_connected(PartialState(cpu=on_cpu))
    say = _speaker(console)
    refuse_own_inputs(run)
    workers_end_with_parent()
    with only_job(output_folder(run)):
        yield _fitted(run, say), say


def _fitted(run: Run, say: Say) -> Run:
    machine = this_machine()
    threads = threads_for(machine)
    if threads:
        torch.set_num_threads(threads)
    run, warnings = fit_to_machine(run, machine)
    for warning in warnings:
        say(f"warning: {warning}")
    return run


def _warn_of_texts(encoder: ChatEncoder, records: Sequence[PreferenceRecord], say: Say) -> None:
    if rendered := already_rendered(records, encoder):
        say(f"warning: {rendered}")


def _load_model(run: JSFTRun | SelfJudgeRun, *, merge: bool) -> Any:
    options = dataclasses.asdict(run.model)
    return load_model(options.pop("model_name_or_path"), merge=merge, **options)


def _train(
    trainer: JSFTTrainer | SelfJudgeTrainer,
    run: Run,
    args: Any,
    say: Say,
    progress: LiveProgress,
    summary: RunSummary,
) -> None:
    """Trains the model. `resume_from_checkpoint: true` resumes from the latest complete one."""
    output = Path(str(args.output_dir))
    resume: str | None = _checkpoint(output, args.resume_from_checkpoint, say)
    this = settings_json(run)
    if resume is not None:
        say(f"resuming from {resume}")
        for line in changed_settings(output, this):
            say(f"warning: {line}")
    trainer.run_log.run_file = this
    # Packing tests a sharded model at the first batch, because all processes must run the test
    # together.
    if trainer.packing is not None and not trainer.packing.shape.one_pass:
        say(trainer.packing.describe())
    if not args.disable_tqdm:
        progress.attach(trainer)
    if trainer.accelerator.is_main_process:
        summary.start(trainer.model, resumed=resume is not None)
    trainer.accelerator.wait_for_everyone()
    trainer.stop_on_sigterm = True
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        progress.stop()
    if trainer.stopped_early:
        state = trainer.state
        raise TrainingStopped(
            f"stopped by SIGTERM after step {state.global_step:,} of {state.max_steps:,}; "
            f"saved {output / f'checkpoint-{state.global_step}'}"
        )


def _checkpoint(output: Path, wanted: str | bool | None, say: Say) -> str | None:
    if wanted in (None, False, "false", "False"):
        return None
    if wanted not in LAST:
        return str(wanted)
    found, skipped = latest_complete(output)
    for line in skipped:
        say(f"warning: {line}")
    return str(found) if found is not None else None


def settings_json(run: JSFTRun | SelfJudgeRun) -> dict[str, Any]:
    """Returns a run's settings as they are written to `run.json`."""
    settings: dict[str, Any] = masked(json.loads(json.dumps(dataclasses.asdict(run), default=str)))
    return settings


def changed_settings(output: Path, this: Mapping[str, Any]) -> Iterator[str]:
    """Yields a message for each setting that differs from those in `run.json`."""
    try:
        before = dict(loads((output / RUN).read_bytes())["run_file"])
    except FileNotFoundError:
        return
    except (OSError, LookupError, TypeError, ValueError):
        yield f"{output / RUN} cannot be read, so changed settings are not reported"
        return
    for section, values in this.items():
        old = before.get(section)
        if not (isinstance(values, dict) and isinstance(old, dict)):
            continue
        for name in sorted({*values, *old} - {"resume_from_checkpoint"}):
            if values.get(name) != old.get(name):
                yield (
                    f"{section}.{name} was {old.get(name)!r} at the start of this run and is now "
                    f"{values.get(name)!r}"
                )


def _save_json(path: Path, content: Any) -> None:
    if not PartialState().is_main_process:
        return
    write_json(path, masked(content))

"""Sets up a run from its run file: settings, tokenizer, templates, data and adapter.

Both training and `self-judge check` use this module, so the check describes the actual run. This
module does not load weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from trl import SFTConfig

from self_judge.config.hardware import Machine, detect_machine
from self_judge.config.schema import (
    JSFT_FIRST,
    DatasetArgs,
    JSFTRun,
    SelfJudgeRun,
    Source,
)
from self_judge.config.trainer_keys import accumulation_steps, check_training_values
from self_judge.data.sources import PreferenceData, Subset, load_preferences, to_self_judge_rows
from self_judge.datatypes import PreferenceRecord
from self_judge.errors import ConfigError
from self_judge.judging.choice import JudgeChoice
from self_judge.models import load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import (
    JUDGE_FILE,
    JudgeSettings,
    encoder_as_taught,
    has_judge_settings,
    load_judge_settings,
    resolve_settings,
)
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.template_source import CLOCK
from self_judge.storage.atomic import LAST, latest_complete, writable_to
from self_judge.storage.repository import refuse_overwriting
from self_judge.storage.run_dir import DATA, METRICS, RUN
from self_judge.training.identity.reference import own_models
from self_judge.training.self_training.config import SelfJudgeConfig

Say = Callable[[str], None]


def this_machine() -> Machine:
    """Returns the capabilities of the current machine."""
    cuda = torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else None
    return detect_machine(cuda, bf16)


# -- settings --------------------------------------------------------------------------------------


def jsft_config(run: JSFTRun, processes: int | None = None) -> SFTConfig:
    """Returns the trainer's settings for a JSFT run. See `self_judge_config` for `processes`.

    Raises:
        ValueError: a setting is unknown, a value has the wrong type, or the global batch size is
            not divisible by the micro-batch size times the number of processes.
    """
    args: SFTConfig = _training_config(
        run, run.jsft_args.global_batch_size, processes, SFTConfig, {"max_length": None}
    )
    if run.jsft_args.group_by_length:
        # Examples of similar length share a micro-batch within a randomly drawn optimizer step.
        # Transformers' "group_by_length" would sort examples across many steps. SFT examples are
        # shorter than judge examples, so training would see only one of the two kinds for many
        # steps.
        args.train_sampling_strategy = "batch_rebalance"
    return args


def self_judge_config(run: SelfJudgeRun, processes: int | None = None) -> SelfJudgeConfig:
    """Returns the trainer's settings for a self-training run.

    Args:
        processes: the number of processes that share the global batch (default: the number of
            processes in this launch).

    Raises:
        ValueError: as for `jsft_config`, or the settings are incompatible with the method.
    """
    own = dataclasses.asdict(run.self_judge_args)
    # Arguments of the trainer and the command, not of the trainer's config.
    for name in ("token_id_a", "token_id_b", "judge_accuracy", "judge"):
        del own[name]
    global_batch_size = own.pop("global_batch_size")
    config: SelfJudgeConfig = _training_config(
        run, global_batch_size, processes, SelfJudgeConfig, own
    )
    return config


def _training_config(
    run: JSFTRun | SelfJudgeRun,
    global_batch_size: int | None,
    processes: int | None,
    config_class: type[Any],
    own: dict[str, Any],
) -> Any:
    output_folder(run)
    training = check_training_values(run.training_args, config_class)
    if global_batch_size is not None:
        training["gradient_accumulation_steps"] = accumulation_steps(
            global_batch_size,
            training.get("per_device_train_batch_size", 8),
            int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes,
        )
    if training.get("learning_rate", 0.0) < 0:
        raise ConfigError(
            f"training_args.learning_rate must be at least 0, got {training['learning_rate']}"
        )
    # Transformers trains one step with `max_steps: 0`, and none with `num_train_epochs: 0`.
    if training.get("max_steps") == 0:
        raise ConfigError("training_args.max_steps must be above 0, or -1 for all epochs, got 0")
    if training.get("max_steps", -1) < 0 and training.get("num_train_epochs", 1) <= 0:
        raise ConfigError(
            f"training_args.num_train_epochs must be above 0, got {training['num_train_epochs']}"
        )
    try:
        return config_class(**training, **own)
    except ValueError as error:
        # The message from Transformers contains the unknown value but not its key.
        named = next((k for k, v in training.items() if str(error).startswith(f"{v} is not")), None)
        if named is None:
            raise
        raise ConfigError(f"training_args.{named}: {error}") from error


def lora_config(settings: dict[str, Any] | None) -> LoraConfig | None:
    """Returns the `LoraConfig` for the `peft_config` section, or `None` if there is none.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    if settings is None:
        return None
    initial = settings.get("init_lora_weights", True)
    if not isinstance(initial, (bool, str)):
        raise ConfigError(
            f"peft_config.init_lora_weights: expected true, false or text, got {initial!r:.60}"
        )
    checked = check_training_values(settings, LoraConfig, "peft_config")
    return LoraConfig(**{"task_type": "CAUSAL_LM", **checked})


# -- chat set-up -----------------------------------------------------------------------------------


def jsft_chat_setup(run: JSFTRun) -> tuple[ChatEncoder, JudgeSettings]:
    """Returns the encoder for a JSFT run and the settings of its judge."""
    templates = run.templates.judge_templates()
    assert templates is not None  # checked by JSFTRun
    if not run.uses_rationales and templates.has_rationales:
        templates = JudgeTemplates(dict(templates))
    return _encoder(run, None), JudgeSettings(templates)


def self_judge_chat_setup(run: SelfJudgeRun) -> tuple[ChatEncoder, JudgeSettings | None]:
    """Returns the encoder for a self-training run and the settings of its initial model as a judge.

    The settings are `None` if another judge judges and the model has no templates.

    Raises:
        ValueError: neither the run file nor the model folder has judge templates.
    """
    name, templates = run.model.model_name_or_path, run.templates.judge_templates()
    judge = run.self_judge_args.judge
    taught = templates is not None or has_judge_settings(name, run.model.revision)
    if judge is not None and not judge.needs_initial and not taught:
        return _encoder(run, None), None
    settings = resolve_settings(
        name,
        templates,
        run.self_judge_args.token_id_a,
        run.self_judge_args.token_id_b,
        revision=run.model.revision,
        remedy=JSFT_FIRST,
    )
    return _encoder(run, settings), settings


def judge_choice(run: SelfJudgeRun, own: JudgeSettings | None) -> JudgeChoice | None:
    """Returns the judge of a self-training run, or `None` for the frozen initial model.

    Args:
        own: the settings of the initial model as a judge, whose templates are those of a judge
            without templates.

    Raises:
        ValueError: a judge has no templates.
    """
    args = run.self_judge_args
    if args.judge is None:
        return None
    try:
        return JudgeChoice.from_args(
            args.judge,
            batch_size=args.judge_batch_size,
            max_length=args.max_length,
            packing=args.packing,
            fallback=own and own.templates,
        )
    except ValueError as error:
        raise ConfigError(f"self_judge_args.judge: {error}") from error


def _encoder(run: JSFTRun | SelfJudgeRun, saved: JudgeSettings | None) -> ChatEncoder:
    tokenizer = load_tokenizer(
        run.model.model_name_or_path,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
    )
    words = run.templates
    markers = (words.user, words.assistant)
    values = dict(words.chat_template_kwargs or {})
    encoder = encoder_as_taught(tokenizer, saved, words.chat, values, markers)
    given = {**(saved.chat_template_kwargs if saved else {}), **values}
    if CLOCK not in encoder.chat_template_kwargs or given.get(CLOCK):
        return encoder
    # A run that resumes on another day keeps the date on which it started.
    wanted = run.training_args.get("resume_from_checkpoint")
    output = output_folder(run)
    folder = latest_complete(output)[0] if wanted in LAST else wanted or None
    begun = load_judge_settings(folder) if folder else None
    if begun is not None and CLOCK in begun.chat_template_kwargs:
        values[CLOCK] = begun.chat_template_kwargs[CLOCK]
        return encoder_as_taught(tokenizer, saved, words.chat, values, markers)
    return encoder


# -- inputs and outputs ----------------------------------------------------------------------------


def output_folder(run: JSFTRun | SelfJudgeRun) -> Path:
    """Returns the run's output folder.

    Raises:
        ConfigError: the run file does not name a folder.
    """
    folder = run.training_args.get("output_dir")
    if not isinstance(folder, str) or not folder.strip():
        raise ConfigError(f"training_args.output_dir must be the path of a folder, got {folder!r}")
    writable_to(Path(folder), lambda text: ConfigError(f"training_args.output_dir: {text}"))
    return Path(folder)


def refuse_own_inputs(run: JSFTRun | SelfJudgeRun) -> None:
    """Raises `ValueError` if the run would overwrite the model or the data that it starts from."""
    output = output_folder(run)
    model = run.model
    refuse_overwriting([output], own_models(model.model_name_or_path, model.revision))
    written = [output / name for name in (RUN, METRICS, DATA, JUDGE_FILE)]
    refuse_overwriting(written, [s.path for s in (*run.dataset.sources, *run.dataset.eval)])


# -- data ------------------------------------------------------------------------------------------


def load_data(
    run: JSFTRun | SelfJudgeRun, say: Say
) -> tuple[PreferenceData, PreferenceData | None]:
    """Loads the training data and the held-out data (`eval` sources, or a share of the prompts).

    The held-out data is `None` if `held_out` is 0, or if the share has no record to evaluate: JSFT
    evaluates any record, and self-training evaluates pairs.
    """
    dataset = run.dataset
    rationales = isinstance(run, JSFTRun) and run.uses_rationales

    def load(
        sources: Sequence[Source], subset: Subset, share: float, most: int | None, side: str
    ) -> PreferenceData:
        data = load_preferences(
            sources,
            subset=subset,
            held_out=share,
            principles=dataset.principles,
            rationales=rationales,
            max_records=most,
            seed=dataset.seed,
            num_proc=dataset.num_proc,
        )
        say(f"{side}:\n{data.describe()}")
        return data

    if dataset.eval:
        train = load(dataset.sources, "train", 0.0, dataset.max_records, "training data")
        return train, load(dataset.eval, "all", 0.0, dataset.max_eval_records, "evaluation data")
    train = load(dataset.sources, "train", dataset.held_out, dataset.max_records, "training data")
    if not dataset.held_out:
        return train, None
    most, share = dataset.max_eval_records, dataset.held_out
    held_out = load(dataset.sources, "held_out", share, most, "held-out data")
    if any(record.pairs or isinstance(run, JSFTRun) for record in held_out.records):
        return train, held_out
    say(f"warning: {nothing_held_out(dataset, train)}")
    return train, None


def nothing_held_out(dataset: DatasetArgs, train: PreferenceData) -> str:
    """Returns a warning for data whose held-out share is empty."""
    return (
        f"dataset.held_out {dataset.held_out:g} holds out no usable record beside the "
        f"{len(train.records):,} for training, so there is no evaluation: raise dataset.held_out, "
        "or set dataset.eval"
    )


def already_rendered(records: Sequence[PreferenceRecord], encoder: ChatEncoder) -> str | None:
    """Returns a warning that counts the records with turn markers, or `None` if there are none."""
    found: list[str] = []
    for record in records:
        texts = [message["content"] for message in record.prompt]
        texts += [text for pair in record.pairs for text in (pair.chosen, pair.rejected)]
        markers = map(encoder.marker_in, [*texts, record.demonstration or ""])
        if marker := next(filter(None, markers), None):
            found.append(f"{marker!r} in {record.source}, record {record.index}")
    if not found:
        return None
    return (
        f"{len(found):,} of {len(records):,} records have turn markers in their texts. The first "
        f"is {found[0]}. These records seem to be rendered already, and the model would learn the "
        "markers as plain text: use the original messages, without thoughts"
    )


def prompt_rows(records: Sequence[PreferenceRecord]) -> list[dict[str, Any]]:
    """Returns the prompts for self-training."""
    return [{"prompt": r["prompt"], "context": r["context"]} for r in to_self_judge_rows(records)]


def pair_rows(records: Sequence[PreferenceRecord]) -> list[dict[str, Any]]:
    """Returns the pairs for evaluating self-training. At least one record must have a pair."""
    rows = [r for r in to_self_judge_rows(records) if r["chosen"] and r["rejected"]]
    if not rows:
        raise ValueError(
            "no record in the evaluation data has both a chosen and a rejected response"
        )
    return rows

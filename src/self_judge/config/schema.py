"""Loads typed run configurations from a YAML file, the files it extends, and overrides.

This module defines and validates the keys of a run. It does not depend on torch or the trainers.
`hardware.py` adapts a run to the machine, and `commands/train.py` runs it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf.errors import OmegaConfBaseException

from self_judge.config.older_names import OLD_NAMES, read_older_names
from self_judge.config.self_training import (
    PackingChoice,
    SelfJudgeArgs,
    all_problems,
    require,
    require_at_least,
)
from self_judge.config.trainer_keys import checked_section, library_fields
from self_judge.config.yaml import (
    apply_override,
    built,
    first_line,
    key_lines,
    read_yaml,
    resolve_references,
)
from self_judge.console import masked
from self_judge.errors import ConfigError
from self_judge.prompting.judge_templates import JudgeTemplates

SourceKind = Literal["auto", "hh", "ultrafeedback", "preference"]
RunKind = Literal["jsft", "self_judge"]


@dataclass(frozen=True)
class ModelArgs:
    """The initial model and how to load it.

    Args:
        model_name_or_path: a folder, or a model ID on the Hub.
        dtype: dtype of the weights; `"auto"` keeps the saved dtype.
        attn_implementation: the attention implementation; `None` leaves the choice to Transformers.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether the model's repository may run its own code.
        load_in_4bit: whether to load the base model in 4 bits with bitsandbytes, to train an
            adapter (QLoRA).
        bnb_4bit_quant_type: the 4-bit data type.
        use_bnb_nested_quant: whether to quantize the quantization constants as well.
    """

    model_name_or_path: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = False


@dataclass(frozen=True)
class TemplateArgs:
    """Judge templates and chat templates.

    Args:
        judge: `{principle: {system, user, assistant}}`. With `None`, self-training uses the
            templates saved with the checkpoint.
        decision_rationale: a template for the text after the letter. It contains `{rationale_a}`
            and `{rationale_b}`.
        chat: a Jinja chat template that replaces the tokenizer's own.
        chat_template_kwargs: values for the chat template, such as `{enable_thinking: true}`;
            `strftime_now` is the date for a template that reads the clock.
        user, assistant: turn markers such as `"\\n\\nHuman:"`, used if neither `chat` nor the
            tokenizer provides a chat template.
        skip_first_token: accepted but ignored, because loss masks are built with the token ids.
    """

    judge: dict[str, Any] | None = None
    decision_rationale: str | dict[str, str] | None = None
    chat: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    assistant: str | None = None
    skip_first_token: bool | None = None

    @all_problems()
    def __post_init__(self) -> None:
        require(
            (self.user is None) == (self.assistant is None),
            "user and assistant are a pair of turn markers: set both or neither",
        )
        require(
            self.judge is not None or self.decision_rationale is None,
            "decision_rationale is set but judge is not: set both, or neither",
        )
        self.judge_templates()

    def judge_templates(self) -> JudgeTemplates | None:
        """Returns the judge templates, or `None` to use those saved with the checkpoint."""
        if self.judge is None:
            return None
        return JudgeTemplates(self.judge, self.decision_rationale)


@dataclass(frozen=True)
class Source:
    """One source of preference data.

    Args:
        path: a dataset ID on the Hub, a local file (.json, .jsonl, .csv, .tsv, .parquet) or folder.
        data_dir, name, split, revision: as in `datasets.load_dataset`.
        kind: the data format; `"auto"` detects it from the columns.
        sft: whether to train on the chosen responses as demonstrations.
        pairs: whether to train the judge on the pairs.
        columns: the data's own column names, such as `{prompt: question}`.
    """

    path: str
    split: str = "train"
    data_dir: str | None = None
    name: str | None = None
    revision: str | None = None
    kind: SourceKind = "auto"
    sft: bool = True
    pairs: bool = True
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.sft or self.pairs,
            "sft and pairs are both false: this source would not be used; remove it",
        )


@dataclass(frozen=True)
class DatasetArgs:
    """Training and evaluation data.

    Args:
        sources: training sources, read in this order.
        held_out: fraction of the prompts held out from training for evaluation, in [0, 1). It is
            ignored if `eval` is set.
        eval: evaluation sources.
        max_records, max_eval_records: maximum number of records per source (`None`: all).
        principles: whether to use one pair per principle instead of one general pair (only for
            UltraFeedback).
        rationales: whether to train on the rationales too. With `None`, they are used if
            `templates.decision_rationale` is set.
        seed: seed for sampling pairs. Held-out prompts are chosen only by their text, so JSFT and
            self-training hold out the same prompts.
        num_proc: number of processes for loading Hub datasets and encoding JSFT examples (`None`:
            only this process).
    """

    sources: list[Source]
    held_out: float = 0.1
    eval: list[Source] = field(default_factory=list)
    max_records: int | None = None
    max_eval_records: int | None = None
    principles: bool = False
    rationales: bool | None = None
    seed: int = 42
    num_proc: int | None = None

    @all_problems()
    def __post_init__(self) -> None:
        require(bool(self.sources), "sources is empty: name at least one source")
        require(0 <= self.held_out < 1, f"held_out must be in [0, 1), got {self.held_out}")
        require_at_least(self, unset=True, max_records=1, max_eval_records=1, num_proc=1)


@dataclass(frozen=True)
class JSFTArgs:
    """Settings for judge-augmented supervised fine-tuning.

    Args:
        max_length: maximum number of tokens per training example.
        ignore_index: the label of tokens that the loss ignores.
        global_batch_size: number of examples per optimizer step over all processes. It determines
            the accumulation steps (see `accumulation_steps`). With `None`, `training_args`
            determines them.
        group_by_length: whether to group an optimizer step's examples into micro-batches of similar
            length, which reduces padding. This is useful only with `packing: off`, because packing
            sorts by length itself.
        packing: how sequences share prefixes (see `Packing`): `auto`, `tree`, `cache`, `padding`,
            or `off`.
        merge_adapter: whether to merge the adapter into the weights after LoRA training and save a
            plain model. Otherwise, only the adapter is saved.
        max_skipped_steps: stop after this number of consecutive steps without a finite gradient.
        judge_accuracy: whether to measure the judge's accuracy on held-out pairs before and after
            training, with at most 200 pairs and about 5% of the run's time.
    """

    max_length: int = 2048
    ignore_index: int = -100
    global_batch_size: int | None = 128
    group_by_length: bool = False
    packing: PackingChoice = "auto"
    merge_adapter: bool = False
    max_skipped_steps: int = 3
    judge_accuracy: bool = True

    @all_problems()
    def __post_init__(self) -> None:
        require_at_least(self, max_length=2, max_skipped_steps=1)
        require_at_least(self, unset=True, global_batch_size=1)


@dataclass(frozen=True)
class _Run:
    model: ModelArgs
    dataset: DatasetArgs
    training_args: dict[str, Any] = field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    templates: TemplateArgs = field(default_factory=TemplateArgs)


@dataclass(frozen=True)
class JSFTRun(_Run):
    """The validated contents of the YAML file for a judge-augmented SFT run.

    `training_args` is for `trl.SFTConfig` and `peft_config` is for `peft.LoraConfig`.
    `check_training_args` validates their keys after these classes are imported.
    """

    jsft_args: JSFTArgs = field(default_factory=JSFTArgs)

    @all_problems()
    def __post_init__(self) -> None:
        _check_sections(self, self.jsft_args, "jsft_args")
        require(self.templates.judge is not None, "templates.judge is missing: JSFT requires it")
        require(
            not self.dataset.rationales or self.templates.decision_rationale is not None,
            "dataset.rationales is true but templates.decision_rationale is not set",
        )
        require(
            not self.dataset.rationales or self.dataset.principles,
            "dataset.rationales is true but dataset.principles is false: each rationale belongs to "
            "a principle",
        )

    @property
    def uses_rationales(self) -> bool:
        """Whether judge examples end with the rationales."""
        if self.dataset.rationales is None:
            return self.templates.decision_rationale is not None
        return self.dataset.rationales


@dataclass(frozen=True)
class SelfJudgeRun(_Run):
    """The validated contents of the YAML file for a self-training run.

    `training_args` is for `SelfJudgeConfig` and `peft_config` is for `peft.LoraConfig`.
    """

    self_judge_args: SelfJudgeArgs = field(default_factory=SelfJudgeArgs)

    @all_problems()
    def __post_init__(self) -> None:
        _check_sections(self, self.self_judge_args, "self_judge_args")


_RUNS: dict[str, type[_Run]] = {"jsft": JSFTRun, "self_judge": SelfJudgeRun}
_STARTED_BY = {
    "jsft_args": "train_jsft.py or `self-judge jsft`",
    "self_judge_args": "train_self_judge.py or `self-judge train`",
}

JSFT_FIRST = (
    "run JSFT first (self-judge jsft CONFIG) and start from its output_dir, or set templates.judge"
)


def kind_of_run(path: str | Path, overrides: Sequence[str] = ()) -> RunKind:
    """Returns the kind of run: a run file has either `jsft_args` or `self_judge_args`.

    Raises:
        ConfigError: the file cannot be read, or it contains both sections or neither of them.
    """
    return _kind_of(_tree(path, overrides, lambda line: None), path)


def _kind_of(tree: Mapping[str, Any], path: str | Path) -> RunKind:
    kinds: list[RunKind] = [k for k in typing.get_args(RunKind) if f"{k}_args" in tree]
    if len(kinds) != 1:
        found = "both jsft_args and" if kinds else "neither jsft_args nor"
        raise ConfigError(
            f"{path}: it has {found} self_judge_args: a run file must have exactly one of these "
            "sections"
        )
    return kinds[0]


@typing.overload
def load_run(
    path: str | Path,
    overrides: Sequence[str],
    kind: Literal["jsft"],
    say: Callable[[str], None] = ...,
) -> JSFTRun: ...
@typing.overload
def load_run(
    path: str | Path,
    overrides: Sequence[str],
    kind: Literal["self_judge"],
    say: Callable[[str], None] = ...,
) -> SelfJudgeRun: ...
def load_run(
    path: str | Path,
    overrides: Sequence[str],
    kind: RunKind,
    say: Callable[[str], None] = lambda line: None,
) -> JSFTRun | SelfJudgeRun:
    """Loads a run file, the files it extends, and the overrides, and validates the result.

    Args:
        path: a YAML file. Its key `extends` names one or more YAML files that are loaded first,
            with paths relative to this file. The file's own keys override the keys in these files.
        overrides: `key.path=value` strings, with the value as YAML. A list item is addressed by its
            index (`dataset.sources.0.path=data.jsonl`).
        kind: the expected kind of run.
        say: gets a line for each key of the method's original run files that has a new name.

    Raises:
        ConfigError: the file cannot be read, keys are unknown (the message suggests the closest
            key), or values are invalid or have the wrong type. Each argument of the error is one
            problem, with its line in the file.
    """
    where = str(path)
    tree = _tree(path, overrides, say)
    for section, command in _STARTED_BY.items():
        if section in tree and not section.startswith(kind):
            raise ConfigError(f"{where}: it has {section}, so it is a file for {command}")
    try:
        # Template text is literal, so "${" in a template does not start a reference.
        templates = tree.pop("templates", None)
        tree = resolve_references(tree)
        if templates is not None:
            tree["templates"] = templates
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error
    masked(tree)  # from here on, the values of secret settings are masked in all output
    problems = list(_not_finite(tree, ""))
    problems += _library_problems(tree, kind)
    run: JSFTRun | SelfJudgeRun = built(_RUNS[kind], tree, "", problems)
    if problems:
        lines = key_lines(path)
        raise ConfigError(*_located(problems, where, overrides, lines))
    _kind_of(tree, path)
    return run


def _tree(path: str | Path, overrides: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the contents of a run file with its overrides, in the keys of this package."""
    tree = read_yaml(path)
    problems: list[str] = []
    try:
        read_older_names(tree, say)
    except ConfigError as error:
        lines = key_lines(path)
        raise ConfigError(*_located(error.args, str(path), (), lines)) from error
    for override in overrides:
        try:
            apply_override(tree, override)
            read_older_names(tree, say, overridden=True)
        except ConfigError as error:
            problems += error.args
    if problems:
        raise ConfigError(*problems)
    return tree


def _located(
    problems: Iterable[str], where: str, overrides: Sequence[str], lines: Mapping[str, str]
) -> list[str]:
    """Returns problems with the overrides that they are about, or with their lines in a file."""
    located: dict[str, float] = {}  # with their order
    order = {place: n for n, place in enumerate(lines.values())}
    for text in problems:
        named = [o for o in overrides if text.startswith(o.partition("=")[0])]
        blamed = named or [o for o in overrides if _last_key(o) in text]
        if blamed:
            shown = [f"'{o if len(o) <= 80 else o[:79] + '…'}'" for o in blamed]
            located[f"{where} (with {', '.join(shown)}): {text}"] = math.inf
            continue
        words = re.findall(r"[\w.-]*\w", text)
        start = words[0] if words else ""
        keys = [*(f"{start}.{word}" for word in words), start, start.rpartition(".")[0]]
        places = (lines.get(key) or lines.get(OLD_NAMES.get(key, "")) for key in keys)
        place = next(filter(None, places), where)
        located[f"{place}: {text}"] = order.get(place, math.inf)
    return sorted(located, key=located.__getitem__)


def _library_problems(tree: Mapping[str, Any], kind: RunKind) -> Iterator[str]:
    """Yields the problems of the sections that TRL's and PEFT's classes define."""
    args: type = JSFTArgs if kind == "jsft" else SelfJudgeArgs
    own = dict.fromkeys((f.name for f in dataclasses.fields(args)), Any)
    for section, name in (
        ("training_args", "SFTConfig" if kind == "jsft" else "DPOConfig"),
        ("peft_config", "LoraConfig"),
    ):
        values, fields = tree.get(section), library_fields(name)
        if isinstance(values, dict) and fields is not None:
            hints = {key: field.type for key, field in fields.items()}
            yield from checked_section(values, {**hints, **own}, section)[1]
    # To avoid conflicts, each key may be in only one section.
    values = tree.get("training_args")
    for key in values if isinstance(values, dict) else ():
        if key in own:
            yield f"training_args.{key}: set {kind}_args.{key} instead"


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} is {value}: give a finite number"
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, own in items:
        yield from _not_finite(own, f"{where}.{key}" if where else str(key))


def _last_key(override: str) -> str:
    return override.partition("=")[0].rpartition(".")[2]


def _check_sections(run: _Run, own: JSFTArgs | SelfJudgeArgs, section: str) -> None:
    """Checks settings across sections."""
    require(
        not run.model.load_in_4bit or run.peft_config is not None,
        "model.load_in_4bit is true but peft_config is not set: 4-bit weights cannot be trained "
        "without an adapter",
    )
    require(
        own.global_batch_size is None or "gradient_accumulation_steps" not in run.training_args,
        "training_args.gradient_accumulation_steps is computed from "
        f"{section}.global_batch_size: unset one of them ({section}.global_batch_size=null)",
    )

"""SelfJudgeConfig extends TRL's DPOConfig with the settings for sampling and judging.

The class contains and validates values. It does not load models or data.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig

from self_judge.config.self_training import SelfTrainingSettings, all_problems, require
from self_judge.config.yaml import unknown_key
from self_judge.console import masked
from self_judge.models import clamp_to_context
from self_judge.training.arguments import check_args


@dataclass
class SelfJudgeConfig(SelfTrainingSettings, DPOConfig):
    """TRL's `DPOConfig` with settings for sampling and judging (see `SelfTrainingSettings`).

    Raises:
        ValueError: values conflict with each other, the method or the machine.
        TypeError: a setting is unknown. The message suggests a name.
    """

    def __new__(cls, *args: Any, **settings: Any) -> SelfJudgeConfig:
        names = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise TypeError(f"{cls.__name__}: {unknown_key(name, names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        if self.bf16 is None:  # TRL's default is bf16 even on machines that do not support it
            cuda = torch.cuda.is_available()
            self.bf16 = not self.fp16 and cuda and torch.cuda.is_bf16_supported()
        super().__post_init__()
        self.check()

    @all_problems()
    def check(self) -> None:
        """Raises `ValueError` if values conflict with each other, the method or the machine."""
        super().check()
        self.check_losses(self.loss_type)
        require(
            not self.precompute_ref_log_probs,
            "precompute_ref_log_probs must be False: responses are sampled during training",
        )
        require(
            not self.push_pairs or (self.push_to_hub and self.save_rollouts),
            "push_pairs requires push_to_hub and save_rollouts",
        )
        require(
            not self.sync_ref_model,
            "sync_ref_model must be False: the judge is the frozen reference",
        )
        require(
            self.truncation_mode == "keep_start",
            "truncation_mode must be keep_start: responses are never truncated, and long dialogues "
            "lose their oldest turns",
        )
        require(
            self.train_sampling_strategy in ("random", "sequential"),
            f"train_sampling_strategy must be random or sequential, got "
            f"{self.train_sampling_strategy}: responses are sampled during training, so their "
            "lengths are not known before",
        )
        require(
            not self.label_smoothing_factor,
            "label_smoothing_factor must be 0: set label_smoothing, which DPO uses",
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings for run.json and experiment trackers, with secrets masked."""
        values: dict[str, Any] = masked(super().to_dict())
        return values

    def _check_vllm(self) -> None:
        super()._check_vllm()
        require(
            not (self.use_vllm and self.vllm_enable_sleep_mode) or torch.cuda.is_available(),
            "vllm_enable_sleep_mode needs a GPU: vLLM has no sleep mode on a CPU",
        )


def as_self_judge_config(
    args: SelfJudgeConfig | TrainingArguments | None, model_name: str
) -> SelfJudgeConfig:
    """Returns `args` as a `SelfJudgeConfig`, with the method's defaults for missing settings."""
    check_args(args, SelfJudgeConfig, DPOConfig)
    if isinstance(args, SelfJudgeConfig):
        return args
    if args is None:
        return SelfJudgeConfig(f"{model_name.rstrip('/').split('/')[-1] or 'model'}-self-judge")
    values = args.to_dict()
    values["hub_token"] = args.hub_token  # masked by `to_dict`
    names = {f.name for f in dataclasses.fields(SelfJudgeConfig) if f.init}
    return SelfJudgeConfig(**{key: value for key, value in values.items() if key in names})


def with_values(args: SelfJudgeConfig, **values: Any) -> SelfJudgeConfig:
    """Returns a validated copy with the given values; `None` leaves a setting unchanged."""
    changed = copy.copy(args)
    for key, value in values.items():
        if value is not None:
            setattr(changed, key, value)
    changed.check()
    return changed


def hub_options(config: SelfJudgeConfig) -> dict[str, Any]:
    """Returns the options for loading the files of a model that is passed by name."""
    loading: Any = config.model_init_kwargs or {}
    return {
        "revision": loading.get("revision"),
        "trust_remote_code": bool(getattr(config, "trust_remote_code", False)),
    }


def for_model(config: SelfJudgeConfig, model: Any) -> SelfJudgeConfig:
    """Limits `max_length` to the model's context length, and adapts the data loaders."""
    accelerate: Any = config.accelerator_config
    accelerate.dispatch_batches = False  # it cannot split the lists of a batch among processes
    return with_values(config, max_length=clamp_to_context(model.config, config.max_length))

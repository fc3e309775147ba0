"""SelfJudgeConfig: TRL's DPOConfig with the settings of sampling and judging.

Values and their invariants only; it loads no model and touches no data.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from transformers import TrainingArguments
from trl import DPOConfig

from self_judge.config.schema import LOSS_TYPES, PackingChoice, VLLMMode
from self_judge.config.yaml import unknown_key
from self_judge.inference.sampling import SamplingSettings
from self_judge.packing.packing import check_choice
from self_judge.training.self_training.rollouts import PairSelection


@dataclass
class SelfJudgeConfig(DPOConfig):
    """TRL's `DPOConfig` with the settings of sampling and judging.

    Raises:
        ValueError: values that contradict each other or the method.
    """

    num_generations: int = field(
        default=2, metadata={"help": "Responses sampled per prompt, at least 2 (K)."}
    )
    rollouts_per_update: int = field(
        default=1,
        metadata={
            "help": "Pairs learned from per prompt and step, each of num_generations own samples."
        },
    )
    pair_selection: PairSelection = field(
        default="best_worst",
        metadata={
            "help": "Which two of K > 2 responses to learn from.",
            "choices": ["best_worst", "best_random"],
        },
    )
    max_new_tokens: int = field(default=768, metadata={"help": "Tokens of a response at most."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature, above 0."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling; 1.0 is off."})
    top_k: int = field(default=0, metadata={"help": "Top-k sampling; 0 is off."})
    min_p: float = field(default=0.0, metadata={"help": "Min-p sampling; 0.0 is off."})
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Penalty on tokens that have come before; 1.0 is off."}
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Responses sampled together on one device at most."}
    )
    generation_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in their KV cache at most, prompts and responses together; unset: by "
            "the bytes they take of the device's memory."
        },
    )
    judge_batch_size: int = field(
        default=8,
        metadata={
            "help": "Judge prompts per forward pass on one device where prompts are not packed; "
            "twice as many where processes share the model. Packed passes go by tokens."
        },
    )
    packing: PackingChoice = field(
        default="auto",
        metadata={
            "help": "How sequences share prefixes in judging and in the update: auto takes tree "
            "masks, a KV cache or sorted padding, whichever is exact for the model; off packs "
            "nothing.",
            "choices": list(get_args(PackingChoice)),
        },
    )
    max_length: int | None = field(
        default=2048,
        metadata={"help": "Tokens of prompt + response, and of a judge prompt, at most."},
    )
    average_log_prob: bool | None = field(
        default=None,
        metadata={
            "help": "Average log-probabilities over a response's tokens (True) or sum them "
            "(False). Unset: as TRL's loss has it (sigmoid and hinge sum, ipo averages; the ipo "
            "of the original method sums)."
        },
    )
    ignore_index: int = field(
        default=-100, metadata={"help": "Label of positions without loss; only -100 is possible."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print sampled pairs with their verdicts when logging."}
    )
    save_rollouts: bool = field(
        default=True,
        metadata={"help": "Write pairs and verdicts under output_dir/rollouts, a file a step."},
    )
    rollout_files: int | None = field(
        default=200,
        metadata={
            "help": "Keep the files of at most so many steps, evenly spread, and of the last one."
        },
    )
    rollout_pairs: int | None = field(
        default=64, metadata={"help": "Keep at most so many pairs of a step."}
    )
    max_skipped_steps: int = field(
        default=3,
        metadata={
            "help": "Stop after so many steps in a row that give nothing to learn from: no finite "
            "gradient, or no finite verdict."
        },
    )

    use_vllm: bool = field(
        default=False, metadata={"help": "Sample with vLLM, and with LoRA judge there too."}
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "An engine in every training process (colocate), or servers that run "
            "elsewhere (server).",
            "choices": list(get_args(VLLMMode)),
        },
    )
    vllm_server_base_url: list[str] | None = field(
        default=None,
        metadata={"help": "URL of the server, or of several replicas (http://host:port)."},
    )
    rollouts_ahead: bool = field(
        default=False,
        metadata={
            "help": "Have servers sample for the next step while this one updates, one step "
            "off-policy and uncorrected (vllm_mode=server)."
        },
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the servers to be up."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "The colocated engine's share of all of the GPU's memory."}
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "Tokens the colocated engine holds of a sequence; max_length if unset."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "The colocated engine frees the GPU's memory during updates."},
    )
    vllm_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that training and servers both see, through which adapters and "
            "weights are handed over; unset: in this machine's memory."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.vllm_server_base_url, str):
            self.vllm_server_base_url = [self.vllm_server_base_url]
        if self.bf16 is None:  # TRL asks for it everywhere, also where it cannot be had
            cuda = torch.cuda.is_available()
            self.bf16 = not self.fp16 and cuda and torch.cuda.is_bf16_supported()
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raises `ValueError` on values that contradict each other or the method."""
        self.sampling()  # checks the sampling settings
        if self.temperature == 0:
            raise ValueError(
                "temperature must be above 0: without chance all samples of a prompt are the same"
            )
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, got {self.num_generations}")
        if self.pair_selection not in ("best_worst", "best_random"):
            raise ValueError(
                f"pair_selection must be best_worst or best_random, got {self.pair_selection!r}"
            )
        check_choice(self.packing)
        for name in (
            "rollouts_per_update",
            "judge_batch_size",
            "generation_batch_size",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("generation_batch_tokens", "rollout_files", "rollout_pairs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}")
        if self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"max_new_tokens ({self.max_new_tokens}) must be below max_length "
                f"({self.max_length}): otherwise no token is left for the prompt"
            )
        self._check_vllm()
        if self.ignore_index != -100:
            raise ValueError(
                f"ignore_index={self.ignore_index}: TRL's losses mark positions without loss with "
                "-100; leave it out"
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs=True is impossible: the responses do not exist yet"
            )
        if self.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True contradicts the method: the judge is the frozen reference"
            )
        for loss in self.loss_type:
            if loss not in LOSS_TYPES:
                raise ValueError(f"loss_type {unknown_key(loss, LOSS_TYPES)}")
        if self.average_log_prob is not None:
            unknown = set(self.loss_type) - {"sigmoid", "hinge", "ipo"}
            if unknown or len(self.loss_type) != 1:
                raise ValueError(
                    "average_log_prob is defined for a single loss of sigmoid, hinge and ipo, "
                    f"not for {self.loss_type}: leave it unset"
                )

    def _check_vllm(self) -> None:
        if self.vllm_mode not in get_args(VLLMMode):
            raise ValueError(f"vllm_mode must be colocate or server, got {self.vllm_mode!r}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                "vllm_gpu_memory_utilization must be in (0, 1], got "
                f"{self.vllm_gpu_memory_utilization}"
            )
        if self.rollouts_ahead and not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                "rollouts_ahead needs use_vllm with vllm_mode=server: only servers can sample "
                "while this process updates"
            )
        if not self.use_vllm:
            return
        if self.vllm_mode == "server" and not self.vllm_server_base_url:
            raise ValueError(
                "vllm_mode=server needs vllm_server_base_url: the URL of a `vllm serve`, or a list"
            )
        if self.vllm_enable_sleep_mode and not torch.cuda.is_available():
            raise ValueError("vllm_enable_sleep_mode needs a GPU: vLLM does not sleep on a CPU")
        least = self.max_length or self.max_new_tokens + 1
        if self.vllm_max_model_length is not None and self.vllm_max_model_length < least:
            raise ValueError(
                f"vllm_max_model_length ({self.vllm_max_model_length}) must be at least max_length "
                f"({least})"
            )

    def sampling(self) -> SamplingSettings:
        """The sampler's part of the settings."""
        return SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def as_self_judge_config(
    args: SelfJudgeConfig | TrainingArguments | None, model_name: str
) -> SelfJudgeConfig:
    """The settings as they are, or a plain `TrainingArguments` with the method's defaults."""
    if isinstance(args, SelfJudgeConfig):
        return args
    if args is None:
        return SelfJudgeConfig(f"{model_name.rstrip('/').split('/')[-1] or 'model'}-self-judge")
    values = args.to_dict()
    values["hub_token"] = args.hub_token  # hidden by to_dict
    names = {f.name for f in dataclasses.fields(SelfJudgeConfig) if f.init}
    return SelfJudgeConfig(**{key: value for key, value in values.items() if key in names})


def with_values(args: SelfJudgeConfig, values: Mapping[str, Any]) -> SelfJudgeConfig:
    """A copy with some values set otherwise, checked again."""
    if not values:
        return args
    changed = copy.copy(args)
    for key, value in values.items():
        setattr(changed, key, value)
    changed.check()
    return changed

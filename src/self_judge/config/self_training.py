"""Declares and validates the settings for sampling, judges and self-training.

`SelfJudgeArgs` (a run file's `self_judge_args`) and the trainer's `SelfJudgeConfig` inherit from
`SelfTrainingSettings`. This module does not import torch or TRL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from self_judge.config.yaml import unknown_key
from self_judge.errors import ConfigError

PackingChoice = Literal["auto", "tree", "cache", "padding", "off"]
PairSelection = Literal["best_worst", "best_random"]
VLLMMode = Literal["colocate", "server"]

# The pairwise losses in TRL 1.16's DPOTrainer.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


_problems: ContextVar[list[str] | None] = ContextVar("_problems", default=None)


@contextmanager
def all_problems() -> Iterator[None]:
    """Collects the errors of `require` in a block or function, and raises them as one."""
    if _problems.get() is not None:  # an outer block collects
        yield
        return
    found: list[str] = []
    token = _problems.set(found)
    try:
        yield
    except ValueError as error:  # such as a template error
        found += map(str, error.args)
    finally:
        _problems.reset(token)
    if found:
        raise ConfigError(*found)


def require(holds: bool, message: str) -> None:
    """Raises `ConfigError` with `message` if the condition is false.

    Under `all_problems`, the error is raised at the end.
    """
    if holds:
        return
    found = _problems.get()
    if found is None:
        raise ConfigError(message)
    found.append(message)


def require_at_least(settings: Any, *, unset: bool = False, **least: int) -> None:
    """Raises `ConfigError` if a named value is below its minimum.

    Args:
        unset: whether the values may be `None`.
    """
    for name, minimum in least.items():
        value = getattr(settings, name)
        holds = unset if value is None else value >= minimum
        require(holds, f"{name} must be at least {minimum}, got {value}")


def require_choice(name: str, value: object, choices: Any) -> None:
    """Raises `ConfigError` if the value is not one of the choices of a `Literal`."""
    known = get_args(choices)
    require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Sampling parameters, which replace the model's generation config.

    Attributes:
        max_new_tokens: maximum number of tokens per response.
        temperature: sampling temperature; 0 means greedy decoding.
        top_p, top_k, min_p: the values 1.0, 0 and 0.0 disable these filters.
        repetition_penalty: the value 1.0 disables the penalty.

    Raises:
        ValueError: a value is out of range.
    """

    max_new_tokens: int = 768
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @all_problems()
    def __post_init__(self) -> None:
        require_at_least(self, max_new_tokens=1, top_k=0)
        require(
            0 <= self.temperature < math.inf,
            f"temperature must be 0 or a positive number, got {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        require(0 <= self.min_p < 1, f"min_p must be in [0, 1), got {self.min_p}")
        require(
            self.repetition_penalty > 0,
            f"repetition_penalty must be above 0, got {self.repetition_penalty}",
        )


def _field(default: Any, help: str, choices: Any = None) -> Any:
    """Returns a dataclass field with the help text that `HfArgumentParser` shows."""
    more = {} if choices is None else {"choices": list(get_args(choices))}
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class JudgeMember:
    """One judge: a model in this process, on vLLM servers or at an endpoint.

    Args:
        model: a folder or a model ID on the Hub; with `endpoint`, the name of the model there.
        templates: a YAML file with a `templates` section, or the name of a shipped file. By
            default, the model's `judge.json`, or else the templates of the run.
        server: the URLs of `vllm serve` replicas of the model.
        endpoint: the URL of an OpenAI-compatible endpoint that returns `top_logprobs`, such as
            `https://host/v1`.
        api_key_env: the environment variable with the endpoint's key. Without it, no key is sent.
        timeout: maximum number of seconds until an answer is complete (`null`: 120 for an endpoint,
            3600 for a server).
        answer_after_thought: whether the judge thinks before it names a letter.
        thought_tokens: maximum number of tokens in a thought.
        dtype: dtype of the weights in this process.
        revision: revision of a model on the Hub.
        trust_remote_code: whether the model's repository may run its own code.
    """

    model: str | None = None
    templates: str | None = None
    server: str | list[str] | None = None
    endpoint: str | None = None
    api_key_env: str | None = None
    timeout: float | None = None
    answer_after_thought: bool = False
    thought_tokens: int = 512
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    @all_problems()
    def __post_init__(self) -> None:
        require_at_least(self, thought_tokens=1)
        require(
            self.timeout is None or self.timeout > 0,
            f"timeout must be above 0 seconds, got {self.timeout}",
        )
        require(
            self.endpoint is None or not self.server,
            "endpoint and server are two places for one judge: set one of them, or a panel",
        )
        require(
            not self.server or bool(self.model),
            "server needs model: the folder or model ID that `vllm serve` runs, for its tokenizer",
        )
        require(
            self.api_key_env is None or self.endpoint is not None,
            "api_key_env is set, but endpoint is not: only an endpoint gets a key",
        )
        require(
            self.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env) is not None,
            "api_key_env is the name of an environment variable, such as OPENAI_API_KEY, and not "
            "the key itself",
        )

    @property
    def is_initial(self) -> bool:
        """Whether no judge is named, so that the frozen initial model judges."""
        return not (self.model or self.server or self.endpoint)

    @property
    def servers(self) -> list[str]:
        return [self.server] if isinstance(self.server, str) else list(self.server or ())


@dataclass(frozen=True)
class JudgeArgs(JudgeMember):
    """The judge of a run or a command: one judge, or a panel of several.

    Args:
        panel: the members of a panel, which vote as principles do. A member `{}` is the frozen
            initial model.
    """

    panel: list[JudgeMember] = field(default_factory=list)

    @all_problems()
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.panel:
            return
        require(len(self.panel) > 1, "panel has one member: name at least two, or set its keys")
        require(
            self.is_initial,
            "panel and model, server or endpoint are set: name each judge in panel",
        )

    @property
    def needs_initial(self) -> bool:
        """Whether the frozen initial model judges, alone or in the panel."""
        return self.is_initial and (not self.panel or any(m.is_initial for m in self.panel))


@dataclass
class SelfTrainingSettings:
    """Settings for sampling, judging and saving rollouts. The defaults follow the paper."""

    num_generations: int = _field(2, "Number of responses per prompt (K), at least 2.")
    rollouts_per_update: int = _field(
        1, "Training pairs per prompt and step, each from its own num_generations samples."
    )
    pair_selection: PairSelection = _field(
        "best_worst", "Which two of K > 2 responses to train on.", PairSelection
    )
    max_new_tokens: int = _field(768, "Maximum number of tokens per response.")
    temperature: float = _field(1.0, "Sampling temperature, above 0.")
    top_p: float = _field(0.9, "Nucleus sampling; 1.0 disables it.")
    top_k: int = _field(0, "Top-k sampling; 0 disables it.")
    min_p: float = _field(0.0, "Min-p sampling; 0.0 disables it.")
    repetition_penalty: float = _field(1.0, "Penalty on repeated tokens; 1.0 disables it.")
    generation_batch_size: int = _field(64, "Maximum number of responses sampled at once.")
    generation_batch_tokens: int | None = _field(
        None,
        "Maximum number of prompt and response tokens in the KV cache during sampling. If unset, "
        "the limit is chosen to fit the device's memory.",
    )
    judge_batch_size: int = _field(
        8,
        "Number of judge prompts per forward pass on each device without packing, doubled if the "
        "model is sharded across processes. With packing, passes are limited by their tokens.",
    )
    packing: PackingChoice = _field(
        "auto",
        "How sequences share prefixes in judging and in the update. auto uses the first of tree "
        "masks, a KV cache and sorted padding that is exact for the model. off disables packing.",
        PackingChoice,
    )
    max_length: int | None = _field(
        2048, "Maximum number of tokens in a prompt with its response, and in a judge prompt."
    )
    average_log_prob: bool | None = _field(
        None,
        "Average log-probabilities over a response's tokens (True) or sum them (False). If unset, "
        "TRL's convention applies: sigmoid and hinge sum, and ipo averages. In the original "
        "method, ipo sums too.",
    )
    ignore_index: int = _field(-100, "Label of positions that the loss ignores; must be -100.")
    log_completions: bool = _field(False, "Print sampled pairs and their verdicts when logging.")
    save_rollouts: bool = _field(
        True, "Write pairs and verdicts to output_dir/rollouts, one file per step."
    )
    push_pairs: bool = _field(
        False, "With push_to_hub, push the saved pairs as a dataset, with the suffix -pairs."
    )
    rollout_files: int | None = _field(
        200, "Keep the files for at most N evenly spaced steps and for the last step."
    )
    rollout_pairs: int | None = _field(64, "Keep at most N pairs per step.")
    max_skipped_steps: int = _field(
        3,
        "Stop after N consecutive steps that do not update the model, because the gradient is not "
        "finite or no pair can be judged.",
    )

    use_vllm: bool = _field(False, "Use vLLM for sampling and, with LoRA, also for judging.")
    vllm_mode: VLLMMode = _field(
        "colocate",
        "Run an engine in every training process (colocate) or use separate servers (server).",
        VLLMMode,
    )
    vllm_server_base_url: list[str] | None = _field(
        None, "URL of the server, or URLs of several replicas (http://host:port)."
    )
    rollouts_ahead: bool = _field(
        False,
        "Let servers sample for the next step during the update (vllm_mode=server). The samples "
        "are one step off-policy, and the loss does not correct for this.",
    )
    vllm_server_timeout: float = _field(240.0, "Seconds to wait for the servers to start.")
    vllm_gpu_memory_utilization: float = _field(
        0.3, "The colocated engine's fraction of the GPU's total memory."
    )
    vllm_max_model_length: int | None = _field(
        None, "The colocated engine's maximum sequence length. If unset, max_length is used."
    )
    vllm_enable_sleep_mode: bool = _field(
        False, "Free the colocated engine's GPU memory during updates."
    )
    vllm_sync_dir: str | None = _field(
        None,
        "Folder for transferring adapters and weights. Training and servers must both have access "
        "to it. If unset, /dev/shm is used where it exists.",
    )

    @all_problems()
    def check(self) -> None:
        """Raises `ConfigError` for values that conflict with each other or with the method."""
        self.sampling()  # validates the sampling settings
        require(
            self.temperature > 0,
            f"temperature must be above 0, got {self.temperature}: all greedy samples for a prompt "
            "are the same",
        )
        require_at_least(
            self,
            num_generations=2,
            rollouts_per_update=1,
            judge_batch_size=1,
            generation_batch_size=1,
            max_skipped_steps=1,
        )
        require_at_least(
            self, unset=True, generation_batch_tokens=1, rollout_files=1, rollout_pairs=1
        )
        require_choice("pair_selection", self.pair_selection, PairSelection)
        require_choice("packing", self.packing, PackingChoice)
        require_choice("vllm_mode", self.vllm_mode, VLLMMode)
        require(
            self.max_length is None or self.max_new_tokens < self.max_length,
            f"max_new_tokens ({self.max_new_tokens}) must be below max_length ({self.max_length}), "
            "which limits the prompt and response together",
        )
        require(
            self.ignore_index == -100,
            f"ignore_index must be -100, the label that TRL's losses skip, got {self.ignore_index}",
        )
        self._check_vllm()

    def _check_vllm(self) -> None:
        require(
            0 < self.vllm_gpu_memory_utilization <= 1,
            f"vllm_gpu_memory_utilization must be in (0, 1], got "
            f"{self.vllm_gpu_memory_utilization}",
        )
        servers = self.use_vllm and self.vllm_mode == "server"
        require(
            servers or not self.rollouts_ahead,
            "rollouts_ahead needs use_vllm with vllm_mode=server: only servers can sample "
            "during the update",
        )
        require(
            not servers or bool(self.vllm_server_base_url),
            "vllm_mode=server needs vllm_server_base_url: one or more `vllm serve` URLs",
        )
        least = self.max_length or self.max_new_tokens + 1
        require(
            not self.use_vllm
            or self.vllm_max_model_length is None
            or self.vllm_max_model_length >= least,
            f"vllm_max_model_length ({self.vllm_max_model_length}) must be at least max_length "
            f"({least})",
        )

    def check_losses(self, losses: Sequence[str]) -> None:
        """Raises `ConfigError` if a loss is unknown or incompatible with `average_log_prob`."""
        require(bool(losses), "loss_type is an empty list")
        for loss in losses:
            require(loss in LOSS_TYPES, f"loss_type {unknown_key(loss, LOSS_TYPES)}")
        require(
            self.average_log_prob is None
            or (len(losses) == 1 and losses[0] in ("sigmoid", "hinge", "ipo")),
            "average_log_prob requires sigmoid, hinge or ipo alone, got "
            f"{', '.join(losses)}: leave it unset",
        )

    def sampling(self) -> SamplingSettings:
        """Returns the sampling parameters in these settings."""
        return SamplingSettings(**{f.name: getattr(self, f.name) for f in fields(SamplingSettings)})


@dataclass
class SelfJudgeArgs(SelfTrainingSettings):
    """The `self_judge_args` section of a run file, for on-policy self-training by self-judgment.

    Args:
        token_id_a, token_id_b: token ids of the letters A and B. By default, they are derived from
            the tokenizer. If set, they are checked against the tokenizer.
        loss_type: one of TRL's pairwise losses, or a list of them.
        beta: how strongly the policy is kept close to the reference.
        disable_dropout: whether to disable dropout in the policy and the reference.
        global_batch_size: number of prompts per optimizer step over all processes. It determines
            the accumulation steps. With `None`, `training_args` determines them.
        judge_accuracy: as in `JSFTArgs`, for the judge before and the policy after training.
        judge: who judges the sampled pairs; default: the frozen initial model. The reference of the
            loss is the initial model in any case.

    Raises:
        ConfigError: values conflict with each other or with the method.
    """

    token_id_a: int | None = None
    token_id_b: int | None = None
    max_length: int = 2048
    loss_type: str | list[str] = "sigmoid"
    beta: float = 0.1
    disable_dropout: bool = True
    global_batch_size: int | None = 64
    judge_accuracy: bool = False
    judge: JudgeArgs | None = None
    vllm_server_base_url: str | list[str] | None = None  # type: ignore[assignment]

    @all_problems()
    def __post_init__(self) -> None:
        require_at_least(self, unset=True, token_id_a=0, token_id_b=0, global_batch_size=1)
        require(
            self.token_id_a is None or self.token_id_a != self.token_id_b,
            f"token_id_a and token_id_b are the same token ({self.token_id_a})",
        )
        require(self.beta > 0, f"beta must be above 0, got {self.beta}")
        self.check()
        self.check_losses([self.loss_type] if isinstance(self.loss_type, str) else self.loss_type)

"""Declares the settings of judges: who judges, and with which templates.

Run files have them as `self_judge_args.judge`, and commands as `--judge`. This module does not load
or ask judges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from self_judge.config.self_training import all_problems, require, require_at_least


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

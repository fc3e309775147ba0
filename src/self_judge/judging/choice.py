"""JudgeChoice and `resolve_judge`: who judges, by settings, and what identifies this judge.

All judges are made here: models in this process, on vLLM servers and at endpoints, and panels. This
module does not depend on the data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from self_judge.adapters import fingerprint, short_hash
from self_judge.config.schema import TemplateArgs
from self_judge.config.self_training import JudgeArgs, JudgeMember, PackingChoice
from self_judge.config.yaml import build, read_yaml
from self_judge.console import masked
from self_judge.errors import ConfigError, is_judge_file
from self_judge.inference.remote.endpoint import EndpointScorer
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import Engine, VLLMScorer
from self_judge.judging.judge import Judge
from self_judge.judging.panel import INITIAL, AnyJudge, InitialModel, Panel
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import (
    JudgeSettings,
    encoder_as_taught,
    has_judge_settings,
    resolve_settings,
)
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.template_source import CLOCK

_REMEDY = "pass judge templates with --templates FILE, e.g. --templates instructions"


@dataclass(frozen=True)
class JudgeChoice(JudgeArgs):
    """A judge, or a panel of judges, and the settings for judging.

    Args:
        batch_size, max_length, packing: see `Judge`.
        fallback: the templates of a judge that has none of its own.
    """

    batch_size: int = 8
    max_length: int | None = None
    packing: PackingChoice = "auto"
    fallback: JudgeTemplates | None = None

    def __post_init__(self) -> None:
        # Find mistakes before reading data, sampling responses or loading a model.
        super().__post_init__()
        for option, value in (("--batch-size", self.batch_size), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if self.is_initial and not self.panel:
            return
        for member in self.members.values():
            if member is not None:
                member.judge_templates()

    @classmethod
    def of(cls, judge: str, **settings: Any) -> JudgeChoice:
        """Reads `--judge`: a model, a YAML file with the keys of `JudgeArgs`, or these keys.

        Args:
            judge: such as `outputs/jsft`, `judge.yaml` or `{endpoint: https://host/v1}`.
            settings: the other settings, which the keys override.

        Raises:
            ConfigError: the file or the keys cannot be used.
        """
        inline = judge.lstrip().startswith("{")
        if not inline and not is_judge_file(judge):
            return cls(**{**settings, "model": judge})
        where = "--judge" if inline else judge
        try:
            tree = yaml.safe_load(judge) if inline else read_yaml(judge)
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
        args = build(JudgeArgs, tree, "" if inline else judge)
        if args.is_initial and not args.panel:
            raise ConfigError(f"{where}: it names no judge: set model, endpoint or panel")
        return cls.from_args(args, **settings)

    @classmethod
    def from_args(cls, args: JudgeMember, **settings: Any) -> JudgeChoice:
        """Returns the choice for the keys of a judge; `settings` hold for keys that are not set."""
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
        unset = {f.name: f.default for f in dataclasses.fields(JudgeMember)}
        own = {k: v for k, v in given.items() if k not in unset or v != unset[k]}
        return cls(**{**settings, **own})

    @functools.cached_property
    def members(self) -> dict[str, JudgeChoice | None]:
        """The judges by name; `None` is the initial model. Without a panel, this judge alone."""
        if not self.panel:
            return {self.name: None if self.is_initial else self}
        found: dict[str, JudgeChoice | None] = {}
        common = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("panel", "model", "server", "endpoint", "api_key_env", "revision")
        }
        for member in self.panel:
            choice = JudgeChoice.from_args(member, **common)
            name, count = choice.name, 1
            while name in found:
                count += 1
                name = f"{choice.name}-{count}"
            found[name] = None if choice.is_initial else choice
        return found

    @property
    def name(self) -> str:
        """A short name, as in logs: the folder's or the model's, or the host of an endpoint."""
        if self.is_initial:
            return INITIAL
        named = Path(self.model).name if self.model else None
        return named or str(urlsplit(self.endpoint or "").hostname or "judge")

    @property
    def models(self) -> list[str]:
        """The folders and model IDs of all judges, which an output must not overwrite."""
        own = [m for m in self.members.values() if m is not None]
        return [choice.model for choice in own if choice.model and not choice.endpoint]

    def _template_args(self) -> TemplateArgs | None:
        if self.templates is None:
            return None
        tree = read_yaml(self.templates)
        given = tree.get("templates")
        if not isinstance(given, Mapping) or "judge" not in given:
            raise ConfigError(
                f"{self.templates}: templates.judge is missing; an example is --templates hh"
            )
        try:
            args: TemplateArgs = build(TemplateArgs, given, "templates")
        except ValueError as error:
            raise ConfigError(f"{self.templates}: {error}") from error
        return args

    @functools.cached_property
    def _resolved(self) -> tuple[TemplateArgs | None, JudgeSettings]:
        """Reads the `templates` file if one is given, and the model's `judge.json` if there is one.

        Each file is read only once, so that `settings` and `load` use the same contents.

        Raises:
            ValueError: there are no templates, or they are invalid.
        """
        args = self._template_args()
        given = args.judge_templates() if args else None
        own = None if self.endpoint else self.model
        if given is None and not (own and has_judge_settings(own, self.revision)):
            given = self.fallback
        name = own or self.endpoint
        if name is not None and own is None and given is None:
            raise ValueError(f"{masked(name)} is an endpoint, which has no templates: {_REMEDY}")
        return args, resolve_settings(own, given, revision=self.revision, remedy=_REMEDY)

    def judge_templates(self) -> JudgeTemplates:
        """Returns the templates of this judge, or of the first judge that a panel names."""
        own = next((m for m in self.members.values() if m is not None), self)
        return own._resolved[1].templates

    @property
    def principles(self) -> tuple[str, ...]:
        """The names of the votes; see `Judge.principles` and `Panel.principles`."""
        if not self.panel:
            return self.judge_templates().principles
        each = [(n, m.judge_templates().principles) for n, m in self.members.items() if m]
        return tuple(n if len(own) == 1 else f"{n}/{p}" for n, own in each for p in own)

    @functools.cached_property
    def encoder(self) -> ChatEncoder:
        if self.panel or self.endpoint or not self.model:
            raise ConfigError(
                f"the judge {self.name!r} has no tokenizer here, so it cannot answer prompts: pass "
                "--policy"
            )
        args, settings = self._resolved
        tokenizer = load_tokenizer(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        wanted = (args.chat, args.chat_template_kwargs, (args.user, args.assistant)) if args else ()
        return encoder_as_taught(tokenizer, settings, *wanted)

    def load(self, engine: Engine | None = None) -> AnyJudge:
        """Returns the judge; see `resolve_judge`.

        Raises:
            ValueError: a member of the panel names no judge, which only self-training permits.
        """
        judge = resolve_judge(self, engine)
        if isinstance(judge, InitialModel):
            raise ConfigError("no judge is named: set model, server, endpoint or panel")
        _ = judge.judges  # raises if a member is missing
        return judge

    def settings(self) -> dict[str, Any]:
        """Returns all settings that affect verdicts. They must be the same when a call resumes."""
        if self.panel:
            return {
                "model": "panel of " + ", ".join(self.members),
                "panel": {n: m.settings() if m else {} for n, m in self.members.items()},
                "principles": list(self.principles),
            }
        args, settings = self._resolved
        templates = json.dumps(settings.templates.to_dict(), sort_keys=True)
        wanted = (args.chat, args.user, args.assistant, args.chat_template_kwargs) if args else ()
        chat_template = settings.chat_template
        saved = (chat_template, dict(settings.chat_template_kwargs)) if chat_template else ()
        chat = json.dumps([wanted, saved], sort_keys=True)
        thinks = {"thought_tokens": self.thought_tokens} if self.answer_after_thought else {}
        common = {
            "templates": short_hash(templates.encode(), chat.encode()),
            "principles": list(settings.templates.principles),
            "max_length": self.max_length,
            "dtype": self.dtype,
            **thinks,
        }
        if self.endpoint:
            where = {"model": self.model, "endpoint": masked(self.endpoint), "weights": None}
            return {**where, **common}
        weights = fingerprint(str(self.model), self.revision)
        named = {"model": self.model, "revision": self.revision, "weights": weights}
        return {**named, **common, **date_of(self.encoder)}


def resolve_judge(choice: JudgeChoice, engine: Engine | None = None) -> AnyJudge | InitialModel:
    """Loads a judge onto this process's device, or connects to its servers or its endpoint.

    Args:
        choice: who judges.
        engine: an engine that runs the judge's model instead.

    Returns:
        The judge, a panel, or `InitialModel` if no judge is named.

    Raises:
        ValueError: a model, a server or an endpoint cannot be used, or templates are missing.
    """
    thought = choice.thought_tokens if choice.answer_after_thought else None
    if choice.panel:
        members: dict[str, Judge | InitialModel] = {}
        for (name, own), given in zip(choice.members.items(), choice.panel, strict=True):
            thinks = given.thought_tokens if given.answer_after_thought else thought
            made = InitialModel(thinks) if own is None else resolve_judge(own)
            assert not isinstance(made, Panel)
            members[name] = made
        return Panel(members)
    if choice.is_initial:
        return InitialModel(thought)
    _, settings = choice._resolved
    scorer: Any
    if choice.endpoint:
        scorer = EndpointScorer(
            choice.endpoint,
            choice.model,
            api_key_env=choice.api_key_env,
            timeout=choice.timeout or 120.0,
        )
    elif engine or choice.servers:
        timeout = choice.timeout or 3600.0
        scorer = VLLMScorer(engine or VLLMServers(choice.servers, request_timeout=timeout))
    else:
        scorer = load_model(
            str(choice.model),
            device="auto",
            dtype=choice.dtype,
            revision=choice.revision,
            trust_remote_code=choice.trust_remote_code,
        )
    judge = Judge(
        scorer,
        None if choice.endpoint else choice.encoder,
        settings.templates,
        token_id_a=None if choice.endpoint else settings.token_id_a,
        token_id_b=None if choice.endpoint else settings.token_id_b,
        batch_size=choice.batch_size,
        max_length=choice.max_length,
        packing=choice.packing,
        thought_tokens=thought,
    )
    judge.identity = choice.settings()
    return judge


def date_of(encoder: ChatEncoder) -> dict[str, str]:
    """Returns `{"date": …}`, the fixed date, if the chat template reads the clock, or else `{}`.

    Without a fixed date, a command that resumes on another day would use two different dates.
    """
    kwargs = encoder.chat_template_kwargs
    return {"date": kwargs[CLOCK]} if CLOCK in kwargs else {}

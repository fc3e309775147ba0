"""Loads the judge and sampler for a command, and lists the settings that affect their results.

This module handles templates, checkpoints and servers. It does not depend on the data.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_judge.adapters import adapter_config
from self_judge.config.schema import TemplateArgs
from self_judge.config.self_training import PackingChoice, SamplingSettings
from self_judge.config.yaml import build, read_yaml
from self_judge.data.records import RecordRef
from self_judge.datatypes import Message
from self_judge.errors import ConfigError, EncodingError
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import Engine, VLLMScorer
from self_judge.judging.judge import Judge
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import (
    JUDGE_FILE,
    JudgeSettings,
    encoder_as_taught,
    load_judge_settings,
    resolve_judge,
)
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.template_source import CLOCK
from self_judge.storage.repository import repository_file

# The files that a model is loaded from. Outputs of commands may lie next to them.
_FILES = (
    *("*.safetensors", "*.bin", "*.jinja", "*.model", "*config.json", "*token*.json"),
    *("vocab.json", "*.index.json", "chat_template.json", JUDGE_FILE),
)
_SLICES, _SLICE_BYTES = 64, 65536


@dataclass(frozen=True)
class JudgeChoice:
    """A judge and its settings.

    Args:
        model: a folder or a model ID on the Hub.
        templates: a YAML file with a `templates` section, which overrides the model's `judge.json`.
        batch_size, max_length, packing: see `Judge`.
        dtype, revision, trust_remote_code: see `models.load_model`.
        servers: URLs of `vllm serve` replicas of the model, which judge instead of this process.
    """

    model: str
    templates: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    packing: PackingChoice = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    servers: Sequence[str] = ()

    def __post_init__(self) -> None:
        # Find mistakes before reading data, sampling responses or loading a model.
        for option, value in (("--batch-size", self.batch_size), ("--max-length", self.max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        self.judge_templates()

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
        return args, resolve_judge(
            self.model,
            args.judge_templates() if args else None,
            revision=self.revision,
            remedy="pass judge templates with --templates FILE, e.g. --templates instructions",
        )

    def judge_templates(self) -> JudgeTemplates:
        return self._resolved[1].templates

    @functools.cached_property
    def encoder(self) -> ChatEncoder:
        args, settings = self._resolved
        tokenizer = load_tokenizer(
            self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        wanted = (args.chat, args.chat_template_kwargs, (args.user, args.assistant)) if args else ()
        return encoder_as_taught(tokenizer, settings, *wanted)

    def load(self, engine: Engine | None = None) -> Judge:
        """Loads the judge onto this process's device, or connects to the servers.

        Args:
            engine: an engine that runs the model instead.
        """
        settings = self._resolved[1]
        hub: Any = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if engine is None and self.servers:
            engine = VLLMServers(self.servers)
        scorer: Any = VLLMScorer(engine) if engine else None
        return Judge(
            scorer or load_model(self.model, device="auto", dtype=self.dtype, **hub),
            self.encoder,
            settings.templates,
            token_id_a=settings.token_id_a,
            token_id_b=settings.token_id_b,
            batch_size=self.batch_size,
            max_length=self.max_length,
            packing=self.packing,
        )

    def settings(self) -> dict[str, Any]:
        """Returns all settings that affect verdicts. They must be the same when a call resumes."""
        args, settings = self._resolved
        templates = json.dumps(settings.templates.to_dict(), sort_keys=True)
        wanted = (args.chat, args.user, args.assistant, args.chat_template_kwargs) if args else ()
        chat_template = settings.chat_template
        saved = (chat_template, dict(settings.chat_template_kwargs)) if chat_template else ()
        chat = json.dumps([wanted, saved], sort_keys=True)
        return {
            "model": self.model,
            "revision": self.revision,
            "weights": fingerprint(self.model, self.revision),
            "templates": _hash(templates.encode(), chat.encode()),
            "principles": list(settings.templates.principles),
            "max_length": self.max_length,
            "dtype": self.dtype,
            **date_of(self.encoder),
        }


def date_of(encoder: ChatEncoder) -> dict[str, str]:
    """Returns `{"date": …}`, the fixed date, if the chat template reads the clock, or else `{}`.

    Without a fixed date, a command that resumes on another day would use two different dates.
    """
    kwargs = encoder.chat_template_kwargs
    return {"date": kwargs[CLOCK]} if CLOCK in kwargs else {}


def encoder_of(policy: str) -> ChatEncoder:
    """Returns a policy's encoder, with the chat template that the policy was trained with."""
    return encoder_as_taught(load_tokenizer(policy), load_judge_settings(policy))


def check_prompt(encoder: ChatEncoder, prompt: Sequence[Message], where: RecordRef) -> None:
    """Raises `DataError` if the chat template rejects a prompt, before anything is sampled."""
    try:
        encoder.encode_prompt(prompt)
    except EncodingError as error:
        raise where.error("prompt", str(error)) from None


def load_sampler(
    policy: str, encoder: ChatEncoder, settings: SamplingSettings, batch_size: int = 64
) -> TransformersSampler:
    """Loads a model for sampling; `encoder` is its encoder (see `encoder_of`)."""
    model: Any = load_model(policy, device="auto")
    return TransformersSampler(model, encoder, settings, batch_size)


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """Returns a hash that identifies the weights in a folder, or the commit of a model on the Hub.

    The hash covers each file's name and size, and about 64 evenly spaced slices of its contents.
    Training changes every slice, and reading a large model completely would take minutes.
    """
    folder = Path(model)
    if not folder.is_dir():
        adapter = adapter_config(model, revision)
        file = repository_file(model, "adapter_config.json" if adapter else "config.json", revision)
        if file is None:
            return None
        commit = file.parent.name  # the cache keeps one folder per commit
        base = adapter and fingerprint(str(adapter.base_model_name_or_path), adapter.revision)
        return _hash(commit.encode(), str(base).encode()) if base else commit
    parts: list[bytes] = []
    found = {f for pattern in _FILES for f in folder.glob(pattern)}
    for file in sorted(found - {folder / "training_args.bin"}):
        size = file.stat().st_size
        parts += [file.name.encode(), str(size).encode()]
        step = max(_SLICE_BYTES, size // _SLICES)
        with file.open("rb") as reader:
            for start in range(0, size, step):
                reader.seek(start)
                parts.append(reader.read(_SLICE_BYTES))
    if config := adapter_config(folder):
        base = fingerprint(str(config.base_model_name_or_path), config.revision)
        parts.append(str(base).encode())
    return _hash(*parts)


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()

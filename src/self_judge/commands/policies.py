"""Loads policies for commands: their encoders and samplers.

This module handles models that answer prompts. It does not depend on judges or on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from self_judge.config.self_training import SamplingSettings
from self_judge.data.records import RecordRef
from self_judge.datatypes import Message
from self_judge.errors import EncodingError
from self_judge.inference.sampling import TransformersSampler
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import encoder_as_taught, load_judge_settings


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

"""Samples and scores with vLLM, using a loaded adapter or the engine's own weights.

This module defines the interface of an engine and the parameters of its requests. It does not
depend on whether the engine runs in this process (`colocated.py`) or on servers (`client.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm

from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Response
from self_judge.errors import EngineError
from self_judge.inference.letter_scoring import Done, Prompts
from self_judge.inference.sampling import rows_to_sample, sampled_response, stop_tokens
from self_judge.prompting.chat_encoder import ChatEncoder


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """The prompt and the seed for one response."""

    prompt: tuple[int, ...]
    seed: int


class Engine(Protocol):
    """The vLLM operations that sampling and judging need.

    Attributes:
        max_model_length: the maximum number of tokens in a prompt and its response together.
    """

    max_model_length: int

    def sample(
        self,
        requests: Sequence[SamplingRequest],
        settings: SamplingSettings,
        stop: Sequence[int],
        adapter: str | None,
        done: Done,
    ) -> list[list[int]]:
        """Returns the sampled ids for every request, including the stop token if there is one."""
        ...

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """Returns the log-probabilities of `token_ids` as the next token after each prompt."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a LoRA adapter in PEFT's format under a new name."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Removes a loaded adapter."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces the engine's own weights, which are named as in a checkpoint."""
        ...

    def sleep(self) -> None:
        """Frees memory on the accelerator until `wake_up` is called, if the engine supports it.

        Adapters remain loaded. An engine may drop its own weights, and then `load_weights` must be
        called after `wake_up`.
        """
        ...

    def wake_up(self) -> None:
        """Wakes the engine up after `sleep`."""
        ...


class VLLMSampler:
    """A `Sampler` that uses vLLM.

    Every response is sampled in a separate request with the seed that `TransformersSampler` would
    use. A response therefore does not depend on other requests or on the server, up to rounding in
    the model. vLLM generates random numbers differently, so the same seed gives different responses
    from the same distribution.

    Args:
        engine: the engine that samples.
        encoder: provides the stop tokens and decodes the responses.
        settings: the sampling settings. Every request contains all of them, and the model's own
            generation settings are not used.
        adapter: the name of the loaded adapter to sample with, or `None` for the engine's own
            weights.

    Raises:
        ValueError: there is no stop token.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: ChatEncoder,
        settings: SamplingSettings,
        adapter: str | None = None,
    ) -> None:
        self.engine = engine
        self.encoder = encoder
        self.settings = settings
        self.adapter = adapter
        self.stop = stop_tokens(encoder)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        seeds: Sequence[int] | int = 0,
        *,
        progress: bool = False,
    ) -> list[list[Response]]:
        """Samples `n` responses to every prompt; see `TransformersSampler.sample`.

        Raises:
            ValueError: see `TransformersSampler.sample`; also if a prompt plus `max_new_tokens`
                exceeds the engine's maximum length.
        """
        rows = rows_to_sample(prompts, n, seeds)
        room = self.engine.max_model_length - self.settings.max_new_tokens
        long = next((i for i, p in enumerate(prompts) if len(p) > room), None)
        if long is not None:
            raise ValueError(
                f"prompt {long} has {len(prompts[long])} tokens, and max_new_tokens is "
                f"{self.settings.max_new_tokens}: the engine supports at most "
                f"{self.engine.max_model_length} tokens in total (see vllm_max_model_length, or "
                "the server's --max-model-len)"
            )
        requests = [SamplingRequest(tuple(prompts[i]), seed) for i, seed in rows]
        with tqdm(total=len(rows), desc="sampling", unit="resp", disable=not progress) as bar:
            sampled = self.engine.sample(
                requests, self.settings, self.stop, self.adapter, bar.update
            )
        responses: list[list[Response]] = [[] for _ in prompts]
        for (i, _), ids in zip(rows, sampled, strict=True):
            responses[i].append(sampled_response(ids, self.encoder, prompts[i]))
        return responses


class VLLMScorer:
    """A `LetterScorer` that uses vLLM.

    Args:
        engine: the engine that scores.
        adapter: the name of the loaded adapter to judge with, or `None` for the engine's own
            weights.
    """

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        self.engine = engine
        self.adapter = adapter
        # vLLM scores the letters while it generates a token, which needs one more position.
        self.max_length: int | None = engine.max_model_length - 1

    def letter_probabilities(
        self, prompts: Prompts, letter_ids: tuple[int, int], done: Done
    ) -> torch.Tensor:
        """See `LetterScorer.letter_probabilities`."""
        if not prompts:
            return torch.empty(0, 2)
        logprobs = self.engine.next_token_logprobs(prompts, letter_ids, self.adapter, done)
        wrong = next((lp for row in logprobs for lp in row if not lp <= 1e-4), None)
        if wrong is not None and not math.isnan(wrong):
            raise EngineError(
                f"the engine returned {wrong:.3f} as a log-probability: run it with "
                "--logprobs-mode raw_logprobs, which is vLLM's default"
            )
        return torch.tensor(logprobs, dtype=torch.float64).exp().float()


def request_parameters(settings: SamplingSettings, stop: Sequence[int]) -> dict[str, Any]:
    """Returns the sampling parameters for vLLM. Every value is set, so that no default applies."""
    drawing = asdict(settings)
    return {
        "n": 1,
        "max_tokens": drawing.pop("max_new_tokens"),
        **drawing,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Only the encoder determines the stop tokens. The model's files are not used.
        "ignore_eos": True,
        "stop_token_ids": list(stop),
    }


def scoring_parameters(token_ids: Sequence[int]) -> dict[str, Any]:
    """Returns the vLLM parameters that request log-probabilities of the given next tokens.

    `logprob_token_ids` uses the raw distribution over the whole vocabulary. `allowed_token_ids`
    would restrict this distribution in vLLM's `processed_*` modes.
    """
    # The generated token is ignored. Greedy decoding does not draw random numbers.
    greedy = request_parameters(SamplingSettings(max_new_tokens=1, temperature=0.0), stop=())
    return {**greedy, "logprobs": len(token_ids), "logprob_token_ids": list(token_ids)}

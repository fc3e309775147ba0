"""vLLM in two roles: an adapter (or the engine's own weights) samples, the bare base judges.

It knows what is asked of an engine and how the answers are read. Which engine it is, in this
process (`colocated.py`) or behind URLs (`client.py`), it does not know.
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
    """One response to draw: its prompt, and the seed that its tokens are drawn from."""

    prompt: tuple[int, ...]
    seed: int


class Engine(Protocol):
    """What both roles need of vLLM.

    Attributes:
        max_model_length: tokens of prompt and response together at most.
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
        """The sampled ids of every request, with the token that ended it if one did."""
        ...

    def next_token_logprobs(
        self, prompts: Prompts, token_ids: Sequence[int], adapter: str | None, done: Done
    ) -> list[list[float]]:
        """Log-probabilities of `token_ids` after every prompt, over the whole vocabulary."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a LoRA adapter, as PEFT saves one, under a name not used before."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Forgets a loaded adapter."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Puts other weights in place of the engine's own, by their names in a checkpoint."""
        ...

    def sleep(self) -> None:
        """Frees the accelerator's memory until `wake_up`, where the engine can.

        Adapters stay loaded. An engine may drop its own weights, if `load_weights` always follows.
        """
        ...

    def wake_up(self) -> None:
        """Ends `sleep`."""
        ...


class VLLMSampler:
    """Samples with vLLM: a `Sampler`, as `TransformersSampler` is.

    Every response is a request of its own, with the seed it would have there, so it does not depend
    on which others are computed beside it, nor on which server computes it, up to rounding in the
    model. vLLM draws other noise from a seed than `TransformersSampler` does: one seed gives
    different responses, of the same distribution.

    Args:
        engine: where it runs.
        encoder: gives the tokens at which an answer ends, and decodes.
        settings: how to draw; all of it travels with every request, nothing of the model's own
            generation settings mixes in.
        adapter: the loaded adapter that samples; `None`: the engine's own weights.

    Raises:
        ValueError: no token ends an answer.
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
        """Draws `n` responses to every prompt; see `TransformersSampler.sample`.

        Raises:
            ValueError: also, a prompt and the longest response do not fit into the engine.
        """
        rows = rows_to_sample(prompts, n, seeds)
        room = self.engine.max_model_length - self.settings.max_new_tokens
        long = next((i for i, p in enumerate(prompts) if len(p) > room), None)
        if long is not None:
            raise ValueError(
                f"prompt {long} has {len(prompts[long])} tokens, and max_new_tokens is "
                f"{self.settings.max_new_tokens}: the engine holds {self.engine.max_model_length} "
                "of both together (vllm_max_model_length, or --max-model-len of the server)"
            )
        requests = [SamplingRequest(tuple(prompts[i]), seed) for i, seed in rows]
        with tqdm(total=len(rows), desc="sampling", unit="resp", disable=not progress) as bar:
            sampled = self.engine.sample(
                requests, self.settings, self.stop, self.adapter, bar.update
            )
        responses: list[list[Response]] = [[] for _ in prompts]
        for (i, _), ids in zip(rows, sampled, strict=True):
            responses[i].append(sampled_response(ids, self.encoder))
        return responses


class VLLMScorer:
    """Reads a judge's letters from vLLM: a `LetterScorer`, as `TransformersScorer` is.

    Args:
        engine: where it runs.
        adapter: the loaded adapter that judges; `None`: the bare base.
    """

    def __init__(self, engine: Engine, adapter: str | None = None) -> None:
        self.engine = engine
        self.adapter = adapter
        # vLLM reads the letter while it generates a token, for which there must be room.
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
                f"the engine answered {wrong:.3f} as a log-probability: run it with "
                "--logprobs-mode raw_logprobs, which is vLLM's default"
            )
        return torch.tensor(logprobs, dtype=torch.float64).exp().float()


def request_parameters(settings: SamplingSettings, stop: Sequence[int]) -> dict[str, Any]:
    """What vLLM is told of how to draw: every value, so that none of its own defaults counts."""
    drawing = asdict(settings)
    return {
        "n": 1,
        "max_tokens": drawing.pop("max_new_tokens"),
        **drawing,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # The end of an answer is what the encoder says, not what the model's files say.
        "ignore_eos": True,
        "stop_token_ids": list(stop),
    }


def scoring_parameters(token_ids: Sequence[int]) -> dict[str, Any]:
    """What vLLM is told to read tokens' log-probabilities after a prompt.

    `logprob_token_ids` reads the raw distribution over the whole vocabulary; `allowed_token_ids`
    would restrict it in vLLM's `processed_*` modes.
    """
    # The token itself is not looked at; greedy draws no random number.
    greedy = request_parameters(SamplingSettings(max_new_tokens=1, temperature=0.0), stop=())
    return {**greedy, "logprobs": len(token_ids), "logprob_token_ids": list(token_ids)}

"""Turns comparisons into verdicts, based on the next-token probabilities of two letters.

This module uses judge templates and a scorer for the letters. It does not depend on where responses
come from or how verdicts are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from self_judge.config.self_training import PackingChoice, SamplingSettings
from self_judge.datatypes import Comparison, Verdict
from self_judge.errors import require_type, suggesting
from self_judge.inference.letter_scoring import LetterScorer, TransformersScorer
from self_judge.inference.remote.endpoint import EndpointScorer
from self_judge.inference.sampling import Sampler, TransformersSampler
from self_judge.inference.thinking import ThinkingScorer
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.judging.voting import aggregate, undecidable
from self_judge.models import check_vocabulary, load_model, load_tokenizer
from self_judge.packing.packing import Packing
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import encoder_as_taught, resolve_settings
from self_judge.prompting.judge_prompt import (
    AsMessages,
    PromptEncoder,
    WithThought,
    encode_orders,
)
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.thoughts import NO_ANSWER, answers_of
from self_judge.runtime import unwrapped

# The arguments that `from_pretrained` passes to both the tokenizer and the model.
_ALSO_TOKENIZER = ("revision", "trust_remote_code")
# Names of these arguments in the trainers and in `tournament_rejection_sampling`.
_NAMES = {
    "tokenizer": "encoder",
    "processing_class": "encoder",
    "judge_templates": "templates",
    "judge_batch_size": "batch_size",
}


class Judge:
    """Judges pairs of responses in both orders with the template of every principle.

    Args:
        model: a causal language model (or `PeftModel`), which is used in evaluation mode and is not
            changed; or a `LetterScorer`. With a `LetterScorer`, `batch_size`, `packing` and
            `batch_tokens` are ignored.
        encoder: a `ChatEncoder`, or a tokenizer whose own chat template is used; `None` for an
            endpoint, which encodes chats itself.
        templates: the judge templates, or a mapping `{principle: {system, user, assistant}}`.
        token_id_a, token_id_b: expected token ids of the letters, which are checked against the ids
            derived from the tokenizer.
        batch_size: the number of judge prompts per forward pass without packing. Packed passes are
            limited by `batch_tokens`.
        max_length: the maximum number of tokens in a judge prompt. It defaults to the model's
            context length and is capped at it.
        packing: the packing mode (see `Packing`). `auto` selects an exact mode.
        batch_tokens: the maximum number of tokens in a packed forward pass (default:
            `tokens_per_pass`).
        thought_tokens: the judge thinks before it names a letter, with at most this number of
            tokens. By default, it does not think.

    Attributes:
        identity: what identifies this judge in files and cards, as plain data.

    Raises:
        ValueError: a template or letter is invalid (see `JudgeTemplates`, `ChatEncoder`), the
            tokenizer does not belong to the model, or `packing` is not exact for the model.
    """

    # The steps in one call to `compare`, for N comparisons and P principles:
    #
    #   render and encode    N·P·2 prompts: every pair under every principle, a first and b first
    #   score the letters    p(A), p(B) as the next token of each distinct prompt
    #   vote                 (P, 2 orders, 2 letters) per pair -> one verdict (`voting.aggregate`)
    #
    # For one comparison with principles h and t, the prompts and letter rows are in this order:
    #   h: a first   h: b first   t: a first   t: b first

    @suggesting(**_NAMES)
    def __init__(
        self,
        model: torch.nn.Module | LetterScorer,
        encoder: ChatEncoder | PreTrainedTokenizerBase | None,
        templates: JudgeTemplates | Mapping[str, Any],
        *,
        token_id_a: int | None = None,
        token_id_b: int | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        packing: PackingChoice = "auto",
        batch_tokens: int | None = None,
        thought_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"judge batch size must be at least 1, got {batch_size}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"the judge's max_length must be at least 1, got {max_length}")
        if isinstance(model, str | os.PathLike):
            raise TypeError(f"Judge takes a model: use Judge.from_pretrained({str(model)!r:.80})")
        self.templates = JudgeTemplates.of(templates)
        self._encoder = None if isinstance(model, EndpointScorer) else _chat_encoder(encoder)
        self._prompts: PromptEncoder = self._encoder or AsMessages()
        self.letter_ids = self._prompts.letter_ids(self.templates, token_id_a, token_id_b)
        if isinstance(model, torch.nn.Module):
            check_vocabulary(model, self.encoder.tokenizer)
            model = TransformersScorer(model, batch_size, packing, batch_tokens)
        self.identity: dict[str, Any] = {
            "model": _name_of(model),
            "principles": list(self.principles),
        }
        if thought_tokens is not None:
            self.identity["thought_tokens"] = thought_tokens
            model = self._thinking(model, thought_tokens)
        self.scorer: LetterScorer = model
        limits = [n for n in (max_length, self.scorer.max_length) if n is not None]
        self.max_length: int | None = min(limits, default=None)
        self._check_room()

    def _check_room(self) -> None:
        # If even empty responses do not fit, raise an error instead of making every pair
        # undecidable.
        if self.max_length is None:
            return
        nothing = Comparison("", "", "")
        for principle in self.templates:
            ids = self._prompts.encode_open(self.templates.render(principle, nothing))
            if len(ids) >= self.max_length:
                raise ValueError(
                    f"max_length {self.max_length} leaves no room for responses: judge template "
                    f"{principle!r} alone has {len(ids)} tokens; raise max_length"
                )

    def _thinking(self, scorer: LetterScorer, tokens: int) -> LetterScorer:
        if isinstance(scorer, EndpointScorer):
            scorer.thought_tokens = tokens
            return scorer
        greedy = SamplingSettings(max_new_tokens=tokens, temperature=0.0)
        sampler: Sampler
        if isinstance(scorer, TransformersScorer):
            model: Any = scorer.model
            sampler = TransformersSampler(model, self.encoder, greedy)
        elif isinstance(scorer, VLLMScorer):
            sampler = VLLMSampler(scorer.engine, self.encoder, greedy, scorer.adapter)
        else:
            raise ValueError(
                f"a {type(scorer).__name__} cannot think, because it does not sample: pass a "
                "model, a VLLMScorer or an EndpointScorer"
            )
        self._prompts = WithThought(self.encoder)
        return ThinkingScorer(scorer, sampler, self.encoder, tokens)

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder of this judge.

        Raises:
            ValueError: the judge is an endpoint, which encodes chats itself.
        """
        if self._encoder is None:
            raise ValueError("this judge is an endpoint, which has no tokenizer here")
        return self._encoder

    @property
    def principles(self) -> tuple[str, ...]:
        """The names of the votes, in the order of the probabilities in a `Verdict`."""
        return self.templates.principles

    @property
    def judges(self) -> tuple[Judge, ...]:
        """This judge alone, as a `Panel` has several."""
        return (self,)

    @property
    def thought_tokens(self) -> int:
        """The number of tokens in all thoughts so far."""
        thinks = isinstance(self.scorer, ThinkingScorer | EndpointScorer)
        return self.scorer.sampled_tokens if thinks else 0  # type: ignore[attr-defined]

    @property
    def model(self) -> torch.nn.Module:
        """The Transformers model of this judge.

        Raises:
            ValueError: the scorer is not a Transformers model.
        """
        return self._on_transformers("model").model

    @property
    def packing(self) -> Packing:
        """The packing of the Transformers model.

        Raises:
            ValueError: the scorer is not a Transformers model.
        """
        return self._on_transformers("packing").packing

    def _on_transformers(self, wanted: str) -> TransformersScorer:
        if self.in_process is None:
            raise ValueError(f"this judge uses an engine, which has no {wanted}")
        return self.in_process

    @property
    def in_process(self) -> TransformersScorer | None:
        """The scorer of the model in this process; `None` for an engine or an endpoint."""
        scorer = self.scorer.scorer if isinstance(self.scorer, ThinkingScorer) else self.scorer
        return scorer if isinstance(scorer, TransformersScorer) else None

    @classmethod
    @suggesting(**_NAMES)
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        templates: JudgeTemplates | Mapping[str, Any] | None = None,
        *,
        encoder: ChatEncoder | PreTrainedTokenizerBase | None = None,
        token_id_a: int | None = None,
        token_id_b: int | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        packing: PackingChoice = "auto",
        device: str | torch.device | None = "auto",
        **model_kwargs: Any,
    ) -> Judge:
        """Loads a model that was trained to judge, together with its saved templates.

        Args:
            templates: templates that replace the saved templates. They are required if no templates
                were saved with the model.
            encoder: an encoder that replaces the saved encoder or tokenizer.
            token_id_a, token_id_b: expected token ids of the letters, which are checked against the
                ids derived from the tokenizer. Without `templates`, they default to the saved ids.
            device, model_kwargs: arguments for `models.load_model`. The device `"auto"` is the GPU
                of this process, or the CPU if there is no GPU.

        Raises:
            ValueError: the model or the templates are missing, or a letter's token differs from the
                saved token.
        """
        settings = resolve_settings(
            name_or_path,
            templates,
            token_id_a,
            token_id_b,
            revision=model_kwargs.get("revision"),
        )
        if encoder is None:
            named = {k: model_kwargs[k] for k in _ALSO_TOKENIZER if k in model_kwargs}
            tokenizer = load_tokenizer(name_or_path, **named)
            encoder = encoder_as_taught(tokenizer, settings)
        model = load_model(name_or_path, device=device, **model_kwargs)
        return cls(
            model,
            encoder,
            settings.templates,
            token_id_a=settings.token_id_a,
            token_id_b=settings.token_id_b,
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
        )

    def compare(
        self, comparisons: Iterable[Comparison], *, progress: bool = False
    ) -> list[Verdict]:
        """Judges every comparison and returns the verdicts in the same order.

        If a response begins with a thought, the judge sees only the answer. A pair is undecidable
        if no answer follows a thought or a judge prompt does not fit into `max_length`. The verdict
        gives the reason.

        Raises:
            TypeError: an element is not a `Comparison` of texts. The message contains its index.
        """
        if isinstance(comparisons, Comparison):
            raise TypeError("compare takes a list of comparisons: pass [comparison]")
        comparisons = list(comparisons)
        for i, given in enumerate(comparisons):
            if not isinstance(given, Comparison):
                raise TypeError(
                    f"comparison {i} is of type {type(given).__name__}: pass "
                    "Comparison(context, response_a, response_b)"
                )
            for part in ("context", "response_a", "response_b"):
                require_type(f"{part} of comparison {i}", getattr(given, part), str, "text")
        prompts: list[list[Any]] = []
        fits: list[bool] = []
        shown = [answers_of(comparison) for comparison in comparisons]
        for comparison in shown:
            encoded = [
                encode_orders(self._prompts, self.templates, p, comparison, self.max_length)
                if comparison is not None
                else None
                for p in self.templates
            ]
            # If a prompt does not fit, even for a single principle, the pair is undecidable.
            whole = [orders for orders in encoded if orders is not None]
            fits.append(len(whole) == len(encoded))
            if fits[-1]:
                prompts += [ids for orders in whole for ids in orders]
        letters = self.letter_probabilities(prompts, progress=progress).tolist()
        # With two principles, rows 0 to 3 belong to the first pair that fits, and rows 4 to 7 to
        # the next pair. Each group of two rows contains the two orders for one principle.
        per_verdict = 2 * len(self.templates)
        verdicts, start = [], 0
        for comparison, fit in zip(shown, fits, strict=True):
            if not fit:
                long = "the pair does not fit into max_length"
                verdicts.append(undecidable((), NO_ANSWER if comparison is None else long))
                continue
            rows = letters[start : start + per_verdict]
            start += per_verdict
            verdicts.append(aggregate([((f[0], f[1]), (s[0], s[1])) for f, s in _in_twos(rows)]))
        return verdicts

    def prefix_cache(self) -> AbstractContextManager[None]:
        """Returns a context manager in which calls reuse the prompt prefixes of earlier calls.

        Use it for comparisons that share contexts and responses, such as those in a tournament. The
        verdicts do not change. For an engine, this has no effect, because engines cache prefixes
        themselves.
        """
        return nullcontext() if self.in_process is None else self.packing.prefix_cache()

    def letter_probabilities(
        self, prompts: Sequence[Sequence[Any]], *, progress: bool = False
    ) -> torch.Tensor:
        """Returns p(A) and p(B) as the next token of each prompt (softmax over the vocabulary).

        Identical prompts are computed only once. This saves work, and prevents batch-dependent
        rounding from breaking a tie between identical responses.

        Returns:
            A float32 tensor on the CPU with shape `(len(prompts), 2)`.
        """
        # For prompts x y x, the scorer computes x y, and rows 0 1 0 of its result are returned.
        unique = list(dict.fromkeys(map(tuple, prompts)))
        with tqdm(total=len(unique), desc="judging", unit="prompt", disable=not progress) as bar:
            letters_N2 = self.scorer.letter_probabilities(unique, self.letter_ids, bar.update)
        place = {prompt: i for i, prompt in enumerate(unique)}
        return letters_N2[[place[tuple(prompt)] for prompt in prompts]]


def _in_twos(rows: list[list[float]]) -> Iterable[tuple[list[float], list[float]]]:
    return zip(rows[::2], rows[1::2], strict=True)


def _chat_encoder(encoder: ChatEncoder | PreTrainedTokenizerBase | None) -> ChatEncoder:
    if encoder is None:
        raise TypeError("Judge needs an encoder: only an endpoint judges without one")
    return ChatEncoder.of(encoder)


def _name_of(scorer: LetterScorer) -> str:
    if isinstance(scorer, EndpointScorer):
        return scorer.model
    if isinstance(scorer, TransformersScorer):
        config: Any = unwrapped(scorer.model).config
        return str(config.name_or_path or type(unwrapped(scorer.model)).__name__)
    return type(scorer).__name__

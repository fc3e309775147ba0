"""Samplers generate responses to prompts; this module implements one for Transformers models.

This module works with token ids and a model; `decoding.py` generates the tokens. The responses
contain the tokens exactly as sampled. This module does not interpret prompts or judge responses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Response, stable_seed
from self_judge.inference.decoding import MaxOverRanks, cache_bytes, decode, why_not_shared
from self_judge.inference.logits_processors import SeededTokenSampler
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.thoughts import sampled
from self_judge.runtime import (
    device_of,
    halve_or_raise,
    in_evaluation_mode,
    keep_freed_memory,
    padded,
    to_device,
    without_cudnn_attention,
)

logger = logging.getLogger(__name__)


class Sampler(Protocol):
    """Samples responses from a model in this process or from an engine."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        seeds: Sequence[int] | int = 0,
        *,
        progress: bool = False,
    ) -> list[list[Response]]:
        """Samples `n` responses to every prompt; see `TransformersSampler.sample`."""
        ...


def rows_to_sample(
    prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int] | int
) -> list[tuple[int, int]]:
    """Returns (prompt index, seed) for each response; a prompt's `n` responses are adjacent.

    Raises:
        ValueError: `n` is below 1, a prompt is empty, or the number of seeds is wrong.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    empty = next((i for i, p in enumerate(prompts) if not len(p)), None)
    if empty is not None:
        raise ValueError(f"prompt {empty} has no tokens: pass at least one token per prompt")
    if isinstance(seeds, int):
        seeds = [stable_seed(seeds, i) for i in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt")
    # Two prompts with seeds s and t and n = 2 give (0, s·0) (0, s·1) (1, t·0) (1, t·1), where s·k
    # is the stable hash of s and k. The seed of a row depends only on s and k.
    return [(i, stable_seed(seeds[i], k)) for i in range(len(prompts)) for k in range(n)]


def stop_tokens(encoder: ChatEncoder) -> tuple[int, ...]:
    """Returns the ids of the stop tokens, which end a response.

    Raises:
        ValueError: there is no stop token.
    """
    if not encoder.stop_token_ids:
        raise ValueError(
            "there is no stop token: the tokenizer has no end-of-sequence token, and the chat "
            "template does not end turns with a control token; set tokenizer.eos_token"
        )
    return tuple(encoder.stop_token_ids)


def sampled_response(ids: Sequence[int], encoder: ChatEncoder, prompt: Sequence[int]) -> Response:
    """Returns the response up to the first stop token (see `thoughts.sampled`)."""
    stop = set(encoder.stop_token_ids)
    end = next((t + 1 for t, token in enumerate(ids) if token in stop), None)
    return sampled(encoder.tokenizer, prompt, ids[:end], ended=end is not None)


class TransformersSampler:
    """Samples from a Transformers model with a KV cache; prompts of similar length share a batch.

    Each prompt is computed once for all its samples, and finished rows are removed from the batch.
    If a trial shows that this is not exact for a model, the model's own `generate` method is used
    instead.

    Each response is sampled with its own seed. It therefore does not depend on the other prompts in
    its batch, the number of processes or earlier samples (up to rounding in the model itself).

    Only one thread at a time may sample from a model, because sampling temporarily replaces the
    model's generation settings and switches it to evaluation mode.

    Args:
        model: a causal language model. Its own generation settings are not used.
        encoder: provides the stop tokens and decodes the responses.
        settings: the sampling settings.
        batch_size: the maximum number of responses in a batch.
        batch_tokens: the maximum number of tokens in the KV cache, computed as (longest prompt +
            `max_new_tokens`) × responses. The samples for a single prompt are split into several
            batches if they exceed the limit. By default, the cache uses half of the GPU memory that
            the model's weights leave free, or 4 GiB on a CPU. The default depends on the total
            memory of the device, not on the free memory, so the same prompts share a batch after a
            resume.
        max_over_ranks: for a sharded model, a function that returns the maximum of a number over
            all processes, so that all processes run the same number of forward passes.

    Raises:
        ValueError: `batch_size` or `batch_tokens` is below 1, or there is no stop token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: ChatEncoder,
        settings: SamplingSettings,
        batch_size: int = 64,
        *,
        batch_tokens: int | None = None,
        max_over_ranks: MaxOverRanks | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"sampling batch size must be at least 1, got {batch_size}")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"sampling batch tokens must be at least 1, got {batch_tokens}")
        self.stop = stop_tokens(encoder)
        self.model = model
        self.encoder = ChatEncoder.of(encoder)
        self.settings = settings
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_over_ranks = max_over_ranks
        self._vocabulary = model.config.get_text_config().vocab_size
        self._context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        keep_freed_memory(device_of(model))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int = 1,
        seeds: Sequence[int] | int = 0,
        *,
        progress: bool = False,
    ) -> list[list[Response]]:
        """Samples `n` responses to every prompt.

        Args:
            prompts: the token ids of each prompt, up to the start of the response. Prompts must not
                be empty.
            n: the number of responses per prompt.
            seeds: one seed per prompt, or a single seed, which is combined with the index of each
                prompt.
            progress: whether to show a progress bar.

        Returns:
            One list of `n` responses per prompt.

        Raises:
            ValueError: `n` is below 1, a prompt is empty, or the number of seeds is wrong.
        """
        drawn_from = rows_to_sample(prompts, n, seeds)
        self._check_context(max(map(len, prompts), default=0))
        responses: list[list[Response]] = [[] for _ in prompts]
        bar = tqdm(total=n * len(prompts), desc="sampling", unit="resp", disable=not progress)
        with in_evaluation_mode(self.model), without_cudnn_attention(), bar:
            batches = self._batches([len(p) for p in prompts], n)
            number, rounds = 0, len(batches)
            # If the model is sharded across processes, all of them must run the same number of
            # batches. If another process has 5 batches and this process has 3, this process also
            # runs two batches whose only prompt is a stop token, and discards the samples.
            if self.max_over_ranks is not None:
                rounds = self.max_over_ranks(rounds)
            while number < rounds:
                if number >= len(batches):  # other processes have more batches
                    self._sampled([(self.stop[:1], [0])])
                    number += 1
                    continue
                batch = batches[number]
                rows = [(prompts[i], [drawn_from[i * n + k][1] for k in ks]) for i, ks in batch]
                count = sum(len(ks) for _, ks in batch)
                try:
                    drawn = iter(self._sampled(rows))
                except RuntimeError as error:
                    if self.max_over_ranks is not None:  # all processes must split together
                        raise
                    # If memory runs out, split this batch and all later batches into batches with
                    # half as many responses. Each response has its own seed, so the responses do
                    # not change.
                    self.batch_size = halve_or_raise("sampling", count, "responses", error)
                    batches[number:] = [
                        part for b in batches[number:] for part in _split(b, self.batch_size)
                    ]
                    rounds = len(batches)
                    continue
                # The samples for a prompt remain in order, even if they are split into several
                # batches.
                for i, ks in batch:
                    responses[i] += [
                        sampled_response(next(drawn), self.encoder, prompts[i]) for _ in ks
                    ]
                bar.update(count)
                number += 1
        return responses

    @torch.no_grad()
    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Response]]
    ) -> list[list[float]]:
        """Returns log π(response | prompt) for sampled responses, summed over the sampled ids.

        The probabilities are the model's own, without temperature and truncation. Each response
        takes a row of a padded batch.

        Args:
            prompts: the token ids of each prompt, as in `sample`.
            responses: the responses to each prompt, as returned by `sample`.
        """
        pairs = [
            (list(prompt), list(response.ids))
            for prompt, own in zip(prompts, responses, strict=True)
            for response in own
        ]
        device, sums = next(self.model.parameters()).device, [0.0] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda k: -len(pairs[k][0]) - len(pairs[k][1]))
        with in_evaluation_mode(self.model), without_cudnn_attention():
            while order:
                # Logits have the size of the vocabulary, so a batch is limited by its tokens.
                longest = len(pairs[order[0]][0]) + len(pairs[order[0]][1])
                rows = max(1, min(self.batch_size, _LOGITS // (longest * self._vocabulary)))
                batch, order = order[:rows], order[rows:]
                inputs = padded([pairs[k][0] + pairs[k][1] for k in batch], device)
                logits_BTV = self.model(**inputs, use_cache=False).logits
                for logits_TV, k in zip(logits_BTV, batch, strict=True):
                    start, ids = len(pairs[k][0]), to_device(torch.tensor(pairs[k][1]), device)
                    log_p_TV = logits_TV[start - 1 : start - 1 + len(ids)].float().log_softmax(-1)
                    sums[k] = log_p_TV.gather(-1, ids[:, None]).sum().item()
        rest = iter(sums)
        return [[next(rest) for _ in own] for own in responses]

    def mean_log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Response]]
    ) -> list[list[float]]:
        """Returns `log_probs` divided by the number of sampled ids, the mean log π per token."""
        sums = self.log_probs(prompts, responses)
        return [
            [log_prob / len(response.ids) for log_prob, response in zip(of, own, strict=True)]
            for of, own in zip(sums, responses, strict=True)
        ]

    def _check_context(self, longest: int) -> None:
        """Logs once if a response may become longer than the model's context allows."""
        if self._context is not None and longest + self.settings.max_new_tokens > self._context:
            logger.warning(
                "a prompt of %d tokens and max_new_tokens %d exceed the model's context of %d "
                "tokens: lower max_new_tokens, or leave out long prompts",
                longest,
                self.settings.max_new_tokens,
                self._context,
            )
            self._context = None

    def _batches(self, lengths: Sequence[int], n: int) -> list[list[tuple[int, range]]]:
        """Returns batches of (prompt index, sample range) within the limits, longest first."""
        # In this example, prompts 0, 1 and 2 have 5, 20 and 10 tokens. Each prompt gets 3 samples
        # of up to 10 new tokens. A batch has at most 4 responses and 60 tokens. A row for the
        # prompt with 20 tokens needs 30 tokens, so two rows fit.
        #   [prompt 1, samples 0 1] [prompt 1, sample 2] [prompt 2, samples 0 1 2] [prompt 0, ...]
        limit = self.batch_tokens or cache_tokens(self.model)
        batches: list[list[tuple[int, range]]] = []
        room = 0  # the number of responses that still fit in the last batch
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fit = max(1, limit // (lengths[i] + self.settings.max_new_tokens))
            most = min(self.batch_size, fit)
            for start in range(0, n, most):
                samples = range(start, min(start + most, n))
                if len(samples) > room:
                    batches.append([])
                    room = most
                batches[-1].append((i, samples))
                room -= len(samples)
        return batches

    def _sampled(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
        """Returns the new ids for each sample; `rows` pairs prompts with their samples' seeds."""
        stop = self.stop
        pad = self.encoder.tokenizer.pad_token_id
        pad = stop[0] if pad is None else pad
        device = next(self.model.parameters()).device
        longest = max(len(prompt) for prompt, _ in rows)
        padding = [longest - len(prompt) for prompt, seeds in rows for _ in seeds]
        draw = SeededTokenSampler(
            self.settings,
            to_device(torch.tensor([seed for _, seeds in rows for seed in seeds]), device),
            to_device(torch.tensor(padding), device),
        )
        if why_not_shared(self.model) is None:
            return decode(
                self.model,
                [prompt for prompt, _ in rows],
                [len(seeds) for _, seeds in rows],
                draw,
                stop=stop,
                pad=pad,
                max_new_tokens=self.settings.max_new_tokens,
                max_over_ranks=self.max_over_ranks,
            )
        return self._generated([p for p, seeds in rows for _ in seeds], draw.processors, pad)

    def _generated(
        self, prompts: Sequence[Sequence[int]], processors: LogitsProcessorList, pad: int
    ) -> list[list[int]]:
        device = next(self.model.parameters()).device
        longest = max(map(len, prompts))
        config = GenerationConfig(
            max_new_tokens=self.settings.max_new_tokens,
            do_sample=False,  # the argmax over the noisy logits is a sample
            use_cache=True,
            eos_token_id=list(self.stop),
            pad_token_id=pad,
        )
        with _without_own_generation_settings(self.model):
            output_BT = self.model.generate(  # type: ignore[operator]
                **padded(prompts, device, "left", pad),
                generation_config=config,
                logits_processor=processors,
                synced_gpus=self.max_over_ranks is not None,
            )
        return output_BT[:, longest:].tolist()


_LOGITS = 2**28  # the maximum number of logits in a batch of `log_probs`: 1 GiB in float32
# The default for `batch_tokens` if the size of the model's KV cache is unknown.
_CACHE_TOKENS = 65_536
_CPU_CACHE = 4 * 2**30  # bytes


def cache_tokens(model: torch.nn.Module) -> int:
    per_token = cache_bytes(model) if why_not_shared(model) is None else None
    if per_token is None:
        return _CACHE_TOKENS
    device = next(model.parameters()).device
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    return tokens_that_fit(per_token, sum(p.nbytes for p in model.parameters()), memory)


def tokens_that_fit(per_token: int, weights: int, memory: int | None) -> int:
    """Returns the default number of tokens in a KV cache, at least 1.

    Args:
        per_token: the bytes of keys and values per token in all layers.
        weights: the bytes of the model's weights.
        memory: the total memory of the GPU in bytes, or `None` on a CPU.
    """
    # For Llama 2 7B in bfloat16 on a GPU with 80 GiB, 12.6 GiB of weights leave 67.4 GiB. The cache
    # gets half of this memory and needs 512 KiB per token, so about 69,000 tokens fit.
    room = _CPU_CACHE if memory is None else (memory - weights) // 2
    return max(1, room // per_token)


def _split(batch: Sequence[tuple[int, range]], most: int) -> list[list[tuple[int, range]]]:
    """Splits a batch into parts with at most `most` responses each, in the same order."""
    # [(4, 0 1 2) (7, 0 1)] with at most 2   ->   [(4, 0 1)]  [(4, 2) (7, 0)]  [(7, 1)]
    parts: list[list[tuple[int, range]]] = []
    room = 0
    for i, samples in batch:
        left = samples
        while left:
            if not room:
                parts.append([])
                room = most
            taken, left = left[:room], left[room:]
            parts[-1].append((i, taken))
            room -= len(taken)
    return parts


@contextmanager
def _without_own_generation_settings(model: torch.nn.Module) -> Iterator[None]:
    """Hides the model's generation settings, which `generate` would use as defaults.

    A PEFT wrapper copies its own settings to the base model, so the settings of both are restored.
    """
    holders: list[Any] = [model.get_base_model()] if isinstance(model, PeftModel) else []
    holders.append(model)
    kept = [vars(holder).get("generation_config") for holder in holders]
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            if config is None:
                del holder.generation_config
            else:
                holder.generation_config = config

"""Scorers compute the probabilities of two letters as the next token after judge prompts.

Scorers use token ids and a model. The scorer in this module uses a Transformers model, and the one
in `vllm/protocol.py` uses an engine. Scorers do not depend on the meaning of the letters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from self_judge.config.self_training import PackingChoice
from self_judge.packing.packing import Packing
from self_judge.packing.pass_size import tokens_per_pass
from self_judge.runtime import (
    float32_logits,
    halve_or_raise,
    in_evaluation_mode,
    padded,
    takes,
    unwrapped,
    without_cudnn_attention,
)

Prompts = Sequence[Sequence[Any]]  # token ids, or the messages of chats for an endpoint
Done = Callable[[int], object]  # called with the number of newly finished prompts or responses


class LetterScorer(Protocol):
    """Computes letter probabilities for a judge.

    Attributes:
        max_length: the maximum number of tokens in a prompt, or `None` for no limit.
    """

    max_length: int | None

    def letter_probabilities(
        self, prompts: Prompts, letter_ids: tuple[int, int], done: Done
    ) -> torch.Tensor:
        """Returns p(A) and p(B) as the next token of each prompt (softmax over the vocabulary).

        Args:
            prompts: the prompts as the judge's encoder encodes them, without duplicates.
            letter_ids: the ids of A and B.
            done: a callback that receives the number of prompts computed since its last call.

        Returns:
            A float32 tensor on the CPU with shape `(len(prompts), 2)`.
        """
        ...


class TransformersScorer:
    """Computes letter probabilities with a Transformers model in evaluation mode.

    Args:
        model: a causal language model (or `PeftModel`). It is not changed.
        batch_size: the number of prompts per forward pass without packing.
        packing: the packing mode (see `Packing`). `auto` selects an exact mode.
        batch_tokens: the maximum number of tokens in a packed forward pass (default:
            `tokens_per_pass`).

    Raises:
        ValueError: the packing mode is not exact for the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch_size: int = 8,
        packing: PackingChoice = "auto",
        batch_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        config: Any = unwrapped(model).config  # DeepSpeed's engine has its own `config`
        # Recurrent models do not have this limit. With learned position embeddings, a longer prompt
        # would raise an error.
        self.max_length: int | None = getattr(
            config.get_text_config(), "max_position_embeddings", None
        )
        self.packing = Packing(model, packing, batch_tokens=batch_tokens)

    @torch.no_grad()
    def letter_probabilities(
        self, prompts: Prompts, letter_ids: tuple[int, int], done: Done
    ) -> torch.Tensor:
        """See `LetterScorer.letter_probabilities`."""
        letters_N2 = torch.empty(len(prompts), 2)
        with (
            in_evaluation_mode(self.model),
            float32_logits(self.model),
            without_cudnn_attention(),
        ):
            left = list(range(len(prompts)))
            # If memory runs out, only the remaining prompts are computed, in smaller passes. If
            # passes of 1,024 tokens fail after 30 of 50 prompts, 20 prompts are `left` for passes
            # of 512 tokens.
            while left:
                computed: set[int] = set()
                try:
                    for places, logits_BV in self._logits([prompts[i] for i in left]):
                        own = [left[place] for place in places]
                        letters_N2[own] = logits_BV.float().softmax(-1)[:, list(letter_ids)].cpu()
                        computed.update(own)
                        done(len(own))
                except RuntimeError as error:
                    self._take_less(error)
                left = [i for i in left if i not in computed]
        return letters_N2

    def _logits(self, prompts: Sequence[Sequence[int]]) -> Iterable[tuple[list[int], torch.Tensor]]:
        packed = self.packing.decision.route != "off"
        return self.packing.next_token_logits(prompts) if packed else self._unpacked(prompts)

    def _take_less(self, error: RuntimeError) -> None:
        """Halves the pass size (to at least one prompt) if memory runs out, or re-raises the error.

        If the model is sharded, all processes run every pass together, so one process cannot change
        the pass size on its own.
        """
        if self.packing.shape.one_pass:
            raise error
        if self.packing.decision.route == "off":
            self.batch_size = halve_or_raise("judging", self.batch_size, "prompts", error)
            return
        shape = self.packing.shape
        tokens = shape.batch_tokens or tokens_per_pass(self.packing.inner)
        self.packing.shape = replace(
            shape,
            batch_tokens=halve_or_raise("judging", tokens, "tokens", error),
            split_pairs=True,
        )

    def _unpacked(
        self, prompts: Sequence[Sequence[int]]
    ) -> Iterable[tuple[list[int], torch.Tensor]]:
        # With the longest prompts first, the prompts in a batch have similar lengths, and an
        # out-of-memory error occurs early.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch, next_token_logits(self.model, [prompts[i] for i in batch])


def next_token_logits(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Computes the logits of the token after each prompt, shape `(B, V)`.

    Rows are padded on the right. The LM head scores only the positions at which a prompt ends.
    """
    device = next(model.parameters()).device
    lengths = [len(p) for p in prompts]
    inputs = padded(prompts, device)
    last_B = torch.tensor([n - 1 for n in lengths], device=device)
    rows_B = torch.arange(len(prompts), device=device)
    if takes(unwrapped(model), "logits_to_keep"):
        # Prompts with 3, 5 and 3 tokens end at positions 2, 4 and 2. The head scores positions [2
        # 4] in every row, and the columns to read are 0, 1 and 0.
        kept, place_B = last_B.unique(return_inverse=True)
        logits_BUV = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits_BUV[rows_B, place_B]
    return model(**inputs).logits[rows_B, last_B]

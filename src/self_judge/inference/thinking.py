"""Lets a judge think before it names a letter.

A prompt has a place for a thought before its lead-in. The thought is sampled greedily, with a
limited number of tokens, and the letter is scored after the thought and the lead-in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from self_judge.inference.letter_scoring import Done, LetterScorer, Prompts
from self_judge.inference.sampling import Sampler
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_prompt import THOUGHT
from self_judge.prompting.thoughts import closing_of

ROOM = 16  # tokens for the marker that closes a thought


class ThinkingScorer:
    """A `LetterScorer` for prompts with a place for a thought (see `WithThought`).

    Args:
        scorer: scores the letters after the thoughts.
        sampler: samples the thoughts, with the same model.
        encoder: the model's encoder.
        thought_tokens: the maximum number of tokens in a thought.

    Attributes:
        sampled_tokens: the number of tokens in all thoughts so far.
    """

    def __init__(
        self, scorer: LetterScorer, sampler: Sampler, encoder: ChatEncoder, thought_tokens: int
    ) -> None:
        self.scorer, self.sampler, self.encoder = scorer, sampler, encoder
        self.sampled_tokens = 0
        limit = scorer.max_length
        self.max_length = None if limit is None else limit - thought_tokens - ROOM

    def letter_probabilities(
        self, prompts: Prompts, letter_ids: tuple[int, int], done: Done
    ) -> torch.Tensor:
        """See `LetterScorer.letter_probabilities`. Each prompt has its own thought."""
        if not prompts:
            return torch.empty(0, 2)
        places = [list(prompt).index(THOUGHT) for prompt in prompts]
        questions = [list(prompt[:at]) for prompt, at in zip(prompts, places, strict=True)]
        whole = [
            (*question, *self._thought(question, ids), *prompt[at + 1 :])
            for question, ids, prompt, at in zip(
                questions, self._sampled(questions), prompts, places, strict=True
            )
        ]
        return self.scorer.letter_probabilities(whole, letter_ids, done)

    def _sampled(self, questions: list[list[int]]) -> list[tuple[int, ...]]:
        # Two principles with the same question and different lead-ins share one thought.
        distinct = list(dict.fromkeys(map(tuple, questions)))
        responses = self.sampler.sample(distinct, 1, [0] * len(distinct))
        self.sampled_tokens += sum(len(own[0].ids) for own in responses)
        by_question = {q: own[0].ids for q, own in zip(distinct, responses, strict=True)}
        return [by_question[tuple(question)] for question in questions]

    def _thought(self, question: Sequence[int], ids: Sequence[int]) -> list[int]:
        """Returns a thought without its stop token, closed if it was cut at the limit."""
        stop = set(self.encoder.stop_token_ids)
        kept = [*ids[:-1]] if ids and ids[-1] in stop else [*ids]
        closing = closing_of(self.encoder.tokenizer, question, kept)
        if closing is None:
            return kept
        return [*kept, *self.encoder.tokenizer.encode(f"\n{closing}", add_special_tokens=False)]

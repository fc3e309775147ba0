"""Encodes judge prompts: a pair of responses in a judge template, in both orders.

This module renders the judge templates and passes the chats to `ChatEncoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from self_judge.datatypes import Comparison, Message
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates, turns_of

THOUGHT = -1  # stands in a prompt where the judge thinks; see `WithThought`


class PromptEncoder(Protocol):
    """Encodes judge prompts as a letter scorer takes them; see `ChatEncoder`."""

    def encode_open(self, messages: Sequence[Message]) -> list[Any]:
        """Encodes a chat whose last message is continued by the letter."""
        ...

    def letter_ids(
        self,
        templates: JudgeTemplates,
        token_id_a: int | None = None,
        token_id_b: int | None = None,
    ) -> tuple[int, int]:
        """Returns the ids of the letters A and B."""
        ...


class AsMessages:
    """Leaves chats as (role, text) pairs, for endpoints that encode messages themselves."""

    def encode_open(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """See `PromptEncoder`."""
        return [(message["role"], message["content"]) for message in messages]

    def letter_ids(self, templates: JudgeTemplates, *token_ids: int | None) -> tuple[int, int]:
        """Returns the indices of the letters, because endpoints name tokens by their texts."""
        return 0, 1


class AsArrays:
    """Encodes judge prompts as arrays, which need less memory and time than lists."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self.letter_ids = encoder.letter_ids

    def encode_open(self, messages: Sequence[Message]) -> Any:
        """See `PromptEncoder`."""
        return self.encoder.encode_chat(messages, "open").array


class WithThought:
    """Encodes judge prompts with a place for a thought before the lead-in.

    The ids before `THOUGHT` ask the judge for its thought. The ids after it are the lead-in.
    """

    # question ... <|im_start|> assistant ↵   THOUGHT   ↵↵ The better one is Response

    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder = encoder
        self.letter_ids = encoder.letter_ids

    def encode_open(self, messages: Sequence[Message]) -> list[int]:
        """See `PromptEncoder`."""
        lead_in = self.encoder.encode_content(f"\n\n{messages[-1]['content']}")
        return [*self.encoder.encode_prompt(messages[:-1]), THOUGHT, *lead_in]


def encode_orders(
    encoder: PromptEncoder,
    templates: JudgeTemplates,
    principle: str,
    comparison: Comparison,
    max_length: int | None = None,
) -> tuple[list[Any], list[Any]] | None:
    """Encodes the two judge prompts for a comparison: with response `a` first, then with `b` first.

    If a prompt is longer than `max_length` tokens, the oldest turns of the context are dropped.
    Both orders drop the same turns. The question, the responses and the lead-in are always kept.

    Returns:
        The two lists of ids, or `None` if the pair does not fit even without older turns.
    """

    def orders_of(context: str) -> tuple[list[Any], list[Any]] | None:
        given = Comparison(context, comparison.response_a, comparison.response_b)
        orders = (
            encoder.encode_open(templates.render(principle, given)),
            encoder.encode_open(templates.render(principle, given.swapped())),
        )
        fits = max_length is None or max(map(len, orders)) <= max_length
        return orders if fits else None

    best = orders_of(comparison.context)
    if best is not None:
        return best
    # Find how many of the newest turns fit: double the number until the turns no longer fit, then
    # bisect. A trial never keeps more than twice as many turns as the last trial that fit
    # (but at least one turn). If 5 of 8 turns fit, the trials are: 1 fits, 2 fits, 4 fits, 6 does
    # not fit, 5 fits.
    turns = turns_of(comparison.context)
    fitting, too_many = 0, len(turns)
    while too_many - fitting > 1:
        kept = min(max(1, 2 * fitting), (fitting + too_many) // 2)
        orders = orders_of("\n\n".join(turns[-kept:]))
        if orders is None:
            too_many = kept
        else:
            fitting, best = kept, orders
    return best

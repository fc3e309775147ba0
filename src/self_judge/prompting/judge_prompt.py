"""A judge's prompts as token ids: a pair of responses under a template, in both orders.

It knows judge templates. The encoder knows how a chat becomes ids.
"""

from __future__ import annotations

from self_judge.datatypes import Comparison
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates, turns_of


def encode_orders(
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    principle: str,
    comparison: Comparison,
    max_length: int | None = None,
) -> tuple[list[int], list[int]] | None:
    """Judge prompts of a comparison in both orders: a first, then b first.

    A prompt longer than `max_length` tokens loses the oldest turns of its context, the same in
    both orders; never the question, a response or the lead-in.

    Returns:
        The two lists of ids, or `None` when the pair does not fit even so.
    """

    def orders_of(context: str) -> tuple[list[int], list[int]] | None:
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
    # As many of the newest turns as fit: from the question backwards in steps that double, then
    # by halves. What does not fit is never encoded at more than twice the length of what does.
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

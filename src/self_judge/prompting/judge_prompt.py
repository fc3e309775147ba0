"""A judge's question as token ids: the letters after its lead-in, and a pair in both orders.

It knows judge templates. How a chat becomes ids is the encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from self_judge.datatypes import Comparison, Message
from self_judge.errors import EncodingError
from self_judge.prompting.judge_templates import JudgeTemplates, turns_of
from self_judge.prompting.text_tokenizer import ContentTokenizer


class EncodesChats(Protocol):
    """What of a `ChatEncoder` is used here."""

    def encode_open(self, messages: Sequence[Message]) -> list[int]: ...


def letter_ids(
    tokenizer: ContentTokenizer,
    templates: JudgeTemplates,
    token_id_a: int | None = None,
    token_id_b: int | None = None,
) -> tuple[int, int]:
    """The ids of " A" and " B" right after the lead-in of every judge template.

    Args:
        token_id_a, token_id_b: ids to check against the derived ones.

    Raises:
        EncodingError: a letter is not exactly one token there, principles disagree, or a given
            id is not the derived one; both readings are shown.
    """
    show = tokenizer.show
    found: dict[str, tuple[int, str]] = {}
    for principle, template in templates.items():
        lead_in = template.assistant
        before = tokenizer.encode(lead_in)
        for letter in "AB":
            after = tokenizer.encode(f"{lead_in} {letter}")
            added = after[len(before) :]
            if after[: len(before)] != before or len(added) != 1:
                raise EncodingError(
                    f"the letter {letter!r} is not exactly one token after the lead-in of "
                    f"judge template {principle!r}: {show(before[-3:])} becomes "
                    f"{show(after[max(0, len(before) - 3) :])}; change the lead-in's end "
                    "or use a tokenizer with single-token letters"
                )
            known = found.setdefault(letter, (added[0], principle))
            if known[0] != added[0]:
                raise EncodingError(
                    f"the letter {letter!r} is token {show(added)} after the lead-in of "
                    f"{principle!r} but {show([known[0]])} after that of {known[1]!r}: "
                    "let all lead-ins end in the same word"
                )
    for letter, given in (("A", token_id_a), ("B", token_id_b)):
        derived = found[letter][0]
        if given is not None and given != derived:
            raise EncodingError(
                f"token_id_{letter.lower()}={given} is {show([given])}, but after the judge's "
                f"lead-in the letter {letter!r} is {show([derived])}: correct it or leave it out"
            )
    if found["A"][0] == found["B"][0]:
        raise EncodingError(
            f"the letters A and B are the same token {show([found['A'][0]])}: this "
            "tokenizer cannot tell them apart"
        )
    return found["A"][0], found["B"][0]


def encode_orders(
    encoder: EncodesChats,
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

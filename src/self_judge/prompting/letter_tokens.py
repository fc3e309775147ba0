"""Finds the token ids of the letters A and B after a judge's lead-in.

This module uses judge templates and a tokenizer. It does not depend on chats or models.
"""

from __future__ import annotations

from self_judge.errors import EncodingError
from self_judge.prompting.content_tokenizer import ContentTokenizer
from self_judge.prompting.judge_templates import JudgeTemplates


def letter_ids(
    tokenizer: ContentTokenizer,
    templates: JudgeTemplates,
    token_id_a: int | None = None,
    token_id_b: int | None = None,
) -> tuple[int, int]:
    """Returns the ids of " A" and " B" directly after the lead-in of every judge template.

    Args:
        token_id_a, token_id_b: expected ids, which are compared with the derived ids.

    Raises:
        EncodingError: a letter is not exactly one token after a lead-in, its id differs between
            principles, or an expected id differs from the derived id. The message shows both ids.
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
                    f"{show(after[max(0, len(before) - 3) :])}; change the end of the lead-in "
                    "or use a tokenizer with single-token letters"
                )
            known = found.setdefault(letter, (added[0], principle))
            if known[0] != added[0]:
                raise EncodingError(
                    f"the letter {letter!r} is token {show(added)} after the lead-in of "
                    f"{principle!r} but {show([known[0]])} after that of {known[1]!r}: "
                    "end all lead-ins with the same word"
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
            "tokenizer does not distinguish them"
        )
    return found["A"][0], found["B"][0]

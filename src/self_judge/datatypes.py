"""The nouns everything passes around: messages, comparisons, verdicts, responses, pairs, records.

Plain data. This module knows neither tokens, models nor templates, and imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypedDict

Letter = Literal["A", "B"]
Side = Literal["a", "b"]


class Message(TypedDict):
    """One turn of a chat, as the field writes it: `{"role": ..., "content": ...}`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A context and two responses to it, in the order in which they are named, not shown.

    Args:
        context: what the judge is shown as the dialogue (see `judge_templates.dialogue_text`).
        response_a: the response called *a*; it is shown first in the given order.
        response_b: the response called *b*.
    """

    context: str
    response_a: str
    response_b: str

    def swapped(self) -> Comparison:
        """The same comparison with the two responses in the other order."""
        return Comparison(self.context, self.response_b, self.response_a)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge makes of one `Comparison`.

    Attributes:
        preferred: `"a"`, `"b"`, or `None` when the judge cannot decide (an exact tie, a score
            that is not finite, or a pair that does not fit into the judge's `max_length`).
        score_a: mean over principles of s(a) = ½[p(A | a first) + p(B | b first)], in [0, 1].
        score_b: the same for b.
        win_rate: share of principles under which a wins (an exact tie under a principle is half).
        margin: `score_a - score_b`.
        orders_agree: whether both orders, each taken alone and averaged over principles, prefer
            the same response.
        probabilities: `[principle][order][letter]`, full-vocabulary softmax; order 0 shows a first,
            order 1 shows b first; letter 0 is A, letter 1 is B. Empty for a pair that did not fit.
        undecidable_because: one phrase when `preferred` is `None`, else `None`.
    """

    preferred: Side | None
    score_a: float
    score_b: float
    win_rate: float
    margin: float
    orders_agree: bool
    probabilities: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()
    undecidable_because: str | None = None

    def order_margins(self) -> tuple[float, float]:
        """What each order alone says, with a first and with b first: above 0 it prefers a.

        p(a's letter) − p(b's letter), summed over principles; zeros for a pair that did not fit.
        """
        return (
            math.fsum(first[0] - first[1] for first, _ in self.probabilities),
            math.fsum(second[1] - second[0] for _, second in self.probabilities),
        )

    def swapped(self) -> Verdict:
        """The verdict on the swapped comparison."""
        other: dict[Side | None, Side | None] = {"a": "b", "b": "a", None: None}
        return Verdict(
            preferred=other[self.preferred],
            score_a=self.score_b,
            score_b=self.score_a,
            win_rate=1.0 - self.win_rate,
            margin=-self.margin,
            orders_agree=self.orders_agree,
            probabilities=tuple((second, first) for first, second in self.probabilities),
            undecidable_because=self.undecidable_because,
        )


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response, exactly as it was sampled.

    Attributes:
        ids: the sampled token ids, the end-of-turn token included where the model emitted it.
        text: the ids decoded for the judge and for people: no special tokens, no surrounding
            whitespace.
        finished: whether the model ended the response itself (False: it was cut at the limit).
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class LabeledPair:
    """Two responses of which one is better, as the data has it.

    Attributes:
        chosen, rejected: the better and the worse response, as plain text.
        principle: the principle by which `chosen` is better; `None` means in general, and the pair
            is then judged under every template.
        rationale_chosen, rationale_rejected: why each was rated as it was; both or neither.
    """

    chosen: str
    rejected: str
    principle: str | None = None
    rationale_chosen: str | None = None
    rationale_rejected: str | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt with what the data says about answers to it: the unit every source is read into.

    Attributes:
        prompt: the dialogue to answer; starts with an optional system message and ends with a user
            message.
        demonstration: the answer to imitate in supervised fine-tuning, or `None`.
        pairs: the labeled pairs to learn judging from (and to evaluate on); may be empty.
        source, index: where the record came from, for messages about it.
        context: what the judge is shown as the dialogue, where that is not the whole prompt (see
            `records.judge_context`); `None`: it is.
    """

    prompt: tuple[Message, ...]
    demonstration: str | None
    pairs: tuple[LabeledPair, ...]
    source: str
    index: int
    context: str | None = None


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""The shared data types: messages, comparisons, verdicts, responses, pairs and records.

This module does not depend on tokens, models or templates, and it does not import torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypedDict

Letter = Literal["A", "B"]
Side = Literal["a", "b"]


class Message(TypedDict):
    """One turn of a chat in the usual format: `{"role": ..., "content": ...}`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A context and two responses to it. The names `a` and `b` do not imply an order in a prompt.

    Args:
        context: the dialogue as text for a judge prompt (see `judge_templates.dialogue_text`).
        response_a: the response named *a*, which is shown first in order 0 (see `Verdict`).
        response_b: the response named *b*.
    """

    context: str
    response_a: str
    response_b: str

    def swapped(self) -> Comparison:
        """Returns the same comparison with the two responses swapped."""
        return Comparison(self.context, self.response_b, self.response_a)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's decision on one `Comparison`.

    Attributes:
        preferred: `"a"`, `"b"`, or `None` if the judge cannot decide.
        score_a: mean over principles of s(a) = ½[p(A | a first) + p(B | b first)], in [0, 1].
        score_b: the same score for response `b`.
        win_rate: fraction of principles under which response `a` wins (an exact tie counts as
            half).
        margin: `score_a - score_b`.
        orders_agree: whether both orders, averaged over principles, prefer the same response.
        probabilities: the probabilities of the letters in a softmax over the full vocabulary, as
            `[principle][order][letter]`. Order 0 shows response `a` first and order 1 shows
            response `b` first. Letter 0 is A and letter 1 is B. The tuple is empty if the pair
            was not judged.
        undecidable_because: the reason the judge cannot decide: an exact tie, a NaN or infinite
            score, or a pair that was not judged because it exceeds `max_length` or a thought has
            no answer. `None` if the judge can decide.
    """

    preferred: Side | None
    score_a: float
    score_b: float
    win_rate: float
    margin: float
    orders_agree: bool
    probabilities: tuple[tuple[tuple[float, float], tuple[float, float]], ...] = ()
    undecidable_because: str | None = None

    @property
    def is_judged(self) -> bool:
        """Whether both orders were judged with finite scores, even if they are exactly tied."""
        return bool(self.probabilities) and math.isfinite(self.margin)

    def order_margins(self) -> tuple[float, float]:
        """Returns the margins of the two orders: response `a` first, then response `b` first.

        A margin is p(letter of `a`) − p(letter of `b`), summed over principles. If it is positive,
        the order prefers `a`. Both margins are 0 if the pair was not judged.
        """
        return (
            math.fsum(first[0] - first[1] for first, _ in self.probabilities),
            math.fsum(second[1] - second[0] for _, second in self.probabilities),
        )

    @property
    def log_odds(self) -> float:
        """log(s(a) / s(b)), which is positive if response `a` has the higher score.

        It is 0 if the judge cannot decide. Scores below 1e-9 count as 1e-9.
        """
        if self.preferred is None:
            return 0.0
        return math.log(max(self.score_a, 1e-9) / max(self.score_b, 1e-9))

    @property
    def share(self) -> float:
        """s(a) / (s(a) + s(b)), or 0.5 if the judge cannot decide."""
        if self.preferred is None:
            return 0.5
        return self.score_a / (self.score_a + self.score_b)

    def swapped(self) -> Verdict:
        """Returns the verdict on the swapped comparison."""
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
        ids: the sampled token ids, including the end-of-turn token if the model emitted it.
        text: the decoded answer, without the thought, special tokens or surrounding whitespace.
        finished: whether the model ended the response itself and the response has an answer.
            `False` if the response was cut at `max_new_tokens` or has no answer.
        thought: the decoded thought before the answer, or `None`.
        thought_length: the number of ids in the thought, including its markers.
        answered: whether the response has an answer. It has none if its thought never ends, or if
            nothing follows the thought.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool
    thought: str | None = None
    thought_length: int = 0
    answered: bool = True

    @property
    def answer_length(self) -> int:
        """The number of sampled ids that are not part of the thought."""
        return len(self.ids) - self.thought_length

    @property
    def judged(self) -> str:
        """The text for judges and files: the answer, or the thought if there is no answer."""
        if self.answered:
            return self.text
        # A thought delimited by other markers may contain `</think>`, which would end it here.
        return "<think>\n" + (self.thought or "").replace("</think>", "")


@dataclass(frozen=True, slots=True)
class LabeledPair:
    """A better and a worse response, as labeled in the data.

    Attributes:
        chosen, rejected: the better and the worse response, as plain text.
        principle: the principle under which `chosen` is better. `None` means that `chosen` is
            better overall, and the pair is then judged under every template.
        rationale_chosen, rationale_rejected: the reasons for the two ratings; set both or neither.
    """

    chosen: str
    rejected: str
    principle: str | None = None
    rationale_chosen: str | None = None
    rationale_rejected: str | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt with its labeled answers, in the common format of all data sources.

    Attributes:
        prompt: the dialogue to answer. It starts with an optional system message and ends with a
            user message.
        demonstration: the answer to imitate in supervised fine-tuning, or `None`.
        pairs: the labeled pairs for training and evaluating a judge; may be empty.
        source, index: the origin of the record, for error messages.
        context: the dialogue text for a judge prompt if it differs from the prompt; otherwise
            `None` (see `records.judge_context`).
    """

    prompt: tuple[Message, ...]
    demonstration: str | None
    pairs: tuple[LabeledPair, ...]
    source: str
    index: int
    context: str | None = None


def stable_seed(*parts: object) -> int:
    """Returns a 63-bit seed that depends only on the string forms of the given values."""
    text = "\x1f".join(map(str, parts)).encode(errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

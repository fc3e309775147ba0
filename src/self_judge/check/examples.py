"""What a run trains on, token by token: examples to look at and figures of all that was encoded.

It reads ids and labels as the trainers get them. It does not know where they come from, or colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from self_judge.prompting.chat_encoder import ChatEncoder


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one kind.

    Attributes:
        ids: token ids.
        text: what they read, control tokens written out.
        trained: the loss falls on them.
        control: they are control tokens (BOS, turn markers, ends).
    """

    ids: list[int]
    text: str
    trained: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One example as the model sees it."""

    title: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return sum(len(p.ids) for p in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(p.ids) for p in self.pieces if p.trained)


def example_of(
    title: str,
    ids: Sequence[int],
    encoder: ChatEncoder,
    labels: Sequence[int] | None = None,
    ignore_index: int = -100,
) -> Example:
    """Cuts a sequence where training or control tokens begin and end.

    Without labels none of it is trained.
    """
    kinds = [
        (label != ignore_index, encoder.is_control(i))
        for i, label in zip(ids, labels or [ignore_index] * len(ids), strict=True)
    ]
    pieces: list[Piece] = []
    before, end = "", 0
    for (trained, control), group in groupby(kinds):
        start, end = end, end + len(list(group))
        own = list(ids[start:end])
        # Decoded from the start: SentencePiece drops the space in front of a text's first word.
        whole = _decoded(encoder, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else ""
        pieces.append(Piece(own, text or _decoded(encoder, own), trained, control))
        before = whole
    return Example(title, pieces)


def _decoded(encoder: ChatEncoder, ids: Sequence[int]) -> str:
    text = encoder.tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def first_of_each_kind(
    rows: Sequence[Mapping[str, Any]], encoder: ChatEncoder, ignore_index: int = -100
) -> list[Example]:
    """The first row of `jsft_dataset` of every kind: SFT, and each principle in both orders."""
    found: dict[str, Example] = {}
    for row in rows:
        order = "worse response first: B" if row["swapped"] else "better response first: A"
        title = f"judge, {row['principle']}, {order}"
        if row["kind"] == "sft":
            title = "SFT: the dialogue, answers trained"
        if title not in found:
            found[title] = example_of(title, row["input_ids"], encoder, row["labels"], ignore_index)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Figures:
    """Sequences of one kind, in numbers.

    Attributes:
        kind: what they are.
        count: how many.
        tokens: their lengths: `p50`, `p90`, `p99`, `max`.
        trained: mean number of tokens that the loss falls on.
        bos, ends: smallest and largest number of BOS tokens, and of tokens that end an answer.
    """

    kind: str
    count: int
    tokens: dict[str, int]
    trained: float
    bos: tuple[int, int]
    ends: tuple[int, int]


def figures_of(
    kind: str,
    sequences: Sequence[Sequence[int]],
    encoder: ChatEncoder,
    labels: Sequence[Sequence[int]] = (),
    ignore_index: int = -100,
) -> Figures:
    """The figures of some sequences, at least one; without labels none of them is trained."""
    bos, stops = encoder.tokenizer.bos_token_id, set(encoder.stop_token_ids)
    begins = [sum(i == bos for i in ids) if bos is not None else 0 for ids in sequences]
    ends = [sum(i in stops for i in ids) for ids in sequences]
    trained = sum(label != ignore_index for own in labels for label in own)
    return Figures(
        kind,
        len(sequences),
        percentiles([len(ids) for ids in sequences]),
        trained / len(sequences),
        (min(begins), max(begins)),
        (min(ends), max(ends)),
    )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """`p50`, `p90`, `p99` and `max` of at least one number, each of them one of the numbers."""
    ordered = sorted(lengths)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[math.ceil(p * len(ordered)) - 1] for name, p in shares.items()}

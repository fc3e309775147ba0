"""What a run trains on, token by token: samples to look at and figures of all that was encoded.

It reads ids and labels as the trainers get them. It does not know where they come from, or colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
class Sample:
    """One example as the model sees it."""

    title: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return sum(len(p.ids) for p in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(p.ids) for p in self.pieces if p.trained)


def sample_of(
    title: str,
    ids: Sequence[int],
    encoder: ChatEncoder,
    labels: Sequence[int] | None = None,
    ignore_index: int = -100,
) -> Sample:
    """Cuts a sequence where training or control tokens begin and end.

    Without labels none of it is trained.
    """
    trained = [label != ignore_index for label in labels] if labels else [False] * len(ids)
    marked = [
        (t, encoder.is_control(i), i, n) for n, (i, t) in enumerate(zip(ids, trained, strict=True))
    ]
    pieces: list[Piece] = []
    before = ""
    for (is_trained, control), group in groupby(marked, key=lambda m: m[:2]):
        own = list(group)
        # Decoded from the start: SentencePiece drops the space in front of a text's first word.
        whole = _decoded(encoder, ids[: own[-1][3] + 1])
        text = whole[len(before) :] if whole.startswith(before) else ""
        text = text or _decoded(encoder, [m[2] for m in own])
        before = whole
        pieces.append(Piece([m[2] for m in own], text, is_trained, control))
    return Sample(title, pieces)


def _decoded(encoder: ChatEncoder, ids: Sequence[int]) -> str:
    text = encoder.tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


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
    sequences: Iterable[Sequence[int]],
    encoder: ChatEncoder,
    labels: Iterable[Sequence[int]] = (),
    ignore_index: int = -100,
) -> Figures | None:
    """The figures of some sequences; `None` where there are none."""
    bos, stops = encoder.tokenizer.bos_token_id, set(encoder.stop_token_ids)
    lengths, begins, ends = [], [], []
    for ids in sequences:
        lengths.append(len(ids))
        begins.append(sum(i == bos for i in ids) if bos is not None else 0)
        ends.append(sum(i in stops for i in ids))
    if not lengths:
        return None
    trained = [sum(x != ignore_index for x in own) for own in labels]
    return Figures(
        kind,
        len(lengths),
        percentiles(lengths),
        sum(trained) / len(trained) if trained else 0.0,
        (min(begins), max(begins)),
        (min(ends), max(ends)),
    )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """`p50`, `p90`, `p99` and `max` of at least one number, each of them one of the numbers."""
    ordered = sorted(lengths)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[math.ceil(p * len(ordered)) - 1] for name, p in places.items()}


def jsft_samples(
    rows: Iterable[Mapping[str, Any]], encoder: ChatEncoder, ignore_index: int = -100
) -> list[Sample]:
    """The first row of `jsft_dataset` of every kind: SFT, and each principle in both orders."""
    found: dict[str, Sample] = {}
    for row in rows:
        title = title_of(row)
        if title not in found:
            found[title] = sample_of(title, row["input_ids"], encoder, row["labels"], ignore_index)
    return list(found.values())


def title_of(row: Mapping[str, Any]) -> str:
    """What a row of `jsft_dataset` is, in words."""
    if row["kind"] == "sft":
        return "SFT: the dialogue, answers trained"
    order = "worse response first: B" if row["twin"] else "better response first: A"
    return f"judge, {row['principle']}, {order}"

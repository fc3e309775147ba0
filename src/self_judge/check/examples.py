"""Splits training sequences into pieces for display and computes statistics for all sequences.

This module reads the ids and labels that the trainers receive. It does not depend on the data
source or the display.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from self_judge.packing.prefix_tree import shared_length
from self_judge.prompting.chat_encoder import ChatEncoder


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of the same kind.

    Attributes:
        ids: token ids.
        text: the text of the tokens, including control tokens.
        trained: whether the loss includes the tokens.
        control: whether the tokens are control tokens, such as BOS or turn markers.
    """

    ids: list[int]
    text: str
    trained: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Example:
    """An example as the model sees it."""

    title: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return sum(len(p.ids) for p in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(p.ids) for p in self.pieces if p.trained)


@dataclass(frozen=True, slots=True)
class Figures:
    """Statistics for sequences of one kind.

    Attributes:
        kind: the kind of sequence.
        count: the number of sequences.
        tokens: percentiles of the lengths: `p50`, `p90`, `p99`, `max`.
        trained: the mean number of trained tokens per sequence.
        bos, ends: the minimum and maximum number of BOS tokens and of stop tokens per sequence.
    """

    kind: str
    count: int
    tokens: dict[str, int]
    trained: float
    bos: tuple[int, int]
    ends: tuple[int, int]


class Encoded(NamedTuple):
    """An encoded training sequence or prompt from the run.

    Attributes:
        kind: the kind of sequence. Statistics are computed per kind, and a kind may have several
            titles.
        title: the heading of the example.
        ids: token ids.
        labels: the training labels; empty if no token is trained.
        swapped: the ids of a judge prompt in the other order. The two orders differ from the first
            response on, where the example begins a new piece, so that a shortened display shows the
            end of the context and the beginning of the response.
    """

    kind: str
    title: str
    ids: list[int]
    labels: Sequence[int] = ()
    swapped: Sequence[int] = ()


def encoded_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[Encoded]:
    """Converts the rows of `jsft_dataset` to `Encoded` sequences."""
    for before, row, after in zip([{}, *rows], rows, [*rows[1:], {}]):  # noqa: B905
        kind, title, swapped = "SFT", "SFT: the dialogue, with trained answers", []
        if row["kind"] == "judge":
            kind = f"judge, {row['principle']}"
            order = "worse response first: B" if row["swapped"] else "better response first: A"
            title = f"{kind}, {order}"
            swapped = (before if row["swapped"] else after).get("input_ids", [])
        yield Encoded(kind, title, row["input_ids"], row["labels"], swapped)


def summary(
    sequences: Iterable[Encoded], encoder: ChatEncoder, ignore_index: int = -100
) -> tuple[list[Example], list[Figures]]:
    """Returns the first sequence for each title, split into pieces, and statistics by kind."""
    firsts: dict[str, Encoded] = {}
    kinds: dict[str, list[Encoded]] = {}
    for sequence in sequences:
        firsts.setdefault(sequence.title, sequence)
        kinds.setdefault(sequence.kind, []).append(sequence)
    return (
        [_example(first, encoder, ignore_index) for first in firsts.values()],
        [_figures(same, encoder, ignore_index) for same in kinds.values()],
    )


def shared_units(
    rows: Sequence[dict[str, Any]], ignored: int, shared: bool
) -> list[tuple[int, int, int]]:
    """Returns (examples, tokens, trained tokens) for each set of examples that share a row."""
    # Two examples of 100 tokens each that share the first 70 give (2, 130, 2).
    units: list[tuple[int, int, int]] = []
    for row, before in zip(rows, [None, *rows]):  # noqa: B905
        ids, trained = row["input_ids"], sum(x != ignored for x in row["labels"])
        if row["swapped"] and before and shared:
            n, tokens, scored = units[-1]
            own = len(ids) - shared_length(np.asarray(before["input_ids"]), np.asarray(ids))
            units[-1] = (n + 1, tokens + own, scored + trained)
        else:
            units.append((1, len(ids), trained))
    return units


def _example(sequence: Encoded, encoder: ChatEncoder, ignore_index: int) -> Example:
    """Splits a sequence wherever `trained` or `control` changes, and before the first response."""
    ids = sequence.ids
    responses = shared_length(np.asarray(ids), np.asarray(sequence.swapped))
    # The two responses may begin with the same bytes of a character.
    while responses and _decoded(encoder, ids[:responses]).endswith("\ufffd"):
        responses -= 1
    labels = sequence.labels or [ignore_index] * len(ids)
    kinds = [
        (label != ignore_index, encoder.is_control(token), place < responses)
        for place, (token, label) in enumerate(zip(ids, labels, strict=True))
    ]
    pieces: list[Piece] = []
    before, end = "", 0
    for (trained, control, _), group in groupby(kinds):
        start, end = end, end + len(list(group))
        own = ids[start:end]
        # Decode from the start, because SentencePiece drops the space before the first word.
        whole = _decoded(encoder, ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else ""
        pieces.append(Piece(own, text or _decoded(encoder, own), trained, control))
        before = whole
    return Example(sequence.title, pieces)


def _decoded(encoder: ChatEncoder, ids: list[int]) -> str:
    text = encoder.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def _figures(same: list[Encoded], encoder: ChatEncoder, ignore_index: int) -> Figures:
    bos, stops = encoder.tokenizer.bos_token_id, set(encoder.stop_token_ids)
    begins = [s.ids.count(bos) if bos is not None else 0 for s in same]
    ends = [sum(i in stops for i in s.ids) for s in same]
    trained = sum(label != ignore_index for s in same for label in s.labels)
    return Figures(
        same[0].kind,
        len(same),
        percentiles([len(s.ids) for s in same]),
        trained / len(same),
        (min(begins), max(begins)),
        (min(ends), max(ends)),
    )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Computes `p50`, `p90`, `p99` and `max` of one or more numbers, without interpolation."""
    ordered = sorted(lengths)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[math.ceil(p * len(ordered)) - 1] for name, p in shares.items()}

"""UltraFeedback: rated completions -> demonstrations and pairs, in general or per principle.

Pure functions of one record: they do not know where records are stored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from self_judge.data.records import Parsed, RecordRef
from self_judge.datatypes import LabeledPair, Message, PreferenceRecord

# "Text 1 is better than Text 3": the annotator compares with responses the judge will not see.
_OTHER_TEXTS = re.compile(r"\bTexts?\b")


@dataclass(frozen=True, slots=True)
class _Completion:
    text: str
    system: str
    ratings: dict[str, float]
    rationales: dict[str, str]

    @property
    def score(self) -> float:
        return sum(self.ratings.values()) / len(self.ratings)


def select_ultrafeedback(
    record: Mapping[str, Any],
    index: int,
    *,
    seed: int = 0,
    principles: bool | Sequence[str] = False,
    rationales: bool = False,
    with_pairs: bool = True,
    source: str = "ultrafeedback",
) -> Parsed:
    """One UltraFeedback record: an instruction and its rated completions.

    A completion ranks by the mean of its ratings over principles, a tie goes to the longer
    response. The best is the demonstration, with its `custom_system_prompt` as system message.
    In general one pair: the best against a random one with a strictly lower score. With
    `principles` (`True`: all that are rated; or their names) instead one pair per principle:
    a random one among those with different ratings of it; with `rationales` among those whose
    rationales are both there and mention no other "Text" (paper, section on data).

    Random choices depend on the seed, the instruction and the principle alone.

    Raises:
        DataError: a field is missing or has the wrong type.
    """
    where = RecordRef(source, index)
    instruction = where.text(record, "instruction").strip()
    completions = where.items(record, "completions")
    if not instruction:
        return Parsed(None, ("record: empty prompt",))
    if not completions:
        return Parsed(None, ("record: no completions",))
    rated = [
        completion
        for number, raw in enumerate(completions)
        if (completion := _completion(raw, where, f"completions[{number}]")) is not None
    ]
    if not rated:
        return Parsed(None, ("record: no rated response",))
    best = max(rated, key=lambda c: (c.score, len(c.text)))
    drawn: list[tuple[str, LabeledPair | str]] = []  # (what the pair is about, pair or why none)
    if with_pairs and not principles:
        drawn = [("", _general_pair(rated, best, _rng(seed, instruction)))]
    elif with_pairs:
        names = principles if isinstance(principles, Sequence) else _principles_of(rated)
        drawn = [
            (f", {p}", _principle_pair(rated, p, rationales, _rng(seed, instruction, p)))
            for p in names
        ]
    system: list[Message] = [{"role": "system", "content": best.system}] if best.system else []
    selected = PreferenceRecord(
        prompt=(*system, {"role": "user", "content": instruction}),
        demonstration=best.text,
        pairs=tuple(pair for _, pair in drawn if isinstance(pair, LabeledPair)),
        source=source,
        index=index,
        # The other responses were written under other system prompts: what they are compared on
        # is the instruction.
        context=instruction,
    )
    skipped = (f"pair{about}: {why}" for about, why in drawn if isinstance(why, str))
    return Parsed(selected, tuple(skipped))


def _principles_of(rated: Sequence[_Completion]) -> list[str]:
    return sorted({principle for completion in rated for principle in completion.ratings})


def _general_pair(
    rated: Sequence[_Completion], best: _Completion, rng: random.Random
) -> LabeledPair | str:
    """The best against a random completion that scores strictly less, or why there is none."""
    if len(rated) == 1:
        return "a single rated response"
    worse = [c for c in rated if c.score < best.score and c.text != best.text]
    if not worse:
        return "tied scores"
    return LabeledPair(best.text, rng.choice(worse).text)


def _rng(seed: int, *key: str) -> random.Random:
    return random.Random("|".join((str(seed), *key)))


def _principle_pair(
    rated: Sequence[_Completion], principle: str, rationales: bool, rng: random.Random
) -> LabeledPair | str:
    """A random pair with different ratings of the principle, or why there is none."""
    couples = [
        (a, b) if a.ratings[principle] > b.ratings[principle] else (b, a)
        for a, b in combinations([c for c in rated if principle in c.ratings], 2)
        if a.ratings[principle] != b.ratings[principle] and a.text != b.text
    ]
    if not couples:
        return "no two different ratings"
    if not rationales:
        better, worse = rng.choice(couples)
        return LabeledPair(better.text, worse.text, principle)
    couples = [c for c in couples if all(_speaks_for_itself(x, principle) for x in c)]
    if not couples:
        return "a rationale is missing or mentions other texts"
    better, worse = rng.choice(couples)
    return LabeledPair(
        better.text,
        worse.text,
        principle,
        rationale_chosen=better.rationales[principle],
        rationale_rejected=worse.rationales[principle],
    )


def _speaks_for_itself(completion: _Completion, principle: str) -> bool:
    rationale = completion.rationales.get(principle, "")
    return bool(rationale) and not _OTHER_TEXTS.search(rationale)


def _completion(raw: Any, where: RecordRef, field: str) -> _Completion | None:
    """One completion, or `None` when it is empty or no principle of it is rated."""
    if not isinstance(raw, Mapping):
        raise where.expected("an object", raw, field)
    text = where.text(raw, "response", field).strip()
    annotations = where.value(raw, "annotations", field) or {}
    if not isinstance(annotations, Mapping):
        raise where.expected("an object of rated principles", annotations, f"{field}.annotations")
    ratings: dict[str, float] = {}
    rationales: dict[str, str] = {}
    for principle, annotation in annotations.items():
        at = f"{field}.annotations.{principle}"
        if isinstance(annotation, list):  # the older generation wraps each in a list of one
            if len(annotation) > 1:
                raise where.error(at, f"has {len(annotation)} annotations, expected one")
            annotation = annotation[0] if annotation else None
        if annotation is None:
            continue
        if not isinstance(annotation, Mapping):
            raise where.expected("an object", annotation, at)
        rating = where.number(annotation.get("Rating"), f"{at}.Rating")
        if rating is None:
            continue
        ratings[principle] = rating
        # Where both are there, "Rationale" explains the type and this one the rating.
        rationale = annotation.get("Rationale For Rating") or annotation.get("Rationale") or ""
        if not isinstance(rationale, str):
            raise where.expected("text", rationale, f"{at}.Rationale")
        rationales[principle] = rationale.strip()
    if not text or not ratings:
        return None
    system = raw.get("custom_system_prompt") or ""
    if not isinstance(system, str):
        raise where.expected("text", system, f"{field}.custom_system_prompt")
    return _Completion(text, system.strip(), ratings, rationales)

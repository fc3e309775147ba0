"""Converts rated completions from UltraFeedback to demonstrations and pairs.

All functions are pure, and each call processes a single record.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from self_judge.data.records import Parsed, RecordRef, pair_problem, unused_text
from self_judge.datatypes import LabeledPair, Message, PreferenceRecord
from self_judge.prompting.thoughts import NO_ANSWER, answer_of

# Some rationales mention texts that the judge does not see: "Text 1 is better than Text 3".
_OTHER_TEXTS = re.compile(r"\bTexts?(?![a-z])")


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
    line: int | None = None,
) -> Parsed:
    """Parses an UltraFeedback record, which has an instruction and rated completions.

    Completions are ranked by their mean rating over principles, and then by length. The best
    completion becomes the demonstration, and its `custom_system_prompt` becomes the system message.
    By default, there is one pair, which consists of the best completion and a random completion
    with a strictly lower score. `principles` (`True` for all rated principles, or a list of names)
    instead selects one pair per principle: the best completion and a random completion with a lower
    rating under that principle. If there is none, the pair consists of the best completion and a
    random one with a higher rating; if the best is in no pair, the next in the ranking takes its
    place. With `rationales`, both completions also need a rationale that does not mention a "Text"
    (see the paper's section on data).

    Random choices depend only on the seed, the instruction and the principle.

    Raises:
        DataError: a field is missing or has the wrong type.
    """
    where = RecordRef(source, index, line)
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
    unanswered = [c for c in rated if answer_of(c.text) is None]
    rated = [c for c in rated if c not in unanswered]
    if not rated:
        why = NO_ANSWER if unanswered else "no rated response"
        return Parsed(None, (f"record: {why}",))
    ranked = sorted(rated, key=lambda c: (c.score, len(c.text)), reverse=True)
    best = ranked[0]
    drawn: list[tuple[str, LabeledPair | str]] = []  # (suffix for counts, pair or reason)
    if with_pairs and not principles:
        drawn = [("", _general_pair(rated, best, _rng(seed, instruction)))]
    elif with_pairs:
        names = principles if isinstance(principles, Sequence) else _principles_of(rated)
        drawn = [
            (f", {p}", _principle_pair(ranked, p, rationales, _rng(seed, instruction, p)))
            for p in names
        ]
    system: list[Message] = [{"role": "system", "content": best.system}] if best.system else []
    selected = PreferenceRecord(
        prompt=(*system, {"role": "user", "content": instruction}),
        demonstration=best.text,
        pairs=tuple(pair for _, pair in drawn if isinstance(pair, LabeledPair)),
        source=source,
        index=index,
        # Each response was generated with its own system prompt, so the judge sees only the
        # instruction.
        context=instruction,
    )
    skipped = [f"pair{about}: {why}" for about, why in drawn if isinstance(why, str)]
    skipped += [f"response: {NO_ANSWER}" for _ in unanswered]
    unused = tuple(unused_text(record, ("instruction", "completions")))
    return Parsed(selected, tuple(skipped), unused=unused)


def _principles_of(rated: Sequence[_Completion]) -> list[str]:
    return sorted({principle for completion in rated for principle in completion.ratings})


def _general_pair(
    rated: Sequence[_Completion], best: _Completion, rng: random.Random
) -> LabeledPair | str:
    """Pairs the best completion with a random worse one, or returns why there is no such pair."""
    if len(rated) == 1:
        return "a single rated response"
    worse = [c for c in rated if c.score < best.score and not pair_problem(best.text, c.text)]
    if not worse:
        return "tied scores"
    return LabeledPair(best.text, rng.choice(worse).text)


def _rng(seed: int, *key: str) -> random.Random:
    return random.Random("|".join((str(seed), *key)))


def _principle_pair(
    ranked: Sequence[_Completion], principle: str, rationales: bool, rng: random.Random
) -> LabeledPair | str:
    """Returns a pair whose ratings under the principle differ, or why there is none.

    The highest-ranked completion that is in any such pair is paired with a random worse completion
    or, if there is none, with a random better one.
    """
    couples = [
        (a, b) if a.ratings[principle] > b.ratings[principle] else (b, a)
        for a, b in combinations([c for c in ranked if principle in c.ratings], 2)
        if a.ratings[principle] != b.ratings[principle] and not pair_problem(a.text, b.text)
    ]
    if not couples:
        return "no two different ratings"
    if rationales:
        couples = [c for c in couples if all(_has_own_rationale(x, principle) for x in c)]
    if not couples:
        return "a rationale is missing or mentions other texts"
    first = next(c for c in ranked if any(c is a or c is b for a, b in couples))
    won = [couple for couple in couples if couple[0] is first]
    better, worse = rng.choice(won or [couple for couple in couples if couple[1] is first])
    return LabeledPair(
        better.text,
        worse.text,
        principle,
        rationale_chosen=better.rationales[principle] if rationales else None,
        rationale_rejected=worse.rationales[principle] if rationales else None,
    )


def _has_own_rationale(completion: _Completion, principle: str) -> bool:
    rationale = completion.rationales.get(principle, "")
    return bool(rationale) and not _OTHER_TEXTS.search(rationale)


def _completion(raw: Any, where: RecordRef, field: str) -> _Completion | None:
    """Parses one completion, or returns `None` if it is empty or has no rating."""
    if not isinstance(raw, Mapping):
        raise where.expected("an object", raw, field)
    text = where.text(raw, "response", field).strip()
    annotations = where.value(raw, "annotations", field) or {}
    if not isinstance(annotations, Mapping):
        raise where.expected("an object of annotations", annotations, f"{field}.annotations")
    ratings: dict[str, float] = {}
    rationales: dict[str, str] = {}
    for principle, annotation in annotations.items():
        at = f"{field}.annotations.{principle}"
        if isinstance(annotation, list):  # older data wraps each annotation in a list
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
        # If both exist, "Rationale" explains the type and "Rationale For Rating" explains the
        # rating. As in the method, they are joined.
        parts = [annotation.get(name) or "" for name in ("Rationale", "Rationale For Rating")]
        for part in parts:
            if not isinstance(part, str):
                raise where.expected("text", part, f"{at}.Rationale")
        rationales[principle] = " ".join(filter(None, map(str.strip, parts)))
    if not text or not ratings:
        return None
    system = raw.get("custom_system_prompt") or ""
    if not isinstance(system, str):
        raise where.expected("text", system, f"{field}.custom_system_prompt")
    return _Completion(text, system.strip(), ratings, rationales)

"""A small synthetic world of questions about animals, with a known gold rubric.

This module generates instructions and imperfect responses, and rates any response under four
principles with fixed rules. `synthetic.py` adds data formats, a tokenizer and a model.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Split = Literal["train", "test"]

PRINCIPLES = ("helpfulness", "honesty", "instruction_following", "truthfulness")

# For each animal: its color, food and home.
FACTS: dict[str, tuple[str, str, str]] = {
    "fox": ("red", "meat", "forest"),
    "owl": ("gray", "meat", "forest"),
    "hen": ("red", "seeds", "barn"),
    "pig": ("white", "seeds", "barn"),
    "cow": ("black", "grass", "barn"),
    "bat": ("black", "seeds", "cave"),
    "swan": ("white", "grass", "river"),
    "otter": ("gray", "fish", "river"),
}
QUESTIONS = ("What color is the {}?", "What does the {} eat?", "Where does the {} live?")
STATEMENTS = ("the {} is {}", "the {} eats {}", "the {} lives in the {}")
VALUES = tuple(tuple(sorted({fact[i] for fact in FACTS.values()})) for i in range(3))
# Values that are false for every animal. Most false statements use one of these values, and the
# rest use another animal's value.
ABSURD = ("glass", "gold", "paper", "plastic")
HEDGE, BOAST = "I think", "Trust me,"
TIPS = ("Look for it at dawn.", "Ask a guide for more.", "Read about it in books.")
CHATTER = ("That is a nice question.", "I like to talk today.", "We all love animals.")
CLOSERS = ("Thanks", "Bye")
PREFIXES = (
    "",
    "Tell me:",
    "Please answer:",
    "One question:",
    "Quick question:",
    "Hello!",
    "Hello! Tell me:",
    "Say:",
    "I ask you:",
    "My question:",
    "Hello! One question:",
    "Now tell me:",
    "Now say:",
    "Please tell me:",
    "Please say:",
    "Answer this:",
)
# Each writer's fault rate, which scales the probability of an error in each part of a response.
WRITERS: dict[str, float] = {
    "synthetic-owl": 0.4,
    "synthetic-crow": 0.5,
    "synthetic-dove": 0.6,
    "synthetic-gull": 0.7,
}

_INSTRUCTION = re.compile(
    r"(?:.*[:!] )?(?P<question>(?:What|Where) [a-z ]+\?) End with (?P<closer>\w+)\."
)
_SENTENCE = re.compile(r"[^.!?]*[.!?]\s*|[^.!?]+$")


class Rating(NamedTuple):
    """A rating from 1 to 5 under one principle, with its rationale."""

    rating: int
    rationale: str


@dataclass(frozen=True, slots=True)
class Task:
    """The task in an instruction: state a fact about an animal and end with a given word."""

    animal: str
    relation: int  # 0 color, 1 food, 2 home
    closer: str

    @property
    def answer(self) -> str:
        return FACTS[self.animal][self.relation]


@lru_cache(maxsize=4096)
def task_of(instruction: str) -> Task:
    """Parses an instruction of this world.

    Raises:
        ValueError: the text is not an instruction of this world.
    """
    match = _INSTRUCTION.fullmatch(instruction.strip())
    if match:
        for relation, question in enumerate(QUESTIONS):
            for animal in FACTS:
                if match["question"] == question.format(animal):
                    return Task(animal, relation, match["closer"])
    raise ValueError(f"not an instruction of the synthetic world: {instruction!r:.80}")


@dataclass(slots=True)
class _Reading:
    """The parsed sentences of a response."""

    claims: list[tuple[str, str, int, str]]  # modal, animal, relation, value
    tips: int = 0
    chatter: int = 0
    closer: str | None = None  # the last sentence, if it is a closer
    senseless: int = 0


_MODAL = rf"(?:(?P<modal>{HEDGE}|{BOAST}) )?"
_CLAIMS = [
    re.compile(_MODAL + s.format("(?P<animal>[a-z]+)", "(?P<value>[a-z]+)"), re.IGNORECASE)
    for s in STATEMENTS
]


def _read(response: str) -> _Reading:
    reading = _Reading([])
    seen: set[str] = set()
    sentences = [s.strip() for s in _SENTENCE.findall(response.strip()) if s.strip()]
    for index, sentence in enumerate(sentences):
        body = sentence.rstrip(".!?")
        claim = next(
            ((r, m) for r, pattern in enumerate(_CLAIMS) if (m := pattern.fullmatch(body))), None
        )
        if sentence in seen:
            reading.senseless += 1
        elif claim is not None and sentence.endswith("."):
            relation, match = claim
            reading.claims.append((match["modal"] or "", match["animal"], relation, match["value"]))
        elif sentence in TIPS:
            reading.tips += 1
        elif sentence in CHATTER:
            reading.chatter += 1
        elif body in CLOSERS and sentence.endswith("!") and index == len(sentences) - 1:
            reading.closer = body
        else:
            reading.senseless += 1
        seen.add(sentence)
    return reading


def gold_ratings(instruction: str, response: str) -> dict[str, Rating]:
    """Returns the gold ratings of any response under every principle, with rationales.

    Helpfulness requires an answer and a tip without chatter. Honesty requires a hedge, because an
    answer from memory may be wrong, and forbids boasting. Instruction following requires the
    requested last word. Truthfulness requires at least one claim, and every claim must be true. A
    response with a senseless sentence is not helpful.

    Raises:
        ValueError: the instruction is not from this world.
    """
    task = task_of(instruction)
    reading = _read(response)
    on_topic = [c for c in reading.claims if (c[1], c[2]) == (task.animal, task.relation)]
    return {
        "helpfulness": _helpfulness(reading, bool(on_topic)),
        "honesty": _honesty(on_topic[0][0] if on_topic else None),
        "instruction_following": _instruction_following(task, reading),
        "truthfulness": _truthfulness(reading),
    }


def gold_score(instruction: str, response: str) -> float:
    """Returns the mean of the four gold ratings, scaled to [0, 1]."""
    ratings = gold_ratings(instruction, response).values()
    return sum(rating - 1 for rating, _ in ratings) / (4 * len(PRINCIPLES))


def gold_reasons(instruction: str, response: str) -> str:
    """Returns the rationales of the gold ratings as one phrase: `"true, right word, boasts, …"`."""
    ratings = gold_ratings(instruction, response)
    return ", ".join(ratings[p].rationale.rstrip(".").lower() for p in reversed(PRINCIPLES))


def _helpfulness(reading: _Reading, answered: bool) -> Rating:
    if reading.senseless:
        return Rating(1, "Makes no sense.")
    if not answered:
        return Rating(1, "No answer.")
    if reading.chatter:
        return Rating(1, "Too chatty.")
    return Rating(5, "Answer and tip.") if reading.tips else Rating(3, "Lacks a tip.")


def _honesty(modal: str | None) -> Rating:
    if modal is None:
        return Rating(1, "Avoids the question.")
    if modal == BOAST:
        return Rating(1, "Boasts.")
    return Rating(5, "Says its doubt.") if modal == HEDGE else Rating(3, "Hides its doubt.")


def _instruction_following(task: Task, reading: _Reading) -> Rating:
    if reading.closer == task.closer:
        return Rating(5, "Right word.")
    return Rating(1, "Wrong word." if reading.closer else "Missing word.")


def _truthfulness(reading: _Reading) -> Rating:
    if not reading.claims:
        return Rating(1, "Claims nothing.")
    true = all(
        animal in FACTS and FACTS[animal][relation] == value
        for _, animal, relation, value in reading.claims
    )
    return Rating(5, "True.") if true else Rating(1, "False.")


# --- generating instructions and responses --------------------------------------------------------


def is_held_out(instruction: str) -> bool:
    """Returns whether an instruction is in the test split, based only on its text."""
    return zlib.crc32(instruction.encode()) % 3 == 0


@lru_cache(maxsize=2)
def all_instructions(split: Split) -> tuple[str, ...]:
    """Returns all instructions in a split. The two splits never share an instruction.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    made = (
        " ".join(part for part in (prefix, question.format(animal), f"End with {closer}.") if part)
        for prefix, question, animal, closer in itertools.product(
            PREFIXES, QUESTIONS, FACTS, CLOSERS
        )
    )
    return tuple(i for i in made if is_held_out(i) == (split == "test"))


class Completion(NamedTuple):
    """One writer's response to an instruction, with its gold ratings."""

    writer: str
    response: str
    ratings: dict[str, Rating]

    @property
    def score(self) -> float:
        """The mean rating, from 1 to 5."""
        return sum(rating for rating, _ in self.ratings.values()) / len(self.ratings)


def write(task: Task, fault: float, g: random.Random) -> str:
    """Writes a response. The probability of an error in each part is proportional to `fault`."""
    animal, relation = task.animal, task.relation
    if g.random() < 0.15 * fault:
        animal = g.choice(list(FACTS))
    value = FACTS[animal][relation]
    if g.random() < 0.6 * fault:
        value = g.choice(ABSURD if g.random() < 0.5 else VALUES[relation])
    claim = STATEMENTS[relation].format(animal, value)
    modal = HEDGE
    if g.random() < fault:
        modal = g.choice((BOAST, ""))
    claim = f"{modal} {claim}." if modal else f"{claim[0].upper()}{claim[1:]}."
    sentences = [] if g.random() < 0.1 * fault else [claim]
    if g.random() >= fault:
        sentences.append(g.choice(TIPS))
    elif g.random() < 0.5:
        sentences.append(g.choice(CHATTER))
    if g.random() < 0.05 * fault and sentences:  # a repetition, or a truncated sentence
        last = sentences[-1]
        sentences.append(last if g.random() < 0.5 else last.rsplit(" ", 1)[0])
    if g.random() >= 0.7 * fault:
        sentences.append(f"{task.closer}!")
    elif g.random() < 0.6:
        sentences.append(f"{g.choice([c for c in CLOSERS if c != task.closer])}!")
    return " ".join(sentences) or f"{task.closer}!"


def completions(instruction: str, count: int, g: random.Random) -> list[Completion]:
    """Samples responses from `count` writers. At least two responses have different scores."""
    task = task_of(instruction)
    while True:
        written: list[Completion] = []
        for writer in g.sample(list(WRITERS), count):
            response = write(task, WRITERS[writer], g)
            written.append(Completion(writer, response, gold_ratings(instruction, response)))
        if len({completion.score for completion in written}) > 1:
            return written


def best(written: list[Completion]) -> Completion:
    """Returns the best completion. In a tie, the longest completion wins, as in the paper."""
    return max(written, key=lambda c: (c.score, len(c.response)))

"""A small synthetic world of questions about animals, with a known gold rubric.

This module generates instructions and imperfect responses, and rates any response under four
principles with fixed rules. `synthetic.py` adds data formats, a tokenizer and a model.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Iterator
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
    "swan": ("white", "grass", "river"),
}
# For each animal, a relation and a popular mistake, which most writers believe.
MISCONCEPTIONS: dict[str, tuple[int, str]] = {
    "fox": (2, "barn"),
    "owl": (1, "seeds"),
    "hen": (0, "white"),
    "pig": (1, "meat"),
    "cow": (0, "red"),
    "swan": (1, "seeds"),
}
# By relation: two ways to ask for a fact, one to check a statement, and two to ask for an animal.
ASK = (
    ("What color is the {}?", "Say the color of the {}."),
    ("What does the {} eat?", "Say the food of the {}."),
    ("Where does the {} live?", "Say the home of the {}."),
)
CHECK = ("Is the {} {}?", "Does the {} eat {}?", "Does the {} live in the {}?")
NAME = (
    ("Which animal is {}?", "Find an animal that is {}."),
    ("Which animal eats {}?", "Find an animal that eats {}."),
    ("Which animal lives in the {}?", "Find an animal that lives in the {}."),
)
# Two ways to state a fact, by relation.
STATEMENTS = (
    ("the {animal} is {value}", "the color of the {animal} is {value}"),
    ("the {animal} eats {value}", "the food of the {animal} is {value}"),
    ("the {animal} lives in the {value}", "the home of the {animal} is the {value}"),
)
# Yes or no follows the fact: a tiny model cannot retrieve and compare it at the same time.
CONCLUSION = ", so {}"
VALUES = tuple(tuple(sorted({fact[i] for fact in FACTS.values()})) for i in range(3))
ABSURD = ("glass", "gold", "paper", "plastic")  # false for every animal
HEDGE, BOAST = "I think", "Trust me,"
TIPS = ("Look for it at dawn.", "Ask a guide for more.", "Read about it in books.")
CHATTER = ("That is a nice question.", "I like to talk today.", "We all love animals.")
OPENERS, CLOSERS = ("Sure", "Well"), ("Thanks", "Bye")
BRIEF = "Be brief."
DEMANDS = (*(f"Start with {w}." for w in OPENERS), *(f"End with {w}." for w in CLOSERS), BRIEF)
PREFIXES = (
    "",
    "Tell me:",
    "Please answer:",
    "One question:",
    "Hello!",
    "Hello! Tell me:",
    "My question:",
    "Now say:",
)
CLEAR = 1.0  # the smallest difference in score (1 to 5) that annotators label; ties are left out
# Each writer's fault rate, which scales the probability of an error in each part of a response.
WRITERS: dict[str, float] = {
    "synthetic-owl": 0.4,
    "synthetic-crow": 0.5,
    "synthetic-dove": 0.6,
    "synthetic-gull": 0.7,
}

_SENTENCE = re.compile(r"[^.!?]*[.!?]\s*|[^.!?]+$")


class Rating(NamedTuple):
    """A rating from 1 to 5 under one principle, with its rationale."""

    rating: int
    rationale: str


@dataclass(frozen=True, slots=True)
class Task:
    """The task in an instruction: a question and a demand on the form of the response.

    A question without a value asks for a fact about an animal, a question without an animal asks
    for an animal, and a question with both asks whether the statement is true.
    """

    relation: int  # 0 color, 1 food, 2 home
    animal: str | None
    value: str | None
    demand: str

    @property
    def answers(self) -> tuple[str, ...]:
        """The correct answers: values, animals, or yes or no."""
        if self.animal is None:
            return tuple(a for a, fact in FACTS.items() if fact[self.relation] == self.value)
        truth = FACTS[self.animal][self.relation]
        return (truth,) if self.value is None else ("yes" if self.value == truth else "no",)


def _questions() -> Iterator[tuple[str, Task]]:
    for relation, values in enumerate(VALUES):
        for animal, fact in FACTS.items():
            for question in ASK[relation]:
                yield question.format(animal), Task(relation, animal, None, "")
            mistaken, belief = MISCONCEPTIONS[animal]
            false = (
                belief if mistaken == relation else next(v for v in values if v != fact[relation])
            )
            for value in (fact[relation], false):
                question = CHECK[relation].format(animal, value)
                yield question, Task(relation, animal, value, "")
        for value in values:
            for question in NAME[relation]:
                yield question.format(value), Task(relation, None, value, "")


@lru_cache(maxsize=1)
def _tasks() -> dict[str, Task]:
    """The task of each instruction, without its prefix."""
    return {
        f"{question} {demand}": Task(task.relation, task.animal, task.value, demand)
        for question, task in _questions()
        for demand in DEMANDS
    }


def task_of(instruction: str) -> Task:
    """Parses an instruction of this world.

    Raises:
        ValueError: the text is not an instruction of this world.
    """
    task = _tasks().get(re.split("[:!] ", instruction.strip())[-1])
    if task is None:
        raise ValueError(f"not an instruction of the synthetic world: {instruction!r:.80}")
    return task


class Claim(NamedTuple):
    """A statement in a response. Its parts may be no words of this world."""

    reply: str  # "yes", "no" or ""
    modal: str  # HEDGE, BOAST or ""
    relation: int
    animal: str
    value: str

    @property
    def true(self) -> bool:
        return self.animal in FACTS and FACTS[self.animal][self.relation] == self.value

    def answers(self, task: Task) -> bool:
        """Returns whether the statement answers the question, truly or not."""
        if self.relation != task.relation or bool(self.reply) != bool(task.animal and task.value):
            return False
        return self.value == task.value if task.animal is None else self.animal == task.animal

    def contradicts_itself(self, task: Task) -> bool:
        """Returns whether a yes or no does not follow from its statement."""
        return bool(self.reply) and (self.reply == "yes") != (self.value == task.value)


@dataclass(slots=True)
class _Reading:
    """The parsed sentences of a response."""

    claims: list[Claim]
    sentences: int = 0
    tips: int = 0
    chatter: int = 0
    opener: str | None = None  # the first sentence, if it is an opener
    closer: str | None = None  # the last sentence, if it is a closer
    senseless: int = 0


_STATED = [
    (
        relation,
        re.compile(
            rf"(?:(?P<modal>{HEDGE}|{BOAST}) )?"
            + form.format(animal="(?P<animal>[a-z]+)", value="(?P<value>[a-z]+)")
            + f"(?:{CONCLUSION.format('(?P<reply>yes|no)')})?",
            re.IGNORECASE,
        ),
    )
    for relation, forms in enumerate(STATEMENTS)
    for form in forms
]
_MODALS = {modal.lower(): modal for modal in (HEDGE, BOAST)}


def _claim(sentence: str) -> Claim | None:
    for relation, pattern in _STATED:
        if match := pattern.fullmatch(sentence):
            reply, modal = (match["reply"] or "").lower(), (match["modal"] or "").lower()
            animal, value = match["animal"].lower(), match["value"].lower()
            return Claim(reply, _MODALS.get(modal, ""), relation, animal, value)
    return None


def _read(response: str) -> _Reading:
    sentences = [s.strip() for s in _SENTENCE.findall(response.strip()) if s.strip()]
    reading = _Reading([], len(sentences))
    seen: set[tuple[object, ...]] = set()
    for index, sentence in enumerate(sentences):
        body, end = sentence[:-1], sentence[-1]
        claim = _claim(body) if end == "." else None
        # A statement in other words is still a repetition.
        content = (sentence,) if claim is None else claim[2:]
        if content in seen:
            reading.senseless += 1
        elif claim is not None:
            reading.claims.append(claim)
        elif sentence in TIPS:
            reading.tips += 1
        elif sentence in CHATTER:
            reading.chatter += 1
        elif body in OPENERS and end == "!" and index == 0:
            reading.opener = body
        elif body in CLOSERS and end == "!" and index == len(sentences) - 1:
            reading.closer = body
        else:
            reading.senseless += 1
        seen.add(content)
    return reading


def gold_ratings(instruction: str, response: str) -> dict[str, Rating]:
    """Returns the gold ratings of any response under every principle, with rationales.

    Helpfulness requires an answer and a tip without chatter, or only an answer if the response
    must be brief. Honesty requires a hedge, because an answer from memory may be wrong, and forbids
    boasting. Instruction following requires the requested first or last word, or one sentence.
    Truthfulness requires at least one claim; every claim must be true and agree with its yes or no.
    A response with a senseless or repeated sentence is not helpful.

    Raises:
        ValueError: the instruction is not from this world.
    """
    task = task_of(instruction)
    reading = _read(response)
    answer = next((claim for claim in reading.claims if claim.answers(task)), None)
    return {
        "helpfulness": _helpfulness(task, reading, answer is not None),
        "honesty": _honesty(answer),
        "instruction_following": _instruction_following(task, reading),
        "truthfulness": _truthfulness(task, reading),
    }


def gold_score(instruction: str, response: str) -> float:
    """Returns the mean of the four gold ratings, scaled to [0, 1]."""
    ratings = gold_ratings(instruction, response).values()
    return sum(rating - 1 for rating, _ in ratings) / (4 * len(PRINCIPLES))


def gold_reasons(instruction: str, response: str) -> str:
    """Returns the rationales of the gold ratings as one phrase: `"true, right word, boasts, …"`."""
    ratings = gold_ratings(instruction, response)
    return ", ".join(ratings[p].rationale.rstrip(".").lower() for p in reversed(PRINCIPLES))


def _helpfulness(task: Task, reading: _Reading, answered: bool) -> Rating:
    if reading.senseless:
        return Rating(1, "Makes no sense.")
    if not answered:
        return Rating(1, "No answer.")
    if reading.chatter:
        return Rating(1, "Too chatty.")
    if task.demand == BRIEF:
        return Rating(3, "Needs no tip.") if reading.tips else Rating(5, "Just the answer.")
    return Rating(5, "Answer and tip.") if reading.tips else Rating(3, "Lacks a tip.")


def _honesty(answer: Claim | None) -> Rating:
    if answer is None:
        return Rating(1, "Avoids the question.")
    if answer.modal == BOAST:
        return Rating(1, "Boasts.")
    return Rating(5, "Says its doubt.") if answer.modal else Rating(3, "Hides its doubt.")


def _instruction_following(task: Task, reading: _Reading) -> Rating:
    if task.demand == BRIEF:
        return Rating(5, "Brief.") if reading.sentences == 1 else Rating(1, "Too long.")
    demanded, words = task.demand.rstrip(".").rsplit(" ", 1)[1], (reading.opener, reading.closer)
    if demanded in words:
        return Rating(5, "Right word.")
    return Rating(1, "Wrong word." if any(words) else "Missing word.")


def _truthfulness(task: Task, reading: _Reading) -> Rating:
    if not reading.claims:
        return Rating(1, "Claims nothing.")
    if any(claim.contradicts_itself(task) for claim in reading.claims):
        return Rating(1, "Contradicts itself.")
    return Rating(5, "True.") if all(c.true for c in reading.claims) else Rating(1, "False.")


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
    made = (f"{prefix} {task}".strip() for prefix, task in itertools.product(PREFIXES, _tasks()))
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


def _believed(animal: str, relation: int, fault: float, g: random.Random) -> str:
    """Returns what a writer believes about an animal: a popular mistake, the truth or a slip."""
    mistaken, belief = MISCONCEPTIONS[animal]
    if mistaken == relation and g.random() < 0.7:
        return belief
    if g.random() < 0.5 * fault:
        return g.choice(ABSURD if g.random() < 0.5 else VALUES[relation])
    return FACTS[animal][relation]


def _stated(task: Task, fault: float, g: random.Random) -> list[str]:
    """Writes the statements that answer the question, usually one."""
    relation, animal = task.relation, task.animal or g.choice(list(FACTS))
    if task.animal is None and g.random() >= 0.6 * fault:
        believed = [a for a, belief in MISCONCEPTIONS.items() if belief == (relation, task.value)]
        animal = g.choice(believed if believed and g.random() < 0.7 else task.answers)
    elif g.random() < 0.15 * fault:  # off topic: another animal or relation
        animal, relation = g.choice(list(FACTS)), g.choice((0, 1, 2))
    value = _believed(animal, relation, fault, g)
    if task.animal is None and g.random() >= 0.1 * fault:
        value = str(task.value)
    reply = ""
    if task.animal and task.value and g.random() >= 0.5 * fault:
        reply = "yes" if (value == task.value) == (g.random() >= 0.1 * fault) else "no"
    elif g.random() < 0.2 * fault:  # an answer to another kind of question
        reply = g.choice(("yes", "no"))
    modal = HEDGE if g.random() >= 1.2 * fault else g.choice((BOAST, ""))
    statement = g.choice(STATEMENTS[relation]).format(animal=animal, value=value)
    conclusion = CONCLUSION.format(reply) if reply else ""
    stated = [f"{modal} {statement}{conclusion}".strip()]
    if g.random() < 0.15 * fault:  # another statement about the same fact, which may contradict it
        other = g.choice(VALUES[relation])
        stated.append(g.choice(STATEMENTS[relation]).format(animal=animal, value=other))
    return [f"{s[0].upper()}{s[1:]}." for s in stated]


def write(task: Task, fault: float, g: random.Random) -> str:
    """Writes a response. The probability of an error in each part is proportional to `fault`."""
    sentences = [] if g.random() < 0.1 * fault else _stated(task, fault, g)
    brief = task.demand == BRIEF
    if g.random() < (0.6 * fault if brief else 1 - fault):
        sentences.insert(len(sentences) if g.random() < 0.7 else 0, g.choice(TIPS))
    if g.random() < 0.6 * fault:
        sentences.insert(len(sentences) if g.random() < 0.7 else 0, g.choice(CHATTER))
    if g.random() < 0.05 * fault and sentences:  # a repetition, or a truncated sentence
        last = sentences[-1]
        sentences.append(last if g.random() < 0.5 else last.rsplit(" ", 1)[0])
    word = "" if brief else task.demand.rstrip(".").rsplit(" ", 1)[1]
    if g.random() < (0.3 if brief else 0.7) * fault:  # another word, or none
        others = [w for w in (*OPENERS, *CLOSERS) if w != word]
        word = g.choice(others) if g.random() < 0.6 else ""
    if word in OPENERS:
        sentences.insert(0, f"{word}!")
    elif word:
        sentences.append(f"{word}!")
    return " ".join(sentences) or "Well!"


def reading(g: random.Random) -> str:
    """Writes what a base model reads: a statement, maybe after a question, and if it is true."""
    relation, (animal, facts) = g.randrange(3), g.choice(list(FACTS.items()))
    false = [v for v in (*VALUES[relation], *ABSURD) if v != facts[relation]]
    value = facts[relation] if g.random() < 0.6 else g.choice(false)
    statement = g.choice(STATEMENTS[relation]).format(animal=animal, value=value)
    text = g.choice(("{}", f"{HEDGE} {{}}", f"{BOAST} {{}}")).format(statement)
    text, true = f"{text[0].upper()}{text[1:]}", value not in false
    question, kind = "", g.random()
    if kind < 0.15:
        question = g.choice(NAME[relation]).format(value)
    elif kind < 0.35:
        question = g.choice(ASK[relation]).format(animal)
    elif kind < 0.95:
        # Few contradictions, and as many questions for yes as for no, so that a model compares.
        same, agrees = g.random() < 0.5, g.random() < 0.9
        asked = value if same else g.choice([v for v in VALUES[relation] if v != value])
        question = CHECK[relation].format(animal, asked)
        reply, true = "yes" if same == agrees else "no", true and agrees
        text += CONCLUSION.format(reply)
    if question:
        text = f"{g.choice(PREFIXES)} {question} {g.choice(DEMANDS)} {text}".strip()
    return f"{text}. {'True' if true else 'False'}."


def completions(instruction: str, count: int, g: random.Random) -> list[Completion]:
    """Samples responses from `count` writers. The best and the worst differ clearly."""
    task = task_of(instruction)
    while True:
        written: list[Completion] = []
        for writer in g.sample(list(WRITERS), count):
            response = write(task, WRITERS[writer], g)
            written.append(Completion(writer, response, gold_ratings(instruction, response)))
        if max(c.score for c in written) - min(c.score for c in written) >= CLEAR:
            return written


def best(written: list[Completion]) -> Completion:
    """Returns the best completion. In a tie, the longest completion wins, as in the paper."""
    return max(written, key=lambda c: (c.score, len(c.response)))

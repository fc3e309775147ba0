"""A small synthetic preference world with a known gold rubric: the embedded default of the demo.

Makes instructions, imperfect responses and their gold ratings from a seed, in the formats that
`sources.py` reads, and a tiny tokenizer and model for them. It does not know how they are trained.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from self_judge.comparison import LabeledPair, Message, PreferenceRecord
from self_judge.templates import JudgeTemplates

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Split = Literal["train", "test"]
DatasetKind = Literal["hh", "ultrafeedback", "preference"]

PRINCIPLES = ("helpfulness", "honesty", "instruction_following", "truthfulness")

# --- what is true ---------------------------------------------------------------------------------

_FACTS: dict[str, dict[str, str]] = {
    animal: {"food": food, "home": home, "color": color}
    for animal, food, home, color in (
        ("cow", "grass", "barn", "brown"),
        ("pig", "roots", "barn", "pink"),
        ("hen", "seeds", "barn", "white"),
        ("fox", "meat", "forest", "orange"),
        ("bear", "fruit", "forest", "brown"),
        ("deer", "leaves", "forest", "yellow"),
        ("otter", "fish", "river", "gray"),
        ("frog", "insects", "river", "green"),
        ("camel", "leaves", "desert", "yellow"),
        ("lizard", "insects", "desert", "green"),
        ("shark", "meat", "ocean", "gray"),
        ("whale", "fish", "ocean", "black"),
        ("parrot", "fruit", "jungle", "green"),
        ("tiger", "meat", "jungle", "orange"),
        ("rabbit", "grass", "meadow", "white"),
        ("mole", "roots", "meadow", "black"),
    )
}
# Nobody in this world knows these; whoever answers has made it up.
_INVENTED: dict[str, tuple[str, ...]] = {
    "name": ("Max", "Bella", "Rex", "Luna"),
    "age": ("two", "five", "nine"),
    "dream": ("rain", "snow", "stars"),
}
_QUESTIONS: dict[str, str] = {
    "food": "What does the {} eat?",
    "home": "Where does the {} live?",
    "color": "What color is the {}?",
    "name": "What name has the {}?",
    "age": "How old is the {}?",
    "dream": "What does the {} dream?",
}
_STATEMENTS: dict[str, str] = {
    "food": "{} eats {}.",
    "home": "{} lives in the {}.",
    "color": "{} is {}.",
    "name": "{} has the name {}.",
    "age": "{} is {} years old.",
    "dream": "{} dreams of {}.",
}
_VALUES: dict[str, tuple[str, ...]] = {
    relation: tuple(sorted({facts[relation] for facts in _FACTS.values()}))
    for relation in ("food", "home", "color")
} | _INVENTED
_PREFIXES = (
    "",
    "Tell me:",
    "My son asks:",
    "For school:",
    "Quick question:",
    "I wonder:",
    "My friend asks:",
    "Please answer:",
)
_OPENERS = ("Hello", "Sure", "Well", "Greetings")
_CLOSERS = ("Thanks", "Cheers", "Bye", "Enjoy")
_CONSTRAINTS = (
    *(f"Start with {word}." for word in _OPENERS),
    *(f"End with {word}." for word in _CLOSERS),
    "Use one sentence.",
    "Use one sentence.",
)
_IGNORANCE = "I do not know that."
_CHATTER = ("That is a nice question.", "I like to talk today.", "We all love the animals.")
_HEDGE, _BOAST = "Maybe", "Surely"


def _alternatives(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words)


_INSTRUCTION = re.compile(
    rf"(?:(?:{_alternatives(p for p in _PREFIXES if p)}) )?(?:"
    + "|".join(
        f"(?P<{relation}>{re.escape(question).replace(re.escape('{}'), '[a-z]+')})"
        for relation, question in _QUESTIONS.items()
    )
    + rf") (?P<constraint>{_alternatives(dict.fromkeys(_CONSTRAINTS))})"
)
_SENTENCE = re.compile(r"[^.!?]*[.!?]\s*|[^.!?]+$")
_CLAIM = re.compile(
    rf"(?:(?P<modal>{_HEDGE}|{_BOAST}) )?(?P<subject>it|the (?:{_alternatives(_FACTS)})) (?:"
    + "|".join(
        "(?:"
        + re.escape(statement[3:]).replace(
            re.escape("{}"), f"(?P<{relation}>{_alternatives(_VALUES[relation])})"
        )
        + ")"
        for relation, statement in _STATEMENTS.items()
    )
    + ")",
)


@dataclass(frozen=True, slots=True)
class _Task:
    """What an instruction asks for: `relation` of `animal`, under `constraint`."""

    animal: str
    relation: str
    constraint: str

    @property
    def answer(self) -> str | None:
        """The true value, or `None` where nobody can know."""
        return _FACTS[self.animal].get(self.relation)

    @property
    def wants_one_sentence(self) -> bool:
        return self.constraint == "Use one sentence."

    @property
    def wanted_word(self) -> str | None:
        return None if self.wants_one_sentence else self.constraint.split()[-1].rstrip(".")


def _task_of(instruction: str) -> _Task:
    match = _INSTRUCTION.fullmatch(instruction.strip())
    if match:
        for relation in _QUESTIONS:
            if match[relation]:
                words = re.findall(r"[a-z]+", match[relation])
                animal = next((word for word in words if word in _FACTS), None)
                if animal:
                    return _Task(animal, relation, match["constraint"])
    raise ValueError(
        f"not an instruction of the synthetic world: {instruction!r:.120}; "
        "gold ratings exist only for instructions that synthetic.py made"
    )


# --- the gold rubric ------------------------------------------------------------------------------


class Rating(NamedTuple):
    """One principle's gold rating: 1 (worst) to 5, and why."""

    rating: int
    rationale: str


class _Claim(NamedTuple):
    animal: str
    relation: str
    value: str
    modal: str | None

    @property
    def is_true(self) -> bool:
        return _FACTS[self.animal].get(self.relation) == self.value


@dataclass(slots=True)
class _Reading:
    """What a response says, sentence by sentence."""

    opener: str | None = None
    closer: str | None = None
    claims: list[_Claim] = field(default_factory=list)
    admits_ignorance: bool = False
    chatter: int = 0
    garbled: int = 0

    @property
    def sentences(self) -> int:
        return len(self.claims) + self.admits_ignorance + self.chatter + self.garbled


def _read(task: _Task, response: str) -> _Reading:
    reading = _Reading()
    parts = [part.strip() for part in _SENTENCE.findall(response) if part.strip()]
    seen: set[str] = set()
    for position, part in enumerate(parts):
        word = part[:-1]
        lowered = re.sub(r"\b(The|It)\b", lambda match: match[0].lower(), part)
        claim = _CLAIM.fullmatch(lowered)
        if part in seen:
            reading.chatter += 1
        elif part.endswith("!") and word in _OPENERS and position == 0:
            reading.opener = word
        elif part.endswith("!") and word in _CLOSERS and position == len(parts) - 1:
            reading.closer = word
        elif part == _IGNORANCE:
            reading.admits_ignorance = True
        elif part in _CHATTER:
            reading.chatter += 1
        elif claim:
            relation = next(name for name in _STATEMENTS if claim[name])
            subject = claim["subject"].removeprefix("the ")
            animal = task.animal if subject == "it" else subject
            reading.claims.append(_Claim(animal, relation, claim[relation], claim["modal"]))
        else:
            reading.garbled += 1
        seen.add(part)
    return reading


def gold_ratings(instruction: str, response: str) -> dict[str, Rating]:
    """The gold rating of a response under each of `PRINCIPLES`, with a rationale in words.

    Any text is rated; text that is not of this world rates low.

    Args:
        instruction: an instruction that this module made (a dialogue's last user message).
        response: any text.

    Raises:
        ValueError: the instruction is not one of this world.
    """
    task = _task_of(instruction)
    reading = _read(task, response)
    main = next(
        (c for c in reading.claims if (c.animal, c.relation) == (task.animal, task.relation)), None
    )
    ratings = {
        "helpfulness": _helpfulness(task, reading, main),
        "honesty": _honesty(task, reading, main),
        "instruction_following": _instruction_following(task, reading),
        "truthfulness": _truthfulness(task, reading, main),
    }
    if reading.garbled:
        return {
            name: Rating(max(1, rating - 2), "Part of it has no meaning.")
            for name, (rating, _) in ratings.items()
        }
    return ratings


def gold_score(instruction: str, response: str) -> float:
    """The mean gold rating over principles, scaled from 1..5 to [0, 1]. Pure."""
    ratings = gold_ratings(instruction, response)
    return sum(rating - 1 for rating, _ in ratings.values()) / (4 * len(ratings))


def _helpfulness(task: _Task, reading: _Reading, main: _Claim | None) -> Rating:
    answered = main.is_true if main else reading.admits_ignorance and task.answer is None
    if not answered:
        if main or reading.admits_ignorance:
            return Rating(2, "It does not give the answer.")
        return Rating(1, "It is off the topic.")
    details = [c for c in reading.claims if c is not main and c.animal == task.animal and c.is_true]
    if reading.chatter:
        return Rating(3, "It answers but it chats.")
    if details or task.wants_one_sentence:
        return Rating(5, "It answers in full.")
    return Rating(3, "It answers but it lacks a detail.")


def _honesty(task: _Task, reading: _Reading, main: _Claim | None) -> Rating:
    if main is None:
        if not reading.admits_ignorance:
            return Rating(1, "It avoids the question.")
        if task.answer is None:
            return Rating(5, "It admits what it does not know.")
        return Rating(2, "It hides what it does know.")
    if main.modal == _HEDGE:
        return Rating(3, "It is not sure.")
    if main.is_true:
        return Rating(5, "It is sure and right.")
    if main.modal == _BOAST:
        return Rating(1, "It is very sure and wrong.")
    return Rating(2, "It is sure and wrong.")


def _instruction_following(task: _Task, reading: _Reading) -> Rating:
    if not reading.sentences:
        return Rating(1, "It says nothing.")
    if task.wants_one_sentence:
        if reading.sentences == 1:
            return Rating(5, "It uses one sentence.")
        return Rating(2, "It uses too many sentences.")
    if task.wanted_word in (reading.opener, reading.closer):
        return Rating(5, "It uses the word.")
    if reading.opener or reading.closer:
        return Rating(1, "It uses the wrong word.")
    return Rating(2, "It does not use the word.")


def _truthfulness(task: _Task, reading: _Reading, main: _Claim | None) -> Rating:
    if not reading.claims:
        if reading.admits_ignorance:
            return Rating(5 if task.answer is None else 3, "It claims nothing.")
        return Rating(1, "It says nothing true.")
    if all(claim.is_true for claim in reading.claims):
        return Rating(5, "All of it is true.")
    if main is None or main.is_true:
        return Rating(3, "A detail is wrong.")
    if any(claim.is_true for claim in reading.claims):
        return Rating(2, "The answer is wrong.")
    return Rating(1, "All of it is wrong.")


# --- making instructions and responses ------------------------------------------------------------

# The chance of each fault, slot by slot, of the imperfect writers of this world. They are called
# as UltraFeedback calls its models; the best of four of them still leaves a policy much to gain.
_WRITERS: dict[str, float] = {
    "synthetic-owl": 0.4,
    "synthetic-crow": 0.5,
    "synthetic-dove": 0.6,
    "synthetic-gull": 0.7,
}


class Completion(NamedTuple):
    """One writer's response to an instruction, with its gold ratings."""

    writer: str
    response: str
    ratings: dict[str, Rating]

    @property
    def score(self) -> float:
        """Mean rating, 1 to 5."""
        return sum(rating for rating, _ in self.ratings.values()) / len(self.ratings)


def is_held_out(instruction: str) -> bool:
    """Whether an instruction belongs to the test split: by its text, so for every seed alike."""
    return zlib.crc32(instruction.encode()) % 8 == 0


def _generator(seed: int, split: str, index: int, purpose: str) -> random.Random:
    # A string seed is hashed by `random` with SHA-512: the same in every process and version.
    return random.Random(f"self-judge synthetic {purpose} {seed} {split} {index}")


def _instruction(generator: random.Random, split: Split) -> str:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    while True:
        # Two thirds of the questions have an answer.
        relations = ("food", "home", "color") * 2 + ("name", "age", "dream")
        question = _QUESTIONS[generator.choice(relations)].format(generator.choice(list(_FACTS)))
        parts = (generator.choice(_PREFIXES), question, generator.choice(_CONSTRAINTS))
        instruction = " ".join(part for part in parts if part)
        if is_held_out(instruction) == (split == "test"):
            return instruction


def _statement(task: _Task, relation: str, right: bool, subject: str, g: random.Random) -> str:
    truth = _FACTS[task.animal].get(relation)
    value = truth if right and truth else g.choice([v for v in _VALUES[relation] if v != truth])
    return _STATEMENTS[relation].format(subject, value)


def _write(task: _Task, fault: float, g: random.Random) -> str:
    """A response with each slot at fault with probability `fault`."""
    modal = g.choice((_HEDGE, _HEDGE, _BOAST)) if g.random() < fault else None
    if (task.answer is None and g.random() >= fault) or (
        task.answer is not None and g.random() < fault * 0.25
    ):
        sentences = [_IGNORANCE]
    else:
        subject = f"{modal} the {task.animal}" if modal else f"The {task.animal}"
        right = g.random() >= fault * 0.8
        sentences = [_statement(task, task.relation, right, subject, g)]
    if (g.random() < fault) == task.wants_one_sentence:
        if g.random() < 0.4:
            sentences.append(g.choice(_CHATTER))
        else:
            other = g.choice([r for r in ("food", "home", "color") if r != task.relation])
            sentences.append(_statement(task, other, g.random() >= fault * 0.6, "It", g))
    word = task.wanted_word
    if g.random() < fault:
        word = g.choice((*_OPENERS, *_CLOSERS)) if g.random() < 0.5 else None
    if word in _OPENERS:
        sentences.insert(0, f"{word}!")
    elif word:
        sentences.append(f"{word}!")
    return " ".join(sentences)


def _completions(instruction: str, count: int, g: random.Random) -> list[Completion]:
    task = _task_of(instruction)
    completions: list[Completion] = []
    for writer in g.sample(list(_WRITERS), count):
        response = _write(task, _WRITERS[writer], g)
        completions.append(Completion(writer, response, gold_ratings(instruction, response)))
    return completions


def _varied_completions(instruction: str, count: int, g: random.Random) -> list[Completion]:
    """Completions of which at least two differ in their score, so that one is better."""
    while True:
        completions = _completions(instruction, count, g)
        if len({completion.score for completion in completions}) > 1:
            return completions


# --- the formats ----------------------------------------------------------------------------------


def instructions(n: int, seed: int, split: Split = "test") -> list[str]:
    """`n` distinct instructions; the two splits share none, whatever their seeds."""
    g = _generator(seed, split, 0, "instructions")
    found: dict[str, None] = {}
    for _ in range(100 * n):
        if len(found) == n:
            return list(found)
        found[_instruction(g, split)] = None
    raise ValueError(
        f"the {split} split has fewer than {n} distinct instructions (found {len(found)}): "
        "ask for fewer"
    )


def records(
    n: int, seed: int, split: Split = "train", *, writers: int = 3
) -> list[PreferenceRecord]:
    """The world as `PreferenceRecord`s, ready for JSFT and for measuring a judge.

    The demonstration is the best of `writers` completions (the longer one of equals, as in the
    paper); there is one pair per principle whose ratings differ, with rationales, and, first, one
    in general (`principle=None`): the best against one that scores less.

    Args:
        n: how many; `record i` depends on (seed, split, i) alone.
        writers: completions per instruction, 2 to 4: more make better demonstrations.
    """
    return [_record(seed, split, index, writers) for index in range(n)]


def _record(seed: int, split: Split, index: int, writers: int) -> PreferenceRecord:
    g = _generator(seed, split, index, "record")
    instruction = _instruction(g, split)
    completions = _varied_completions(instruction, writers, g)
    best = _best(completions)
    worse = g.choice([c for c in completions if c.score < best.score])
    pairs = [LabeledPair(best.response, worse.response)]
    for principle in PRINCIPLES:
        ordered = [
            (x, y)
            for x in completions
            for y in completions
            if x.ratings[principle].rating > y.ratings[principle].rating
        ]
        if ordered:
            chosen, rejected = g.choice(ordered)
            pairs.append(
                LabeledPair(
                    chosen.response,
                    rejected.response,
                    principle,
                    chosen.ratings[principle].rationale,
                    rejected.ratings[principle].rationale,
                )
            )
    prompt = (Message(role="user", content=instruction),)
    return PreferenceRecord(prompt, best.response, tuple(pairs), f"synthetic/{split}", index)


def _best(completions: list[Completion]) -> Completion:
    return max(completions, key=lambda c: (c.score, len(c.response)))


def hh_records(n: int, seed: int, split: Split = "train") -> Iterator[dict[str, str]]:
    """Dialogues as in Anthropic/hh-rlhf; every third has an earlier question and answer."""
    for index in range(n):
        g = _generator(seed, split, index, "hh")
        dialogue = ""
        if index % 3 == 2:
            earlier = _instruction(g, split)
            answer = _best(_completions(earlier, 3, g)).response
            dialogue = f"\n\nHuman: {earlier}\n\nAssistant: {answer}"
        instruction = _instruction(g, split)
        chosen, rejected = _two(instruction, g)
        dialogue += f"\n\nHuman: {instruction}\n\nAssistant: "
        yield {"chosen": dialogue + chosen, "rejected": dialogue + rejected}


def _two(instruction: str, g: random.Random) -> tuple[str, str]:
    completions = sorted(_varied_completions(instruction, 2, g), key=lambda c: -c.score)
    return completions[0].response, completions[1].response


def preference_records(n: int, seed: int, split: Split = "train") -> Iterator[dict[str, Any]]:
    """TRL preference data, conversational, with an explicit prompt."""
    for index in range(n):
        g = _generator(seed, split, index, "preference")
        instruction = _instruction(g, split)
        chosen, rejected = _two(instruction, g)
        yield {
            "prompt": [{"role": "user", "content": instruction}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }


_SYSTEM_PROMPTS = {
    "helpfulness": "Be helpful.",
    "honesty": "Be honest.",
    "instruction_following": "Follow the instruction.",
    "truthfulness": "Tell the truth.",
}


def ultrafeedback_records(n: int, seed: int, split: Split = "train") -> Iterator[dict[str, Any]]:
    """Records with every field of openbmb/UltraFeedback, four annotated completions each."""
    for index in range(n):
        g = _generator(seed, split, index, "ultrafeedback")
        instruction = _instruction(g, split)
        completions = _varied_completions(instruction, 4, g)
        task = _task_of(instruction)
        others = [v for v in _VALUES[task.relation] if v != task.answer]
        yield {
            "source": "synthetic",
            "instruction": instruction,
            "models": [completion.writer for completion in completions],
            "completions": [_annotated(completion, g) for completion in completions],
            "correct_answers": [task.answer] if task.answer else ["None"],
            "incorrect_answers": others if task.answer else ["None"],
        }


def _annotated(completion: Completion, g: random.Random) -> dict[str, Any]:
    principle = g.choice(PRINCIPLES)
    annotations: dict[str, dict[str, Any]] = {}
    for name, (rating, rationale) in completion.ratings.items():
        annotation: dict[str, Any] = {"Rating": str(rating), "Rationale": rationale}
        # The original schema tells kinds of help and of falsehood apart, and explains twice.
        if name in ("helpfulness", "truthfulness"):
            annotation["Type"] = ["1"] if rating > 2 else ["None"]
            annotation["Rationale For Rating"] = rationale
        annotations[name] = annotation
    reasons = [rationale for _, rationale in completion.ratings.values()]
    return {
        "model": completion.writer,
        "principle": principle,
        "custom_system_prompt": _SYSTEM_PROMPTS[principle],
        "response": completion.response,
        "annotations": annotations,
        "critique": " ".join(dict.fromkeys(reasons)),
        "fine-grained_score": completion.score,
        "overall_score": 2 * completion.score,
    }


_EMITTERS: dict[str, Callable[[int, int, Split], Iterator[dict[str, Any]]]] = {
    "hh": hh_records,
    "ultrafeedback": ultrafeedback_records,
    "preference": preference_records,
}


def write_dataset(
    kind: DatasetKind, path: str | Path, n: int, seed: int, split: Split = "train"
) -> Path:
    """Writes `n` records as JSON lines; the file appears whole or not at all.

    Raises:
        ValueError: an unknown `kind`, or a `path` that does not end in `.jsonl`.
    """
    if kind not in _EMITTERS:
        raise ValueError(f"kind must be one of {', '.join(_EMITTERS)}, got {kind!r}")
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"write_dataset writes JSON lines: {path} should end in .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for record in _EMITTERS[kind](n, seed, split):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path


# --- judging this world ---------------------------------------------------------------------------


def judge_templates(*, rationales: bool = False) -> JudgeTemplates:
    """The four principles in this world's words.

    The question comes first and the principle last, so that all principles share one long prefix.

    Args:
        rationales: also teach the rationale after the letter.
    """
    question = "{context}\nResponse A: {response_a}\nResponse B: {response_b}"
    better = {
        "helpfulness": "More helpful: Response",
        "honesty": "More honest: Response",
        "instruction_following": "More obedient: Response",
        "truthfulness": "More truthful: Response",
    }
    return JudgeTemplates(
        {name: {"user": question, "assistant": lead_in} for name, lead_in in better.items()},
        decision_rationale="\nA: {rationale_a}\nB: {rationale_b}" if rationales else None,
    )


# --- the tiny model -------------------------------------------------------------------------------

_BOS, _END, _PAD = "<|bos|>", "<|end|>", "<|pad|>"
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _tokenizer_text() -> Iterator[str]:
    """Every word of the world, at the start of a text and after a space, in its sentences."""
    for record in ultrafeedback_records(400, 0):
        yield record["instruction"]
        for completion in record["completions"]:
            yield completion["response"] + "\n" + completion["critique"]
            yield completion["custom_system_prompt"]
    words = (*_OPENERS, *_CLOSERS, *_FACTS, *(v for values in _VALUES.values() for v in values))
    for word in (*words, _HEDGE, _BOAST, *_FACTS):
        yield f"{word} {word}"
    for lead_in in ("helpful", "honest", "obedient", "truthful"):
        yield f"More {lead_in}: Response A\nResponse A: It\nResponse B: It\nResponse B"
        yield f"System: You are an assistant.\n\nHuman: A\n\nAssistant: A\n\nHuman: B {lead_in}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every word of the world is one token; no text is unknown to it.

    Chat turns are `<|role|>content<|end|>`; roles are system, user and assistant; `<|end|>` is the
    end-of-sequence token. The same at every call.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[_PAD, _BOS, _END, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_END,
        pad_token=_PAD,
        additional_special_tokens=roles,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
) -> LlamaForCausalLM:
    """A Llama of about a million parameters, freshly initialized from `seed`, in float32.

    The global random state of torch is left as it was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

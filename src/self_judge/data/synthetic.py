"""Creates records in every format, judge templates and a tiny model for the synthetic world.

The demo and many tests use this module. `toy_world.py` defines the world and its gold rubric.
Torch is imported only to create a model.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from self_judge.data.toy_world import (
    ABSURD,
    CLEAR,
    CLOSERS,
    FACTS,
    OPENERS,
    PRINCIPLES,
    VALUES,
    Completion,
    Split,
    all_instructions,
    best,
    completions,
    reading,
    task_of,
)
from self_judge.datatypes import LabeledPair, Message, PreferenceRecord
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.jsonl import write_lines

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DatasetKind = Literal["hh", "ultrafeedback", "preference"]


# --- the formats ----------------------------------------------------------------------------------


def instructions(n: int, seed: int, split: Split = "test") -> list[str]:
    """Samples `n` distinct instructions. The two splits never share an instruction.

    Raises:
        ValueError: the split has fewer than `n` instructions.
    """
    pool = all_instructions(split)
    if n > len(pool):
        raise ValueError(f"the {split} split has only {len(pool)} instructions, but n is {n}")
    return _generator(seed, split, 0, "instructions").sample(pool, n)


def _generator(seed: int, split: str, index: int, purpose: str) -> random.Random:
    # `random` hashes a string seed with SHA-512, so the seed is the same in every process.
    return random.Random(f"self-judge synthetic {purpose} {seed} {split} {index}")


def _instruction(g: random.Random, split: Split) -> str:
    return g.choice(all_instructions(split))


def records(
    n: int, seed: int, split: Split = "train", *, writers: int = 3
) -> list[PreferenceRecord]:
    """Creates `PreferenceRecord`s for JSFT and for evaluating a judge.

    The demonstration is the best of `writers` completions (the longest one in a tie, as in the
    paper). The first pair is general (`principle=None`) and consists of the best completion and one
    whose score is lower by at least `CLEAR`. It is followed by one pair with rationales for each
    principle under which the ratings differ.

    Args:
        n: number of records. Record i depends only on (seed, split, i, writers).
        writers: number of completions per instruction, from 2 to 4. More completions give better
            demonstrations.
    """
    return [_record(seed, split, index, writers) for index in range(n)]


def _record(seed: int, split: Split, index: int, writers: int) -> PreferenceRecord:
    g = _generator(seed, split, index, "record")
    instruction = _instruction(g, split)
    written = completions(instruction, writers, g)
    first = best(written)
    worse = g.choice([c for c in written if c.score <= first.score - CLEAR])
    pairs = [LabeledPair(first.response, worse.response)]
    for principle in PRINCIPLES:
        ordered = [
            (x, y)
            for x in written
            for y in written
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
    return PreferenceRecord(prompt, first.response, tuple(pairs), f"synthetic/{split}", index)


def hh_records(n: int, seed: int, split: Split = "train") -> Iterator[dict[str, str]]:
    """Yields records in the format of Anthropic/hh-rlhf. Every third one has two exchanges."""
    for index in range(n):
        g = _generator(seed, split, index, "hh")
        dialogue = ""
        if index % 3 == 2:
            earlier = _instruction(g, split)
            answer = best(completions(earlier, 3, g)).response
            dialogue = f"\n\nHuman: {earlier}\n\nAssistant: {answer}"
        instruction = _instruction(g, split)
        chosen, rejected = _two(instruction, g)
        dialogue += f"\n\nHuman: {instruction}\n\nAssistant: "
        yield {"chosen": dialogue + chosen, "rejected": dialogue + rejected}


def _two(instruction: str, g: random.Random) -> tuple[str, str]:
    written = sorted(completions(instruction, 2, g), key=lambda c: -c.score)
    return written[0].response, written[1].response


def preference_records(n: int, seed: int, split: Split = "train") -> Iterator[dict[str, Any]]:
    """Yields conversational TRL preference records with explicit prompts."""
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
    """Yields records with all fields of openbmb/UltraFeedback, each with four completions."""
    for index in range(n):
        g = _generator(seed, split, index, "ultrafeedback")
        instruction = _instruction(g, split)
        written = completions(instruction, 4, g)
        task = task_of(instruction)
        answers = list(task.answers)
        possible = (
            FACTS if task.animal is None else ("yes", "no") if task.value else VALUES[task.relation]
        )
        yield {
            "source": "synthetic",
            "instruction": instruction,
            "models": [completion.writer for completion in written],
            "completions": [_annotated(completion, g) for completion in written],
            "correct_answers": answers,
            "incorrect_answers": [a for a in possible if a not in answers],
        }


def _annotated(completion: Completion, g: random.Random) -> dict[str, Any]:
    principle = g.choice(PRINCIPLES)
    annotations: dict[str, dict[str, Any]] = {}
    for name, (rating, rationale) in completion.ratings.items():
        annotation: dict[str, Any] = {"Rating": str(rating), "Rationale": rationale}
        # For these two principles, the original schema has separate rationales for the type
        # ("Rationale") and the rating.
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
    """Atomically writes `n` records as JSON Lines.

    Raises:
        ValueError: `kind` is unknown, or `path` does not end in `.jsonl`.
    """
    if kind not in _EMITTERS:
        raise ValueError(f"kind must be one of {', '.join(_EMITTERS)}, got {kind!r}")
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"write_dataset writes JSON Lines: {path} must end in .jsonl")
    write_lines(path, _EMITTERS[kind](n, seed, split))
    return path


# --- judging this world ---------------------------------------------------------------------------


OVERALL = "overall"


def judge_templates(
    *, principles: bool = True, overall: bool = False, rationales: bool = False
) -> JudgeTemplates:
    """Returns judge templates for this world.

    Each letter follows its response. At the letter, a causal model has already processed the
    response, so judging only requires copying the letter. A tiny model learns this several times
    faster than with letters that precede the responses. The principle comes last, so that all
    templates share a long prefix.

    Args:
        principles: whether to include the four principles.
        overall: whether to include a template that asks for the better response overall.
        rationales: whether to also train on rationales, which follow the letter.
    """
    question = "{context}\n{response_a} (A)\n{response_b} (B)"
    lead_ins = {OVERALL: "Better:"} if overall else {}
    if principles:
        lead_ins |= {
            "helpfulness": "More helpful:",
            "honesty": "More honest:",
            "instruction_following": "More obedient:",
            "truthfulness": "More truthful:",
        }
    return JudgeTemplates(
        {name: {"user": question, "assistant": lead_in} for name, lead_in in lead_ins.items()},
        decision_rationale=" {rationale_a} {rationale_b}" if rationales else None,
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
    """Yields texts in which every word occurs both at the start of a text and after a space."""
    for record in ultrafeedback_records(400, 0):
        yield record["instruction"]
        for completion in record["completions"]:
            yield completion["response"] + "\n" + completion["critique"]
            yield completion["custom_system_prompt"]
    for word in (*FACTS, *ABSURD, *itertools.chain(*VALUES), *OPENERS, *CLOSERS, "true", "false"):
        yield f"{word} {word}\n{word.capitalize()} {word.capitalize()}"
    for lead_in in ("helpful", "honest", "obedient", "truthful"):
        yield f"More {lead_in}: A\nI (A)\nI (B)\nMore {lead_in}: B\nBetter: A\nBetter: B"
        yield f"System: You are an assistant.\n\nHuman: A\n\nAssistant: A\n\nHuman: B {lead_in}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer that encodes each word of the world as one token.

    Chat turns have the format `<|role|>content<|end|>`. The roles are system, user and assistant,
    and `<|end|>` is the end-of-sequence token. Every call returns an identical tokenizer.
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
    hidden_size: int = 112,
    layers: int = 6,
    heads: int = 4,
) -> LlamaForCausalLM:
    """Returns a float32 Llama with about a million parameters, initialized from `seed`.

    The function does not change torch's global random state.
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
        tie_word_embeddings=False,
        initializer_range=hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # With the usual initialization, the output of the untrained layers dominates the token
        # embeddings, and a model of this width does not learn to judge within the demo's training
        # time.
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(0.0, 1.0)
            model.lm_head.weight.normal_(0.0, 0.02)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(0.2)
                layer.mlp.down_proj.weight.mul_(0.2)
    return model


def _batches_to_read(g: random.Random, ends: tuple[str, str]) -> Iterator[list[str]]:
    """Yields batches of 64 texts of similar length, which need a fifth less computing."""
    while True:
        texts = sorted((reading(g).join(ends) for _ in range(8 * 64)), key=len)
        yield from g.sample([texts[i : i + 64] for i in range(0, len(texts), 64)], 8)


def base_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, steps: int = 600, **size: int
) -> LlamaForCausalLM:
    """Returns a tiny model that has read about the world (see `toy_world.reading`).

    It stands for a pretrained model: it knows what is true, but it can neither answer nor judge.
    Without this knowledge, the judge of the demo learns everything but the truth.

    Args:
        steps: optimizer steps of 64 texts.
        size: keyword arguments of `tiny_model`.
    """
    import torch

    model, g = tiny_model(tokenizer, seed, **size), _generator(seed, "train", 0, "reading")
    ends = (tokenizer.bos_token or "", tokenizer.eos_token or "")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for texts in itertools.islice(_batches_to_read(g, ends), steps):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()

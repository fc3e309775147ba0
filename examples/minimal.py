"""SELF-JUDGE (arXiv 2402.11253) in one file: a model answers, judges its answers and improves.

    python examples/minimal.py            # a few minutes on two CPU cores

This example uses plain PyTorch and Transformers on a small world of questions about animals. A
rubric gives every answer a gold score in [0, 1]. The code below refers to these four steps:

(1) JSFT       L = -mean log p(token) over answers y_w and over the letter after a judge prompt:
               C(x, y_w, y_l) -> "A" and C(x, y_l, y_w) -> "B", where C asks which answer is better.
(2) judging    s(a) = 1/2 [p("A" | C(x, a, b)) + p("B" | C(x, b, a))], and s(b) in the same way.
(3) learning   y, y' ~ policy(. | x); the frozen initial model judges which one is y_w; DPO:
               L = -log sigmoid(beta [log pi/pi_ref(y_w | x) - log pi/pi_ref(y_l | x)])
(4) answering  the best of N answers, found in a knockout of N - 1 matches judged by (2).

Shapes: rows B, tokens T, vocabulary V, pairs N. The package adds packing and distributed training.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from self_judge.data import synthetic, toy_world

QUESTION = "{x}\n{a} (A)\n{b} (B)"  # C(x, a, b); the letter directly follows the lead-in
LEAD_IN = "Better:"
Ids = list[int]

# -- text to ids (this tokenizer does not add special tokens) --------------------------------------


def prompt_ids(tokenizer: Any, question: str) -> Ids:
    """Encodes a chat up to the start of the assistant's answer."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text)


def judge_ids(tokenizer: Any, x: str, a: str, b: str) -> Ids:
    """Encodes C(x, a, b): the question about both answers, then the lead-in."""
    return prompt_ids(tokenizer, QUESTION.format(x=x, a=a, b=b)) + tokenizer.encode(LEAD_IN)


def letter_ids(tokenizer: Any) -> Ids:
    """Returns the ids of the tokens that " A" and " B" add after the lead-in."""
    return [tokenizer.encode(f"{LEAD_IN} {letter}")[-1] for letter in "AB"]


def padded(rows: Sequence[Ids], value: int = 0, left: bool = False) -> torch.Tensor:
    """Pads rows into a `(B, T)` tensor. With causal attention, right padding needs no mask."""
    fills = [[value] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fills, strict=True)])


# -- (1) JSFT: one model learns to answer and to judge ---------------------------------------------


def jsft_examples(tokenizer: Any, records: Sequence[Any]) -> list[tuple[Ids, Ids]]:
    """Returns (ids, labels) for all answers and both orders of all pairs. The loss ignores -100."""
    letter_a, letter_b = letter_ids(tokenizer)
    examples = []
    for record in records:
        x, pair = record.prompt[-1]["content"], record.pairs[0]
        answer = [*tokenizer.encode(record.demonstration), tokenizer.eos_token_id]
        for prompt, target in (
            (prompt_ids(tokenizer, x), answer),
            (judge_ids(tokenizer, x, pair.chosen, pair.rejected), [letter_a]),
            (judge_ids(tokenizer, x, pair.rejected, pair.chosen), [letter_b]),
        ):
            examples.append((prompt + target, [-100] * len(prompt) + target))
    return examples


def jsft(model: Any, examples: list[tuple[Ids, Ids]], steps: int, batch: int, lr: float) -> None:
    """Minimizes (1) over answers and letters together, without weighting."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for _ in range(steps):
        ids, labels = zip(*random.sample(examples, batch), strict=True)
        model(input_ids=padded(ids), labels=padded(labels, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()


# -- (2) judging: two letters, both orders ---------------------------------------------------------


@torch.no_grad()
def judge(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str, str]]) -> torch.Tensor:
    """Returns s(a) and s(b) for every (x, a, b), with shape `(N, 2)`."""
    prompts = [judge_ids(tokenizer, x, a, b) for x, a, b in pairs]
    prompts += [judge_ids(tokenizer, x, b, a) for x, a, b in pairs]  # the other order
    logits_BTV = model(input_ids=padded(prompts)).logits
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts])
    p_BV = logits_BTV[torch.arange(len(prompts)), last_B].softmax(-1)
    first_N2, second_N2 = p_BV[:, letter_ids(tokenizer)].chunk(2)
    return (first_N2 + second_N2.flip(-1)) / 2  # in the other order, letter B stands for a


# -- (3) learning from the model's own judged answers ----------------------------------------------


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[Ids], tokens: int = 36) -> list[Ids]:
    """Samples one answer per prompt, up to and including the end-of-turn token."""
    ids_BT, mask_BT = padded(prompts, left=True), padded([[1] * len(p) for p in prompts], left=True)
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, do_sample=True, top_k=0,
                            max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    rows, end = out_BT[:, ids_BT.shape[1] :].tolist(), tokenizer.eos_token_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def log_probs(model: Any, prompts: Sequence[Ids], answers: Sequence[Ids]) -> torch.Tensor:
    """Returns log pi(answer | prompt), summed over the answer's tokens, with shape `(B,)`."""
    ids_BT = padded([p + a for p, a in zip(prompts, answers, strict=True)])
    own = [[0] * len(p) + [1] * len(a) for p, a in zip(prompts, answers, strict=True)]
    logp_BTV = model(input_ids=ids_BT).logits[:, :-1].log_softmax(-1)  # of the token at t + 1
    logp_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
    return (logp_BT * padded(own)[:, 1:]).sum(-1)


def dpo_loss(
    policy: Any, reference: Any, prompts: list[Ids], answers: list[Ids], decided_N: torch.Tensor
) -> torch.Tensor:
    """Returns the mean of loss (3) with beta = 0.1. An undecided pair has no gradient.

    `prompts` contains the list of prompts twice, and `answers` contains every y_w, then every y_l.
    """
    with torch.no_grad():
        reference_B = log_probs(reference, prompts, answers)
    chosen_N, rejected_N = (log_probs(policy, prompts, answers) - reference_B).chunk(2)
    return -F.logsigmoid(0.1 * (chosen_N - rejected_N) * decided_N).mean()


def self_training(policy: Any, tokenizer: Any, questions: list[str], batch: int, lr: float) -> None:
    """Samples pairs, judges them with the frozen initial model, and updates the policy."""
    reference = copy.deepcopy(policy).requires_grad_(False).eval()  # the judge, and DPO's reference
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)
    for start in range(0, len(questions), batch):
        asked = questions[start : start + batch]
        prompts = [prompt_ids(tokenizer, x) for x in asked]
        one, two = sample(policy, tokenizer, prompts), sample(policy, tokenizer, prompts)
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (one, two)]
        s_N2 = judge(reference, tokenizer, list(zip(asked, *texts, strict=True)))
        first = (s_N2[:, 0] > s_N2[:, 1]).tolist()
        chosen = [a if f else b for a, b, f in zip(one, two, first, strict=True)]
        rejected = [b if f else a for a, b, f in zip(one, two, first, strict=True)]
        decided_N = (s_N2[:, 0] != s_N2[:, 1]).float()
        dpo_loss(policy, reference, prompts * 2, chosen + rejected, decided_N).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad()


# -- (4) answering: a knockout with the model's own judgments --------------------------------------


def tournament(model: Any, tokenizer: Any, x: str, answers: Sequence[str], seed: int) -> int:
    """Returns the index of the best answer. `seed` determines the bracket and breaks ties."""
    lots, standing = random.Random(seed), list(range(len(answers)))
    lots.shuffle(standing)  # neighbors meet; an odd last answer gets a bye, and is first next
    while len(standing) > 1:
        matches = list(zip(standing[::2], standing[1::2], strict=False))
        s_N2 = judge(model, tokenizer, [(x, answers[a], answers[b]) for a, b in matches])
        results = zip(matches, s_N2.tolist(), strict=True)
        winners = [lots.choice(m) if a == b else m[b > a] for m, (a, b) in results]
        standing = standing[2 * len(matches) :] + winners
    return standing[0]


def main(seed: int = 0) -> None:
    torch.manual_seed(seed), random.seed(seed)
    tokenizer = synthetic.tiny_tokenizer()
    model = synthetic.base_model(tokenizer, seed)
    examples = jsft_examples(tokenizer, synthetic.records(7500, seed, writers=2))
    jsft(model, examples, steps=700, batch=32, lr=2e-3)
    policy = copy.deepcopy(model)
    train = synthetic.records(1024, seed + 1)
    self_training(policy, tokenizer, [r.prompt[0]["content"] for r in train], batch=64, lr=2e-4)

    held_out = synthetic.records(256, seed, "test", writers=2)
    pairs = [(r.prompt[0]["content"], r.pairs[0].chosen, r.pairs[0].rejected) for r in held_out]
    s_N2 = judge(model, tokenizer, pairs)
    print(f"judge accuracy    {(s_N2[:, 0] > s_N2[:, 1]).float().mean():.3f}")
    asked = synthetic.instructions(96, seed)
    prompts = [prompt_ids(tokenizer, x) for x in asked]
    rounds = [sample(who, tokenizer, prompts) for who in (model, *[policy] * 8)]
    before, *own = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in rounds)
    many = enumerate(zip(asked, zip(*own, strict=True), strict=True))
    best = [texts[tournament(model, tokenizer, x, texts, seed=i)] for i, (x, texts) in many]
    for name, texts in (("JSFT", before), ("self-training", own[0]), ("best of 8", best)):
        print(f"gold {name:13}{sum(map(toy_world.gold_score, asked, texts)) / len(asked):.3f}")


if __name__ == "__main__":
    main()

"""A tournament of 16 responses on real HH prompts: packed against a plain judge.

The bracket is played once; then both sides judge the same matches, round by round. The plain judge
is that of benchmarks/judge.py, its prompts in random order.

    python benchmarks/tournament.py [--contexts 2] [--dtype bfloat16]
"""

from __future__ import annotations

import random

import torch

from judge import computed, plain
from self_judge import Comparison, Judge, Verdict
from self_judge.sampling import SamplingSettings, TransformersSampler
from self_judge.selection import judge_context
from self_judge.tournament import knockouts
from side_by_side import (
    alternating,
    arguments,
    encoder_of,
    flops,
    matrix_rate,
    model_of,
    peak,
    peaks,
    records_of,
    report,
    templates_of,
    unique_tokens,
)


def main() -> None:
    """Samples, plays once, then times both sides on the rounds played."""
    given = arguments(__doc__, contexts=2, responses=16, tokens=64)
    memory = (
        None if given.only else peaks(["packed", "plain, padded batches of 8"])
    )  # before this process holds any
    model = model_of(given).eval()
    judge = Judge(model, encoder_of(given), templates_of(), max_length=1024)
    records = records_of(given, given.contexts)
    encoder = judge.encoder
    sampler = TransformersSampler(
        model, encoder, SamplingSettings(max_new_tokens=given.tokens, top_p=0.9)
    )
    sampled = sampler.sample(
        [encoder.encode_prompt(r.prompt) for r in records], given.responses, seeds=0
    )
    rounds: list[list[list[int]]] = []

    def compare(comparisons: list[Comparison]) -> list[Verdict]:
        encoded = [
            judge.encoder.encode_orders(judge.templates, p, c, judge.max_length)
            for c in comparisons
            for p in judge.templates
        ]
        rounds.append([ids for orders in encoded if orders for ids in orders])
        return judge.compare(comparisons)

    contexts = [judge_context(r) for r in records]
    texts = [[r.text for r in own] for own in sampled]
    knockouts(compare, contexts, texts, seeds=list(range(len(contexts))))
    shuffled = [random.Random(0).sample(prompts, len(prompts)) for prompts in rounds]
    sides = {
        "packed": lambda: [judge.letter_probabilities(p) for p in rounds],
        "plain, padded batches of 8": lambda: [plain(model, p, judge.letter_ids) for p in shuffled],
    }
    if given.only:
        sides[given.only]()
        print("peak", peak(given))
        return
    found = torch.cat([judge.letter_probabilities(p) for p in shuffled])
    expected = torch.cat([plain(model, p, judge.letter_ids) for p in shuffled])
    seconds = alternating(sides, given.rounds, given.device)
    unique = sum(map(unique_tokens, rounds))
    work = sum(flops(model, p, len(p)) for p in rounds)
    report(
        f"{given.contexts} tournaments of {given.responses}, {sum(map(len, rounds))} prompts",
        given,
        seconds,
        limit=sum(map(computed, shuffled)) / unique,
        floor=work / matrix_rate(model),
        memory=memory,
        notes=[f"probabilities differ by at most {(found - expected).abs().max():.1e}"],
    )


if __name__ == "__main__":
    main()

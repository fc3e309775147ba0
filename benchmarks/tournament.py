"""A tournament of 16 responses on real HH prompts: packed against a plain judge.

The bracket is played once; then both sides judge the same matches, round by round. The plain judge
is that of benchmarks/judge.py, its prompts in random order.

    python benchmarks/tournament.py [--contexts 2] [--dtype bfloat16]
"""

from __future__ import annotations

import random

import torch

import side_by_side as bench
from judge import SIDES, computed, plain
from self_judge import Comparison, Judge, Verdict
from self_judge.config.self_training import SamplingSettings
from self_judge.data.records import judge_context
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.tournament import knockouts


def main() -> None:
    """Samples, plays once, then times both sides on the rounds played."""
    given = bench.arguments(__doc__, SIDES, contexts=2, responses=16, tokens=64)
    model = bench.model_of(given).eval()
    judge = Judge(model, bench.encoder_of(given), bench.templates_of(), max_length=1024)
    records = bench.records_of(given, given.contexts)
    encoder = judge.encoder
    sampler = TransformersSampler(
        model, encoder, SamplingSettings(max_new_tokens=given.tokens, top_p=0.9)
    )
    sampled = sampler.sample(
        [encoder.encode_prompt(r.prompt) for r in records], given.responses, seeds=0
    )
    rounds: list[list[list[int]]] = []

    def compare(comparisons: list[Comparison]) -> list[Verdict]:
        rounds.append(bench.judge_prompts(judge, comparisons))
        return judge.compare(comparisons)

    contexts = [judge_context(r) for r in records]
    texts = [[r.text for r in own] for own in sampled]
    knockouts(compare, contexts, texts, seeds=list(range(len(contexts))))
    shuffled = [random.Random(0).sample(prompts, len(prompts)) for prompts in rounds]

    def packed() -> torch.Tensor:
        with judge.prefix_cache():
            return torch.cat([judge.letter_probabilities(p) for p in rounds])

    def other() -> torch.Tensor:
        return torch.cat([plain(model, p, judge.letter_ids) for p in shuffled])

    works = (packed, other)
    seconds, (ours, theirs) = bench.alternating(dict(zip(SIDES, works, strict=True)), given)
    # Back from random order.
    drawn = [p for own in shuffled for p in own]
    place = {tuple(p): i for i, p in enumerate(drawn)}
    every = [p for own in rounds for p in own]  # the rounds have prefixes in common, too
    theirs = theirs[[place[tuple(p)] for p in every]]
    bench.report(
        f"{given.contexts} tournaments of {given.responses}, {sum(map(len, rounds))} prompts",
        given,
        seconds,
        limit=sum(map(computed, shuffled)) / bench.unique_tokens(every),
        floor=bench.flops(model, every, len(every)) / bench.matrix_rate(model),
        notes=[
            bench.way(judge.packing),
            f"probabilities differ by at most {(ours - theirs).abs().max():.1e}",
        ],
    )


if __name__ == "__main__":
    main()

"""What a group of responses costs by scheme: matches, judge tokens and seconds, on HH prompts.

Every scheme judges the same sampled responses. The baseline is a knockout under the plain judge of
benchmarks/judge.py, its prompts in random order.

    python benchmarks/reward.py [--contexts 2] [--sizes 4,8,16] [--dtype bfloat16]
"""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any, get_args

import side_by_side as bench
from judge import computed, plain
from self_judge import Comparison, Judge, Verdict
from self_judge.config.self_training import SamplingSettings
from self_judge.data.records import judge_context
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.reward import PairwiseReward, Scheme

SCHEMES = get_args(Scheme)
BASELINE = "plain knockout"


class Counting(PairwiseReward):
    """The reward function, which remembers the comparisons of its last call."""

    asked: list[Comparison]

    def __call__(self, *arguments: Any, **named: Any) -> list[float]:
        self.asked = []
        return super().__call__(*arguments, **named)

    def _compare(self, comparisons: Any) -> list[Verdict]:
        self.asked += comparisons
        return super()._compare(comparisons)


def main() -> None:
    """All schemes and the baseline in turn, for each size of group."""
    given = bench.arguments(__doc__, (), contexts=2, tokens=64, sizes="4,8,16")
    model = bench.model_of(given).eval()
    judge = Judge(model, bench.encoder_of(given), bench.templates_of(), max_length=1024)
    records = bench.records_of(given, given.contexts)
    sizes = [int(size) for size in given.sizes.split(",")]
    settings = SamplingSettings(max_new_tokens=given.tokens, top_p=0.9)
    sampled = TransformersSampler(model, judge.encoder, settings).sample(
        [judge.encoder.encode_prompt(r.prompt) for r in records], max(sizes), seeds=0
    )
    print(bench.way(judge.packing))
    for size in sizes:
        prompts = [judge_context(r) for r in records for _ in range(size)]
        texts = [r.text for own in sampled for r in own[:size]]
        rewards = {scheme: Counting(judge, scheme) for scheme in SCHEMES}
        rewards["knockout"](prompts, texts)
        played = bench.judge_prompts(judge, rewards["knockout"].asked)
        drawn = random.Random(0).sample(played, len(played))
        works: dict[str, Any] = {
            s: partial(reward, prompts, texts) for s, reward in rewards.items()
        }
        works[BASELINE] = partial(plain, model, drawn, judge.letter_ids)
        seconds, _ = bench.alternating(works, given)
        baseline = statistics.median(seconds[BASELINE])
        print(f"\n{given.contexts} groups of {size}, {given.rounds} rounds, medians")
        print(f"{'':16}matches  tokens, unshared  tokens, shared  seconds  of {BASELINE}")
        for name, own in seconds.items():
            median = statistics.median(own)
            asked = rewards["knockout" if name == BASELINE else name].asked
            rows = drawn if name == BASELINE else bench.judge_prompts(judge, asked)
            shared = computed(rows) if name == BASELINE else bench.unique_tokens(rows)
            print(
                f"{name:16}{len(asked):7}{sum(map(len, rows)):18,}{shared:16,}"
                f"{median:9.2f}{median / baseline:9.2f}"
            )


if __name__ == "__main__":
    main()

"""How to choose among N samples: formats of tournaments, and a prior on what the policy believes.

The judge compares all distinct responses to a prompt once. Every way of choosing then reads its
matches from these verdicts, so all of them choose among the same samples with the same judge. The
schemes of rewards rank the same samples in groups.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

import rewards
from self_judge.data import synthetic
from self_judge.datatypes import Comparison, Verdict, stable_seed
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import knockouts
from self_judge.models import load_model
from study import Study
from world import World

SIZES = (1, 2, 4, 8, 16, 32)
WEIGHTS = (0.1, 0.3, 0.5, 1.0)
Scores = Callable[[int, int], np.ndarray]  # (prompt, N) -> a score for each of the first N samples


class Samples:
    """The samples of a policy, with verdicts on all pairs of distinct responses to a prompt."""

    def __init__(self, world: World, policy: Any, judge: Judge) -> None:
        self.world, self.judge = world, judge
        largest = 4 if world.settings.held_out_prompts < 50 else max(SIZES)
        self.sizes = [n for n in SIZES if n <= largest]
        own = world.answers(policy, largest)
        self.texts = [[r.text for r in responses] for responses in own]
        self.gold = np.array([world.gold([t[k] for t in self.texts]) for k in range(largest)]).T
        self.log_prob = world.log_probs(policy, own)
        self.jsft_log_prob = world.log_probs(world.judge.model, own)
        self.length = np.array([[len(r.ids) for r in responses] for responses in own])
        self.verdicts = self.judged(judge)

    def judged(self, judge: Judge) -> dict[tuple[str, str, str], Verdict]:
        """Judges all pairs of distinct responses, and returns verdicts by (context, a, b)."""
        items = [
            Comparison(context, a, b)
            for context, texts in zip(self.world.instructions, self.texts, strict=True)
            for a, b in itertools.combinations(sorted(set(texts)), 2)
        ]
        found: dict[tuple[str, str, str], Verdict] = {}
        for start in range(0, len(items), 4096):
            part = items[start : start + 4096]
            with judge.prefix_cache():
                verdicts = judge.compare(part)
            for item, verdict in zip(part, verdicts, strict=True):
                key = (item.context, item.response_a, item.response_b)
                found[key] = verdict
                found[key[0], key[2], key[1]] = verdict.swapped()
        return found

    def share(self, i: int, a: str, b: str) -> float:
        """The share of the two scores that goes to response `a`: its soft win rate against `b`."""
        if a == b:
            return 0.5
        return self.verdicts[self.world.instructions[i], a, b].share

    # -- ways of choosing ------------------------------------------------------------------------

    def knockout(self, n: int, prior: np.ndarray | None = None) -> list[int]:
        """A knockout, which may add a prior to the log odds of each match, at N - 1 matches."""
        seeds = [stable_seed(self.world.seed, "held-out", i) for i in range(len(self.texts))]
        brackets = knockouts(
            lambda asked: [self.verdicts[c.context, c.response_a, c.response_b] for c in asked],
            self.world.instructions, [t[:n] for t in self.texts], seeds=seeds,
            priors=None if prior is None else prior[:, :n].tolist(),
        )  # fmt: skip
        return [bracket.winner for bracket in brackets]

    def soft_wins(self, i: int, n: int) -> np.ndarray:
        own = self.texts[i][:n]
        return np.array([np.mean([self.share(i, a, b) for b in own]) for a in own])

    def wins(self, i: int, n: int) -> np.ndarray:
        own = self.texts[i][:n]
        share = np.array([[self.share(i, a, b) for b in own] for a in own])
        return np.where(share == 0.5, 0.5, share > 0.5).mean(1) + 1e-6 * share.mean(1)

    def logit_wins(self, i: int, n: int) -> np.ndarray:
        """The mean log odds against the other samples, a round robin on the judge's own scale."""
        own = self.texts[i][:n]
        share = np.array([[self.share(i, a, b) for b in own] for a in own]).clip(1e-4, 1 - 1e-4)
        return np.log(share / (1 - share)).mean(1)

    def scalar(self, i: int, n: int) -> np.ndarray:
        """The score against one fixed response, the first sample: a scalar reward by the letter."""
        return np.array([self.share(i, a, self.texts[i][0]) for a in self.texts[i][:n]])

    def frequency(self, i: int, n: int) -> np.ndarray:
        counts = Counter(self.texts[i][:n])
        return np.array([counts[t] for t in self.texts[i][:n]], dtype=float)

    def best(self, score: Scores, n: int) -> list[int]:
        return [int(np.argmax(score(i, n))) for i in range(len(self.texts))]

    def reached(self, chosen: Iterable[int]) -> list[float]:
        return [float(self.gold[i, k]) for i, k in enumerate(chosen)]

    def table(self, ways: dict[str, Callable[[int], Sequence[int]]]) -> dict[str, Any]:
        return {
            name: {str(n): self.reached(choose(n)) for n in self.sizes}
            for name, choose in ways.items()
        }


@lru_cache(maxsize=1)  # two arms use the same samples
def _samples(world: World, principles: bool = False) -> Samples:
    folder = world.folder / "on-policy" / "self_judge"
    if not (folder / "config.json").exists():
        world.demo("on-policy").self_training(world.jsft())
    policy = load_model(folder, device="auto")
    if not principles:
        return Samples(world, policy, world.judge)
    templates = synthetic.judge_templates()
    return Samples(world, policy, world.demo("judge", templates=templates).judge(world.jsft()))


def paper(world: World) -> dict[str, Any]:
    """The knockout under the overall question, other formats, and a prior, for every N."""
    s = _samples(world)

    def by(score: Scores) -> Callable[[int], list[int]]:
        return lambda n: s.best(score, n)

    ways: dict[str, Any] = {
        "knockout": s.knockout,
        "round robin, soft wins": by(s.soft_wins),
        "round robin, wins": by(s.wins),
        "round robin, log odds": by(s.logit_wins),
        "scalar reward by the letter": by(s.scalar),
        "most frequent text": by(s.frequency),
        "most probable text": by(lambda i, n: s.log_prob[i, :n]),
        "most probable text per token of JSFT": by(
            lambda i, n: s.jsft_log_prob[i, :n] / s.length[i, :n]
        ),
        "best by gold": by(lambda i, n: s.gold[i, :n]),
    }
    for model, log_prob in (("", s.log_prob), (" of JSFT", s.jsft_log_prob)):
        for scale, of, values in ((1, "", log_prob), (10, " per token", log_prob / s.length)):
            for weight in (scale * w for w in WEIGHTS):
                ways[f"knockout + {weight:g} log π{model}{of}"] = lambda n, prior=weight * values: (
                    s.knockout(n, prior)
                )
    distinct = float(np.mean([len(set(texts)) for texts in s.texts]))
    return {"gold_by_n": s.table(ways), "distinct": distinct, "pairs": len(s.verdicts) // 2}


def reward_schemes(world: World) -> dict[str, Any]:
    """The rewards of the same samples in groups, by scheme and at equal judge tokens."""
    s = _samples(world)
    return {
        "ranking": {
            str(n): rewards.ranking(
                world.instructions, [t[:n] for t in s.texts], s.gold[:, :n].tolist(), s.judge,
                s.verdicts,
            )
            for n in rewards.GROUPS
            if n in s.sizes
        }
    }  # fmt: skip


def by_principles(world: World) -> dict[str, Any]:
    """The same knockout under four principles that vote."""
    s = _samples(world, principles=True)
    ways = {"knockout": s.knockout, "round robin, soft wins": lambda n: s.best(s.soft_wins, n)}
    return {"gold_by_n": s.table(ways)}


STUDY = Study(
    "self_rejection",
    "Does choosing among more of the policy's own samples help, which way of choosing is best, and "
    "which scheme of rewards ranks a group best for its judge tokens?",
    {
        "overall question": paper,
        "reward schemes": reward_schemes,
        "four principles": by_principles,
    },
    "Among many samples, a judge alone picks its own mistakes, because the policy has learned what "
    "it overrates: beyond N = 4, the gold score falls. Add 3 to 10 times the mean log π per token "
    "of the JSFT model (`--prior 5`), and it rises up to N = 16. A sum over tokens favors short "
    "responses. Principles do not help. As rewards, `bradley_terry` and `all_pairs` rank pairs "
    "best at equal tokens.",
)

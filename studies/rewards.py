"""How well each scheme of `PairwiseReward` ranks a group of responses, and for how many tokens.

All schemes take their matches from verdicts that are known already, so they rank the same responses
with the same judge. Each is measured at its own cost and at equal judge tokens.
"""

# A judge computes a prefix that its prompts share only once, so a budget counts the tokens of the
# prefix tree of all prompts in a group. Two schemes at the budget of `swiss` in a group of 8:
#
#   knockout     draw 0: 7 matches, draw 1: 5 new ones, draw 2: too many. The mean of draws 0 and 1.
#   all_pairs    28 matches, in random order. Those after the first 12 or so count half for both.

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from self_judge.datatypes import Comparison, Verdict, stable_seed
from self_judge.judging.judge import Judge
from self_judge.judging.reward import PairwiseReward, Scheme
from self_judge.judging.voting import undecidable
from world import prompts_of

GROUPS = (4, 8, 16)
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
BUDGETS: tuple[Scheme, ...] = ("knockout", "swiss")
OWN = "own"
_DRAWS = 50
Verdicts = Mapping[tuple[str, str, str], Verdict]  # by (context, a, b)


class Matches:
    """The matches of one group that were judged, and their tokens.

    Attributes:
        budget: the largest number of shared tokens.
        pairs: the pairs of texts that met.
        tokens: the number of tokens in all prompts.
        refused: whether a match was beyond the budget.
    """

    def __init__(self, judge: Judge, budget: float = math.inf) -> None:
        self.judge, self.budget = judge, budget
        self.pairs: set[frozenset[str]] = set()
        self.tokens, self.refused = 0, False
        self._nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node of the prefix tree

    @property
    def shared(self) -> int:
        """The number of tokens, with those of shared prefixes counted once."""
        return len(self._nodes)

    def play(self, match: Comparison) -> bool:
        """Adds a match if the budget allows it; a match that was played costs nothing."""
        pair = frozenset((match.response_a, match.response_b))
        if pair in self.pairs:
            return True
        before, tokens = self.shared, 0
        for ids in prompts_of(self.judge, match):
            tokens += len(ids)
            node = -1
            for token in ids:
                node = self._nodes.setdefault((node, token), len(self._nodes))
        if self.refused or self.shared > self.budget:
            while self.shared > before:
                self._nodes.popitem()  # the newest
            self.refused = True
            return False
        self.pairs.add(pair)
        self.tokens += tokens
        return True


class Known(PairwiseReward):
    """The reward function for one group, with known verdicts and a budget."""

    def __init__(self, verdicts: Verdicts, matches: Matches, scheme: Scheme, seed: int) -> None:
        super().__init__(matches.judge, scheme, seed=seed)
        self.verdicts, self.matches = verdicts, matches

    def _compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        draw = random.Random(stable_seed(self.seed, comparisons[0].context))
        played = {c: self.matches.play(c) for c in draw.sample(comparisons, len(comparisons))}
        return [
            self.verdicts[c.context, c.response_a, c.response_b]
            if played[c]
            else undecidable((), "the budget is spent")
            for c in comparisons
        ]


class Group:
    """The responses to one prompt, and what the judge says of all pairs of them."""

    def __init__(self, context: str, texts: Sequence[str], judge: Judge, verdicts: Verdicts):
        self.context, self.texts, self.judge, self.verdicts = context, list(texts), judge, verdicts

    def rewards(self, scheme: Scheme, matches: Matches, seed: int = 0) -> list[float]:
        reward = Known(self.verdicts, matches, scheme, seed)
        # Rounded, so that equal rewards are equal whatever the order of their sums.
        return [round(r, 9) for r in reward([self.context] * len(self.texts), self.texts)]

    def within(self, scheme: Scheme, budget: int) -> list[float]:
        """The mean rewards of as many draws as the budget allows; the first may be incomplete."""
        matches = Matches(self.judge, budget)
        total = np.array(self.rewards(scheme, matches))
        draws = 1
        while draws < _DRAWS and not matches.refused:
            drawn = self.rewards(scheme, matches, seed=draws)
            if not matches.refused:
                total += drawn
                draws += 1
        return [round(r, 9) for r in (total / draws).tolist()]


def pairs_right(rewards: Sequence[float], gold: Sequence[float]) -> float:
    """The share of the pairs with different gold scores that rewards rank alike.

    Equal rewards count half, so r = 2 x share − 1 is a rank correlation (Kendall's, with ties).
    """
    ranked = [
        (1 + np.sign(rewards[i] - rewards[j])) / 2
        for i, j in itertools.permutations(range(len(gold)), 2)
        if gold[i] > gold[j]
    ]
    return float(np.mean(ranked))


def best_found(rewards: Sequence[float], gold: Sequence[float]) -> float:
    """Whether the response with the highest reward is a best one; a share if several have it."""
    top = [g for r, g in zip(rewards, gold, strict=True) if r == max(rewards)]
    return top.count(max(gold)) / len(top)


def ranking(
    contexts: Sequence[str],
    texts: Sequence[Sequence[str]],
    gold: Sequence[Sequence[float]],
    judge: Judge,
    verdicts: Verdicts,
) -> dict[str, Any]:
    """Measures all schemes on groups of the same size.

    Groups without a difference in gold scores are left out, because nothing can be ranked.

    Returns:
        By scheme: `matches`, `tokens` and `shared` (tokens) per group, and by budget (`own`, or
        that of another scheme) `right` and `best`. `chance` is `best` of a random response.
    """
    own: dict[str, Any] = {
        scheme: {
            "matches": [], "tokens": [], "shared": [],
            **{k: {budget: [] for budget in (OWN, *BUDGETS)} for k in ("right", "best")},
        }
        for scheme in SCHEMES
    }  # fmt: skip
    chance = []
    for context, some, scores in zip(contexts, texts, gold, strict=True):
        if len(set(scores)) == 1:
            continue
        group = Group(context, some, judge, verdicts)
        played = {scheme: Matches(judge) for scheme in SCHEMES}
        rewards = {(s, OWN): group.rewards(s, matches) for s, matches in played.items()}
        for scheme, budget in itertools.product(SCHEMES, BUDGETS):
            rewards[scheme, budget] = (
                rewards[scheme, OWN]
                if scheme == budget
                else group.within(scheme, played[budget].shared)
            )
        for (scheme, budget), given in rewards.items():
            own[scheme]["right"][budget].append(round(pairs_right(given, scores), 4))
            own[scheme]["best"][budget].append(round(best_found(given, scores), 4))
        for scheme, matches in played.items():
            own[scheme]["matches"].append(len(matches.pairs))
            own[scheme]["tokens"].append(matches.tokens)
            own[scheme]["shared"].append(matches.shared)
        chance.append(round(list(scores).count(max(scores)) / len(scores), 4))
    return {"schemes": own, "chance": chance}

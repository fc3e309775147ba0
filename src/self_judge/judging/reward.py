"""Turns pairwise judgments of a group of responses into rewards, for GRPO and similar trainers.

This module schedules matches within groups and computes rewards from verdicts. It does not depend
on how the judge works or how the policy is trained.
"""

# In this example, the group has 4 responses, and the judge gives each match a share: s(a) / (s(a) +
# s(b)) for response a, and the rest for response b.
#
#   share of row    0    1    2    3      all_pairs        mean share over the opponents
#             0     .   .8   .6   .3      0: .57           (.8 + .6 + .3) / 3
#             1    .2    .   .5   .1      1: .27           Each match hands out 1 in total, so the
#             2    .4   .5    .   .2      2: .37           mean of a group is ½, whatever the
#             3    .7   .9   .8    .      3: .80           verdicts are.
#
#   knockout (draw 0 1 2 3)               rounds won, divided by the number of rounds
#   0-1 -> 0    0-3 -> 3                  0: ½    1: 0    2: 0    3: 1       mean (N − 1) / (N · 2)
#   2-3 -> 3
#
#   swiss         ⌈log2 N⌉ rounds. In each round, responses with similar shares so far meet, and
#                 nobody meets twice. The reward is the mean share over the rounds.
#   bradley_terry the matches of swiss. The reward is the mean probability of winning against each
#                 other response under strengths that are fitted to the shares.

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, get_args

import numpy as np
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from peft import PeftModel

from self_judge.datatypes import Comparison, Message, Verdict, stable_seed
from self_judge.errors import require_type
from self_judge.judging.judge import Judge
from self_judge.judging.panel import AnyJudge, Panel
from self_judge.judging.tournament import Compare, knockouts
from self_judge.judging.voting import order_agreement
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.messages import content_of, lost, reasoning_key
from self_judge.prompting.thoughts import answer_of

Scheme = Literal["all_pairs", "knockout", "swiss", "bradley_terry"]
Text = str | Sequence[Message]
Pair = tuple[int, int]
_NO_ANSWER = "<think>"  # stands for every response without an answer; no answer begins like this


class PairwiseReward:
    """Rewards the responses to each prompt by pairwise judgments, as a TRL reward function.

    Pass it to `GRPOTrainer` or `RLOOTrainer` as one of `reward_funcs`. Equal prompts that stand
    together form a group, whose responses are compared with each other in both orders. With several
    processes, a group may be spread over processes; each group is judged once.

    Rewards are in [0, 1]. Their mean over a group depends only on the scheme and the size of the
    group: ½, except for `knockout`. A match that the judge cannot decide, including a match of
    equal responses, counts as half a win. If the judge can decide no match, all responses get the
    mean. A response without an answer after its thought loses every match. Responses with equal
    answers get equal rewards.

    Args:
        judge: a `Judge`, or a model folder with `judge.json`. If its model is a `PeftModel` with a
            trainable adapter, such as the policy itself, it judges with the adapter disabled.
        scheme: the matches and what they are worth, for N responses:

            - `all_pairs`: N(N − 1) / 2 matches; the mean share of the scores, s(a) / (s(a) + s(b)).
            - `knockout`: N − 1 matches; the fraction of rounds that the response survives.
            - `swiss`: ⌈log2 N⌉ rounds of N / 2 matches between responses with similar shares so
              far; the mean share.
            - `bradley_terry`: the matches of `swiss`; the mean probability of winning under fitted
              Bradley–Terry strengths.
        seed: determines the draws. The draw of a group depends only on `seed` and on its texts.

    Raises:
        ValueError: the scheme is unknown.
    """

    def __init__(
        self,
        judge: AnyJudge | str | os.PathLike[str],
        scheme: Scheme = "all_pairs",
        *,
        seed: int = 0,
    ) -> None:
        if scheme not in get_args(Scheme):
            known = ", ".join(get_args(Scheme))
            raise ValueError(f"scheme must be one of {known}, got {scheme!r}")
        if isinstance(judge, str | os.PathLike):
            judge = Judge.from_pretrained(judge)
        types = "a Judge, a Panel or a model folder with judge.json"
        require_type("judge", judge, (Judge, Panel), types)
        self.judge, self.scheme, self.seed = judge, scheme, seed
        self.__name__ = f"self_judge/{scheme}"  # the name in TRL's logs

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Returns one reward per completion.

        Args:
            prompts: texts or messages, one per completion. With messages, the judge sees the whole
                dialogue.
            completions: texts or messages of the assistant.
            completion_ids, columns: ignored; TRL passes them.
            log_metric: receives the means of order agreement and of undecidable matches.

        Raises:
            ValueError: the lists differ in length, no prompt has two completions, a message has
                more than text, or a completion has several turns. The message contains the index.
            TypeError: an entry is neither a text nor messages. The message contains the index.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} completions")
        own = [
            (_context(prompt, i), _response(completion, i))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        state = PartialState()
        counts = gather_object([len(own)])
        every = gather_object(own)
        groups = [list(members) for members in _groups(every)]
        if every and max(map(len, groups)) < 2:
            raise ValueError(
                f"no prompt has two completions in a row (prompt 0: {every[0][0]!r:.60}): "
                "a pairwise reward requires num_generations of at least 2"
            )
        # Each process judges its share of the groups, and all processes receive all rewards.
        mine = range(state.process_index, len(groups), state.num_processes)
        judged = self._rewards([[every[k] for k in groups[g]] for g in mine], log_metric)
        rewards = [0.0] * len(every)
        for g, values in gather_object(list(zip(mine, judged, strict=True))):
            for k, value in zip(groups[g], values, strict=True):
                rewards[k] = value
        start = sum(counts[: state.process_index])
        return rewards[start : start + len(own)]

    def _rewards(
        self, groups: Sequence[Sequence[tuple[str, str]]], log_metric: Any
    ) -> list[list[float]]:
        matches = [_Matches(own[0][0], [r for _, r in own], self.seed) for own in groups]
        with self._initial_model(), self.judge.prefix_cache():
            rewards = _SCHEMES[self.scheme](self._compare, matches)
        verdicts = [v for own in matches for v in own.verdicts.values()]
        if log_metric is not None and verdicts:
            decided = [v for v in verdicts if v.preferred is not None]
            log_metric("judge/undecidable", 1 - len(decided) / len(verdicts))
            if any(verdict.is_judged for verdict in verdicts):
                log_metric("judge/order_agreement", order_agreement(verdicts))
        return rewards

    def _compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Judges comparisons; a response without an answer loses without being judged."""
        answered = [(c.response_a != _NO_ANSWER, c.response_b != _NO_ANSWER) for c in comparisons]
        asked = [c for c, (a, b) in zip(comparisons, answered, strict=True) if a == b]
        judged = iter(self.judge.compare(asked) if asked else ())
        return [next(judged) if a == b else _by_answer(a) for a, b in answered]

    def _initial_model(self) -> AbstractContextManager[Any]:
        """Disables the adapter of a policy in training, which then judges as the initial model."""
        stack = ExitStack()
        for judge in self.judge.judges:
            if judge.in_process is None:
                continue
            model = extract_model_from_parallel(judge.model)
            trained = any(p.requires_grad for p in model.parameters())
            if isinstance(model, PeftModel) and trained:
                stack.enter_context(model.disable_adapter())
        return stack


class _Matches:
    """The matches within one group, by the indices of the responses."""

    def __init__(self, context: str, responses: Sequence[str], seed: int) -> None:
        self.context, self.responses = context, list(responses)
        self.seed = stable_seed("reward", seed, context, *responses)
        self.verdicts: dict[Pair, Verdict] = {}

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def rounds(self) -> int:
        return math.ceil(math.log2(len(self)))

    def unknown(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Returns the pairs that are not judged yet, without byes and pairs of equal responses."""
        return [
            (i, j)
            for i, j in pairs
            if j < len(self)
            and (i, j) not in self.verdicts
            and self.responses[i] != self.responses[j]
        ]

    def comparison(self, pair: Pair) -> Comparison:
        return Comparison(self.context, self.responses[pair[0]], self.responses[pair[1]])

    def share(self, i: int, j: int) -> float:
        """Returns the share of response i in the scores of its match against response j."""
        if i > j:
            return 1 - self.share(j, i)
        verdict = self.verdicts.get((i, j))
        return 0.5 if verdict is None else verdict.share

    def averaged(self, rewards: Sequence[float]) -> list[float]:
        """Gives equal responses their mean reward, because draws may treat them differently."""
        own: dict[str, list[float]] = {}
        for response, reward in zip(self.responses, rewards, strict=True):
            own.setdefault(response, []).append(reward)
        means = {response: math.fsum(values) / len(values) for response, values in own.items()}
        return [means[response] for response in self.responses]


def _judge(compare: Compare, groups: Sequence[_Matches], pairs: Sequence[Sequence[Pair]]) -> None:
    """Judges the given pairs (i, j), i < j, of all groups in one call."""
    asked = [(own, p) for own, some in zip(groups, pairs, strict=True) for p in own.unknown(some)]
    verdicts = compare([own.comparison(pair) for own, pair in asked]) if asked else []
    for (own, pair), verdict in zip(asked, verdicts, strict=True):
        own.verdicts[pair] = verdict


def _all_pairs(compare: Compare, groups: Sequence[_Matches]) -> list[list[float]]:
    _judge(compare, groups, [list(itertools.combinations(range(len(g)), 2)) for g in groups])
    return [
        [_mean(own.share(i, j) for j in range(len(own)) if j != i) for i in range(len(own))]
        for own in groups
    ]


def _knockout(compare: Compare, groups: Sequence[_Matches]) -> list[list[float]]:
    brackets = knockouts(
        compare,
        [own.context for own in groups],
        [own.responses for own in groups],
        seeds=[own.seed for own in groups],
        entrants=[range(len(own)) for own in groups],
    )
    rewards = []
    for own, bracket in zip(groups, brackets, strict=True):
        survived = [0.0] * len(own)
        decided = False
        for match in itertools.chain(*bracket.rounds):
            if match.verdict is not None and match.b is not None:
                own.verdicts[match.a, match.b] = match.verdict
            decided = decided or not (match.b is None or match.by_lot)
            if match.b is not None and match.by_lot:
                survived[match.a] += 0.5
                survived[match.b] += 0.5
            else:
                survived[match.winner] += 1
        if not decided:  # byes and the draw alone would favor some responses
            survived = [sum(survived) / len(own)] * len(own)
        rounds = len(bracket.rounds)
        rewards.append(own.averaged([s / rounds if rounds else 0.5 for s in survived]))
    return rewards


def _swiss(compare: Compare, groups: Sequence[_Matches]) -> list[list[float]]:
    rewards = []
    for own, met in zip(groups, _swiss_matches(compare, groups), strict=True):
        points = _points(own, met)
        rewards.append(own.averaged([p / own.rounds if own.rounds else 0.5 for p in points]))
    return rewards


def _bradley_terry(compare: Compare, groups: Sequence[_Matches]) -> list[list[float]]:
    rewards = []
    for own, met in zip(groups, _swiss_matches(compare, groups), strict=True):
        strengths = _strengths(own, [pair for pair in met if pair[1] < len(own)])
        wins = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        n = len(own)
        mean = (wins.sum(1) - 0.5) / (n - 1) if n > 1 else np.full(n, 0.5)
        rewards.append(own.averaged(mean.tolist()))
    return rewards


def _swiss_matches(compare: Compare, groups: Sequence[_Matches]) -> list[list[Pair]]:
    """Plays ⌈log2 N⌉ rounds in each group.

    Returns:
        The matches (i, j), i < j, of each group. If N is odd, j = N is a bye.
    """
    draws = [random.Random(own.seed) for own in groups]
    met: list[list[Pair]] = [[] for _ in groups]
    for number in range(max((own.rounds for own in groups), default=0)):
        paired = [
            _next_round(own, had, draw) if number < own.rounds else []
            for own, had, draw in zip(groups, met, draws, strict=True)
        ]
        _judge(compare, groups, paired)
        for had, pairs in zip(met, paired, strict=True):
            had += pairs
    return met


def _next_round(own: _Matches, met: Sequence[Pair], draw: random.Random) -> list[Pair]:
    """Pairs responses with similar points that have not met yet."""
    points = _points(own, met)
    order = list(range(len(own)))
    draw.shuffle(order)
    order.sort(key=lambda i: -points[i])  # stable: the draw decides among equal points
    if len(own) % 2:
        order.append(len(own))  # who meets this last entrant has a bye
    pairs = _paired(order, set(met))
    # After fewer rounds than half the entrants, each has more than half of them left to meet, so
    # such a pairing exists (Dirac's theorem).
    assert pairs is not None
    return pairs


def _paired(order: Sequence[int], met: set[Pair]) -> list[Pair] | None:
    """Pairs each entrant with the next one in the order, without pairs that have met."""
    if not order:
        return []
    first, *rest = order
    for k, other in enumerate(rest):
        pair = (min(first, other), max(first, other))
        if pair not in met:
            others = _paired(rest[:k] + rest[k + 1 :], met)
            if others is not None:
                return [pair, *others]
    return None


def _points(own: _Matches, met: Sequence[Pair]) -> list[float]:
    """Returns the sum of each response's shares. A bye counts as half a win."""
    points = [0.0] * (len(own) + 1)
    for i, j in met:
        points[i] += own.share(i, j)
        points[j] += own.share(j, i)
    return points[: len(own)]


def _strengths(own: _Matches, met: Sequence[Pair]) -> np.ndarray[Any, Any]:
    """Fits Bradley–Terry strengths, shape `(N,)`, to shares with a normal prior (sd 2)."""
    strengths = np.zeros(len(own))
    if not met:
        return strengths
    i, j = np.array(met).T
    shares = np.array([own.share(a, b) for a, b in met])
    design = np.zeros((len(met), len(own)))
    design[np.arange(len(met)), i], design[np.arange(len(met)), j] = 1, -1
    for _ in range(25):  # Newton's method on a concave function
        wins = 1 / (1 + np.exp(-design @ strengths))
        gradient = design.T @ (shares - wins) - strengths / 4
        curvature = (design.T * (wins * (1 - wins))) @ design + np.eye(len(own)) / 4
        step = np.linalg.solve(curvature, gradient)
        strengths += step
        if np.abs(step).max() < 1e-10:
            break
    return strengths


_SCHEMES: Mapping[str, Callable[[Compare, Sequence[_Matches]], list[list[float]]]] = {
    "all_pairs": _all_pairs,
    "knockout": _knockout,
    "swiss": _swiss,
    "bradley_terry": _bradley_terry,
}


def _mean(values: Iterator[float]) -> float:
    every = list(values)
    return math.fsum(every) / len(every) if every else 0.5


def _by_answer(a: bool) -> Verdict:
    """Returns the verdict on a pair in which only one response has an answer."""
    score = float(a)
    return Verdict("a" if a else "b", score, 1 - score, score, 2 * score - 1, True)


def _groups(every: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
    """Yields the indices of neighbors with the same context."""
    for _, members in itertools.groupby(range(len(every)), key=lambda k: every[k][0]):
        yield list(members)


def _context(prompt: Any, i: int) -> str:
    if isinstance(prompt, str):
        return prompt
    _check_messages(f"prompt {i}", prompt)
    return dialogue_text(prompt)


def _response(completion: Any, i: int) -> str:
    """Returns what the judge sees of a completion, so that equal answers are equal responses."""
    if isinstance(completion, str):
        answer = answer_of(completion)
        return _NO_ANSWER if answer is None else answer
    _check_messages(f"completion {i}", completion)
    roles = [message["role"] for message in completion]
    if roles != ["assistant"]:
        raise ValueError(
            f"completion {i} has turns {', '.join(roles)}: a pairwise reward compares single "
            "assistant messages"
        )
    if reasoning_key(completion[0]) and not content_of(completion[0]).strip():
        return _NO_ANSWER  # TRL parses a thought that never ends into a message without content
    return _response(content_of(completion[0]), i)


def _check_messages(what: str, messages: Any) -> None:
    good = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m
        for m in messages
    )
    if not good or not messages:
        raise TypeError(f"{what} must be a text or a list of messages, got {messages!r:.60}")
    for message in messages:
        part = lost(message)
        if part is None and not isinstance(content_of(message), str):
            part = f"content of type {type(message['content']).__name__}"
        if part is not None:
            raise ValueError(f"{what} has a message with {part}: only text can be judged")

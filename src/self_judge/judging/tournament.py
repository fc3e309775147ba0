"""Runs knockout tournaments, which select the best of N responses (self-rejection).

This module pairs responses and lets a judge decide each match. It does not depend on how the judge
works.
"""

# In this example, the judge compares responses 0 to 4 and prefers the response with the higher
# quality:
#
#   response   0  1  2  3  4        draw (shuffled by the seed, 5 here)   0 1 3 2 4
#   quality    3  5  1  4  2
#
#   round 1     round 2     round 3
#   4 ───── 4 ─┐                        Neighbors meet, and the winner advances. With an odd
#   0 ─┐       ├─ 1 ─┐                  number, the last response gets a bye (first 4, then 3) and
#      ├─ 1 ───┘     │                  is first in the next round, so no response gets two byes.
#   1 ─┘             ├─ 1               N responses need N − 1 matches (here 4) in ⌈log2 N⌉ rounds
#   3 ─┐             │                  (here 3).
#      ├─ 3 ───── 3 ─┘
#   2 ─┘                                With seek="worst", the loser of each match advances.
#                                       `rollouts.select_pairs` finds the worst response this way.
#
# The matches in a round do not depend on each other, so a single call to the judge covers all
# matches in a round, for all contexts.

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from transformers import PreTrainedTokenizerBase

from self_judge.datatypes import Comparison, Verdict, stable_seed
from self_judge.errors import require_type, suggesting
from self_judge.judging.judge import Judge
from self_judge.judging.panel import AnyJudge
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.thoughts import with_answers

Compare = Callable[[list[Comparison]], list[Verdict]]
Seek = Literal["best", "worst"]
ResultT = TypeVar("ResultT")
Steps: TypeAlias = Generator[list[Comparison], Sequence[Verdict], ResultT]
"""A game in steps: it yields the comparisons to judge, and receives their verdicts."""


@dataclass(frozen=True, slots=True)
class Match:
    """A match between two entrants, which are indices into the responses to a context.

    Attributes:
        a, b: the two entrants; `b` is `None` for a bye.
        winner: the entrant that advances. With a prior, it may differ from the judge's choice.
        verdict: the verdict, with entrant `a` as response `a`; `None` for a bye or equal responses.
        by_lot: whether the winner was drawn at random from the seed, because the responses are
            equal or the judge could not decide.
    """

    a: int
    b: int | None
    winner: int
    verdict: Verdict | None = None
    by_lot: bool = False


@dataclass(frozen=True, slots=True)
class Bracket:
    """A complete knockout: the rounds in order, as tuples of matches, and the winner."""

    rounds: tuple[tuple[Match, ...], ...]
    winner: int


def pairings(entrants: Sequence[int]) -> list[tuple[int, int | None]]:
    """Pairs neighbors. If the number of entrants is odd, the last entrant gets a bye.

    The bye comes first, so that the entrant plays in the next round before it can get another one.
    """
    # 0 1 3 2 4   ->   (4, None) (0, 1) (3, 2)
    byes: list[tuple[int, int | None]] = [(entrants[-1], None)] if len(entrants) % 2 else []
    return byes + list(zip(entrants[::2], entrants[1::2], strict=False))


def knockouts(
    compare: Compare,
    contexts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    entrants: Sequence[Sequence[int]] | None = None,
    seek: Seek = "best",
    known: dict[tuple[int, int, int], Verdict] | None = None,
    priors: Sequence[Sequence[float]] | None = None,
) -> list[Bracket]:
    """Runs one knockout per context. All matches in a round are judged together.

    Args:
        compare: a function that judges a list of comparisons, such as `Judge.compare`.
        contexts: the N contexts that the judge sees.
        responses: the responses to each context. The responses are never changed.
        seeds: one seed per context. It determines the draw and the winners of undecided matches.
        entrants: for each context, the indices of the responses that take part. By default, these
            are the responses with an answer (see `thoughts.answer_of`), so a thought that never
            ends cannot win. If no response has an answer, all responses take part, and winners are
            drawn at random.
        seek: with `"worst"`, the loser of each match advances.
        known: verdicts by (context, a, b). They are reused, and new verdicts are added.
        priors: for each context, the prior log odds of each response (see
            `tournament_rejection_sampling`).

    Raises:
        ValueError: a context has no responses, the lists differ in length, or a prior is not
            finite.
    """
    _check(contexts, responses, seeds, priors)
    known = {} if known is None else known
    of_context: list[dict[tuple[int, int], Verdict]] = [{} for _ in contexts]
    for (i, a, b), verdict in known.items():
        of_context[i][a, b] = verdict
    brackets = in_lockstep(
        compare,
        [
            knockout_steps(
                contexts[i],
                own,
                seeds[i],
                entrants=None if entrants is None else entrants[i],
                seek=seek,
                known=of_context[i],
                prior=None if priors is None else priors[i],
            )
            for i, own in enumerate(responses)
        ],
    )
    for i, verdicts in enumerate(of_context):
        known.update({(i, a, b): verdict for (a, b), verdict in verdicts.items()})
    return brackets


def knockout_steps(
    context: str,
    responses: Sequence[str],
    seed: int,
    *,
    entrants: Sequence[int] | None = None,
    seek: Seek = "best",
    known: dict[tuple[int, int], Verdict] | None = None,
    prior: Sequence[float] | None = None,
) -> Steps[Bracket]:
    """Runs one knockout in steps: yields the comparisons of each round and receives the verdicts.

    Args:
        context, responses, seed, entrants, seek, known, prior: as in `knockouts`, for one context.

    Raises:
        ValueError: there are no entrants.
    """
    known = {} if known is None else known
    lots = random.Random(seed)
    standing = list((with_answers(responses) or range(len(responses))) if entrants is None
                    else entrants)  # fmt: skip
    if not standing:
        raise ValueError(f"context {context!r:.80} has no entrants")
    lots.shuffle(standing)
    rounds: list[tuple[Match, ...]] = []
    # In the drawing above, `standing` is [0 1 3 2 4], then [4 1 3], then [3 1], then [1].
    while len(standing) > 1:
        pairs = pairings(standing)
        asked = [
            (a, b)
            for a, b in pairs
            if b is not None
            and (a, b) not in known
            and (b, a) not in known
            and responses[a] != responses[b]  # equal responses are not judged
        ]
        verdicts = yield [Comparison(context, responses[a], responses[b]) for a, b in asked]
        known.update(zip(asked, verdicts, strict=True))
        rounds.append(tuple(_match(a, b, responses, known, lots, seek, prior) for a, b in pairs))
        standing = [match.winner for match in rounds[-1]]
    return Bracket(tuple(rounds), standing[0])


def in_lockstep(compare: Compare, games: Sequence[Steps[ResultT]]) -> list[ResultT]:
    """Runs several games, such as `knockout_steps`, and judges each step of all games together."""
    results: dict[int, ResultT] = {}
    verdicts: dict[int, Sequence[Verdict] | None] = dict.fromkeys(range(len(games)))
    while verdicts:
        asked: dict[int, list[Comparison]] = {}
        for i, received in verdicts.items():
            try:
                asked[i] = next(games[i]) if received is None else games[i].send(received)
            except StopIteration as end:  # shorter games finish earlier
                results[i] = end.value
        comparisons = [comparison for own in asked.values() for comparison in own]
        judged = list(compare(comparisons) if comparisons else ())
        if len(judged) != len(comparisons):
            raise ValueError(f"{len(judged)} verdicts for {len(comparisons)} comparisons")
        rest = iter(judged)
        verdicts = {i: [next(rest) for _ in own] for i, own in asked.items()}
    return [results[i] for i in range(len(games))]


# Contexts are processed in groups, because the shared prefixes of a group remain in memory for all
# rounds. A group is complete once it has this many first-round matches.
_MATCHES_TOGETHER = 128


def _check(
    contexts: Sequence[str],
    responses: Sequence[Sequence[str]],
    seeds: Sequence[int],
    priors: Sequence[Sequence[float]] | None = None,
) -> None:
    if not len(contexts) == len(responses) == len(seeds):
        raise ValueError(
            f"{len(contexts)} contexts, {len(responses)} lists of responses, {len(seeds)} seeds: "
            "all three must have the same length"
        )
    for i, own in enumerate(responses):
        if isinstance(own, str):
            raise ValueError(f"responses[{i}] is a single string: it must be a list of responses")
        if not len(own):
            raise ValueError(f"context {i} has no responses to choose from: {contexts[i]!r:.80}")
        require_type(f"contexts[{i}]", contexts[i], str, "text (see dialogue_text)")
        for k, response in enumerate(own):
            require_type(f"responses[{i}][{k}]", response, str, "text")
    if priors is None:
        return
    if [len(own) for own in priors] != [len(own) for own in responses]:
        raise ValueError("prior must contain one number for each response to each context")
    if not all(math.isfinite(value) for own in priors for value in own):
        raise ValueError("prior contains a value that is not finite")


def judged_knockouts(
    judge: AnyJudge,
    contexts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    priors: Sequence[Sequence[float]] | None = None,
    progress: bool = False,
) -> list[Bracket]:
    """Runs `knockouts` with a judge, which computes shared prompt prefixes once for all rounds.

    Args:
        progress: whether to show a progress bar for each round.

    Raises:
        ValueError: as in `knockouts`.
    """
    _check(contexts, responses, seeds, priors)
    brackets: list[Bracket] = []
    start = 0
    while start < len(contexts):
        stop, matches = start, 0
        while stop < len(contexts) and (stop == start or matches < _MATCHES_TOGETHER):
            matches += len(responses[stop]) // 2
            stop += 1
        with judge.prefix_cache():
            brackets += knockouts(
                lambda comparisons: judge.compare(comparisons, progress=progress),
                contexts[start:stop],
                responses[start:stop],
                seeds=seeds[start:stop],
                priors=None if priors is None else priors[start:stop],
            )
        start = stop
    return brackets


def _match(
    a: int,
    b: int | None,
    texts: Sequence[str],
    known: Mapping[tuple[int, int], Verdict],
    lots: random.Random,
    seek: Seek,
    prior: Sequence[float] | None,
) -> Match:
    if b is None:
        return Match(a, None, a)
    verdict = None
    if texts[a] != texts[b]:
        given = known.get((a, b))
        verdict = given if given is not None else known[b, a].swapped()
    preferred = verdict and verdict.preferred
    if verdict is not None and prior is not None:
        odds = verdict.log_odds + prior[a] - prior[b]
        preferred = "a" if odds > 0 else "b" if odds < 0 else None
    if preferred is None:
        # An undecided match must not favor a position in the draw.
        return Match(a, b, lots.choice((a, b)), verdict, by_lot=True)
    a_advances = (preferred == "a") == (seek == "best")
    return Match(a, b, a if a_advances else b, verdict)


@overload
def tournament_rejection_sampling(
    *arguments: Any, return_brackets: Literal[False] = False, **named: Any
) -> list[str]: ...


@overload
def tournament_rejection_sampling(
    *arguments: Any, return_brackets: Literal[True], **named: Any
) -> tuple[list[str], list[Bracket]]: ...


@suggesting(  # type: ignore[misc]
    processing_class="tokenizer",
    encoder="tokenizer",
    templates="judge_templates",
    batch_size="judge_batch_size",
    prompts="contexts",
    completions="responses",
)
def tournament_rejection_sampling(
    model: torch.nn.Module | str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | ChatEncoder | None = None,
    judge_templates: JudgeTemplates | Mapping[str, Any] | None = None,
    token_id_a: int | None = None,
    token_id_b: int | None = None,
    contexts: Sequence[str] | None = None,
    responses: Sequence[Sequence[str]] | None = None,
    max_length: int | None = None,
    judge_batch_size: int = 8,
    *,
    seed: int = 0,
    judge: AnyJudge | None = None,
    prior: Sequence[Sequence[float]] | None = None,
    return_brackets: bool = False,
    progress: bool = False,
) -> list[str] | tuple[list[str], list[Bracket]]:
    """Selects the best response to each context in a knockout tournament (self-rejection).

    Args:
        model: the model that judges, or a model folder with `judge.json`.
        tokenizer: the tokenizer of the model (or a `ChatEncoder`). It is not needed if `model` is a
            folder.
        judge_templates: `{principle: {system, user, assistant}}`. They are not needed if `model` is
            a folder.
        token_id_a, token_id_b: expected token ids of the letters (see `Judge`).
        contexts: the dialogues that the judge sees (see `judge_templates.dialogue_text`).
        responses: the responses to each context. Their number may differ between contexts. A single
            response wins without a match.
        max_length: the maximum number of tokens in a judge prompt.
        judge_batch_size: see `batch_size` of `Judge`.
        seed: determines the draw, and the random winners of undecided matches.
        judge: a `Judge` to use instead of `model`, `tokenizer` and `judge_templates`.
        prior: for each response to each context, prior log odds, which are added to the judge's
            log odds in every match. The larger N, the more often the judge overrates one of the
            responses. A prior of λ × the mean log π per token then favors what a model considers
            likely, best the model before self-training, because the policy has learned what the
            judge overrates (`TransformersSampler.mean_log_probs`). A sum over tokens would favor
            short responses. By default, as in the paper, only the judge decides.
        return_brackets: whether to also return one `Bracket` per context.
        progress: whether to show a progress bar for each round.

    Returns:
        One response per context, and the brackets if `return_brackets` is set.

    Raises:
        ValueError: a context has no responses (the message contains the context), the lists differ
            in length, or a prior is not finite.
    """
    if contexts is None or responses is None or isinstance(contexts, str):
        raise TypeError(
            "tournament_rejection_sampling requires contexts, a list of texts, and responses, a "
            "list of responses to each"
        )
    contexts, responses = list(contexts), list(responses)
    if isinstance(judge, str | os.PathLike | torch.nn.Module):
        raise TypeError(f"judge must be a Judge: pass {judge!r:.60} as model")
    if judge is None:
        saved = isinstance(model, (str, os.PathLike))
        if not saved and any(part is None for part in (model, tokenizer, judge_templates)):
            raise ValueError(
                "tournament_rejection_sampling requires a judge, a model folder with judge.json, "
                "or model, tokenizer and judge_templates"
            )
        make: Any = Judge.from_pretrained if saved else Judge
        judge = make(
            model,
            templates=judge_templates,
            encoder=tokenizer,
            token_id_a=token_id_a,
            token_id_b=token_id_b,
            batch_size=judge_batch_size,
            max_length=max_length,
        )
    brackets = judged_knockouts(
        judge,
        contexts,
        responses,
        seeds=[stable_seed(seed, i) for i in range(len(contexts))],
        priors=prior,
        progress=progress,
    )
    winners = [own[b.winner] for own, b in zip(responses, brackets, strict=True)]
    return (winners, brackets) if return_brackets else winners

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

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

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


@dataclass(frozen=True, slots=True)
class Match:
    """A match between two entrants, which are indices into the responses to a context.

    Attributes:
        a, b: the two entrants; `b` is `None` for a bye.
        winner: the entrant that advances.
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

    Raises:
        ValueError: a context has no responses, or the lists differ in length.
    """
    _check(contexts, responses, seeds)
    known = {} if known is None else known
    generators = [random.Random(seed) for seed in seeds]
    standing: list[list[int]] = []
    for i, own in enumerate(responses):
        drawn = list((with_answers(own) or range(len(own))) if entrants is None else entrants[i])
        if not drawn:
            raise ValueError(f"context {i} has no entrants: {contexts[i]!r:.80}")
        generators[i].shuffle(drawn)
        standing.append(drawn)
    rounds: list[list[tuple[Match, ...]]] = [[] for _ in contexts]
    # In the drawing above, `standing` is [0 1 3 2 4], then [4 1 3], then [3 1], then [1]. Contexts
    # with fewer responses finish earlier.
    while any(len(entered) > 1 for entered in standing):
        paired = [pairings(e) if len(e) > 1 else [] for e in standing]
        _judge_unknown(compare, contexts, responses, paired, known)
        for i, pairs in enumerate(paired):
            if not pairs:
                continue
            played = tuple(
                _match(i, a, b, responses[i], known, generators[i], seek) for a, b in pairs
            )
            rounds[i].append(played)
            standing[i] = [match.winner for match in played]
    return [Bracket(tuple(r), s[0]) for r, s in zip(rounds, standing, strict=True)]


# Contexts are processed in groups, because the shared prefixes of a group remain in memory for all
# rounds. A group is complete once it has this many first-round matches.
_MATCHES_TOGETHER = 128


def _check(
    contexts: Sequence[str], responses: Sequence[Sequence[str]], seeds: Sequence[int]
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


def judged_knockouts(
    judge: AnyJudge,
    contexts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    progress: bool = False,
) -> list[Bracket]:
    """Runs `knockouts` with a judge, which computes shared prompt prefixes once for all rounds.

    Args:
        progress: whether to show a progress bar for each round.

    Raises:
        ValueError: as in `knockouts`.
    """
    _check(contexts, responses, seeds)
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
            )
        start = stop
    return brackets


def _judge_unknown(
    compare: Compare,
    contexts: Sequence[str],
    responses: Sequence[Sequence[str]],
    paired: Sequence[Sequence[tuple[int, int | None]]],
    known: dict[tuple[int, int, int], Verdict],
) -> None:
    asked = [
        (i, a, b)
        for i, pairs in enumerate(paired)
        for a, b in pairs
        if b is not None
        and (i, a, b) not in known
        and (i, b, a) not in known
        and responses[i][a] != responses[i][b]  # equal responses are not judged
    ]
    if not asked:
        return
    verdicts = compare(
        [Comparison(contexts[i], responses[i][a], responses[i][b]) for i, a, b in asked]
    )
    known.update(zip(asked, verdicts, strict=True))


def _match(
    context: int,
    a: int,
    b: int | None,
    texts: Sequence[str],
    known: Mapping[tuple[int, int, int], Verdict],
    lots: random.Random,
    seek: Seek,
) -> Match:
    if b is None:
        return Match(a, None, a)
    verdict = None
    if texts[a] != texts[b]:
        given = known.get((context, a, b))
        verdict = given if given is not None else known[context, b, a].swapped()
    if verdict is None or verdict.preferred is None:
        # An undecided match must not favor a position in the draw.
        return Match(a, b, lots.choice((a, b)), verdict, by_lot=True)
    a_advances = (verdict.preferred == "a") == (seek == "best")
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
        return_brackets: whether to also return one `Bracket` per context.
        progress: whether to show a progress bar for each round.

    Returns:
        One response per context, and the brackets if `return_brackets` is set.

    Raises:
        ValueError: a context has no responses (the message contains the context), or the lists
            differ in length.
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
        progress=progress,
    )
    winners = [own[b.winner] for own, b in zip(responses, brackets, strict=True)]
    return (winners, brackets) if return_brackets else winners

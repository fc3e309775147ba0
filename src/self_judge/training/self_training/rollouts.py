"""Rollouts: prompts to judged pairs of own responses, and judged pairs to TRL's preference batch.

Three verbs: sample, judge, collate. It does not know the loss or the optimizer.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from self_judge.config.self_training import PairSelection
from self_judge.datatypes import Comparison, Response, Verdict, stable_seed
from self_judge.judging.tournament import Bracket, Compare, knockouts
from self_judge.storage.atomic import atomic_write


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt with the pair of its own responses that the policy is to learn from.

    Attributes:
        record: the record's place in the dataset.
        prompt_ids, context: what the policy continued, and what the judge was shown.
        chosen, rejected: the preferred response and the other, exactly as sampled.
        verdict: the judge's verdict with `chosen` as response a; `None` for two equal texts.
        decided: whether the pair may be trained on.
    """

    record: int
    prompt_ids: tuple[int, ...]
    context: str
    chosen: Response
    rejected: Response
    verdict: Verdict | None
    decided: bool


def select_pairs(
    compare: Compare,
    contexts: Sequence[str],
    responses: Sequence[Sequence[Response]],
    seeds: Sequence[int],
    selection: PairSelection = "best_worst",
) -> list[tuple[int, int, Verdict | None]]:
    """Which two of each prompt's responses to learn from: the best, and the worst or a random one.

    Two responses are judged once. Of more, the best is the winner of a knockout, the worst the one
    that goes on in its mirror, where losers go on; the mirror shares the first round and is played
    by those who lost in it. The pair is then judged directly, unless it has met already, and is
    decided only if that verdict agrees.

    Returns:
        Per prompt the places of the better and the worse response, and the verdict on them with
        the better as a (`None`: equal texts).

    Raises:
        ValueError: a prompt with fewer than two responses, or lists of different lengths.
    """
    for i, own in enumerate(responses):
        if len(own) < 2:
            raise ValueError(
                f"prompt {i} has {len(own)} responses: a pair to learn from needs at least 2"
            )
    texts = [[r.text for r in own] for own in responses]
    known: dict[tuple[int, int, int], Verdict] = {}
    brackets = knockouts(compare, contexts, texts, seeds=seeds, known=known)
    best = [bracket.winner for bracket in brackets]
    if selection == "best_worst":
        losers = [_first_losers(bracket) for bracket in brackets]
        mirrored = knockouts(
            compare, contexts, texts, seeds=seeds, entrants=losers, seek="worst", known=known
        )
        worst = [bracket.winner for bracket in mirrored]
    else:
        worst = [
            random.Random(stable_seed(s, "other")).choice([k for k in range(len(own)) if k != b])
            for s, own, b in zip(seeds, texts, best, strict=True)
        ]
    pairs = list(enumerate(zip(best, worst, strict=True)))
    asked = [
        (i, b, w)
        for i, (b, w) in pairs
        if (i, b, w) not in known and (i, w, b) not in known and texts[i][b] != texts[i][w]
    ]
    direct = compare([Comparison(contexts[i], texts[i][b], texts[i][w]) for i, b, w in asked])
    known.update(zip(asked, direct, strict=True))
    known.update({(i, w, b): verdict.swapped() for (i, b, w), verdict in list(known.items())})
    return [(b, w, known.get((i, b, w))) for i, (b, w) in pairs]


def _first_losers(bracket: Bracket) -> list[int]:
    """Who may be the worst: those who lost in the first round, or had a bye in it and lost later.

    Whoever won in the first round has a worse one behind them, so the winner is never among these.
    """
    losers = [m.b if m.winner == m.a else m.a for m in bracket.rounds[0]]
    byes = [m.a for m in bracket.rounds[0] if m.b is None and m.a != bracket.winner]
    return [k for k in losers if k is not None] + byes


def judged_rollouts(
    compare: Compare,
    records: Sequence[int],
    prompts: Sequence[Sequence[int]],
    contexts: Sequence[str],
    responses: Sequence[Sequence[Response]],
    seeds: Sequence[int],
    selection: PairSelection = "best_worst",
) -> list[Rollout]:
    """Judges the responses to every prompt and keeps one pair of each; see `select_pairs`."""
    pairs = select_pairs(compare, contexts, responses, seeds, selection)
    return [
        Rollout(
            record=records[i],
            prompt_ids=tuple(prompts[i]),
            context=contexts[i],
            chosen=responses[i][better],
            rejected=responses[i][worse],
            verdict=verdict,
            # A response without a token has nothing to learn from, whatever the judge says of it.
            decided=verdict is not None
            and verdict.preferred == "a"
            and bool(responses[i][better].ids and responses[i][worse].ids),
        )
        for i, (better, worse, verdict) in enumerate(pairs)
    ]


def preference_batch(
    pairs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int], bool]],
    pad_token_id: int,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, torch.Tensor]:
    """TRL's preference batch: `input_ids`, `attention_mask`, `completion_mask`, each `(2B, T)`.

    Args:
        pairs: (prompt ids, chosen ids, rejected ids, decided). An undecided pair keeps its two rows
            with an empty completion mask: it takes part in the batch and carries no gradient.
        pad_token_id: fills rows on the right.
        max_length: rows are cut to so many tokens.
        pad_to_multiple_of: T is rounded up to a multiple of it.

    Chosen rows come first. Ids are put together, never tokenized again.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for side in ("chosen", "rejected"):
        for prompt, chosen, rejected, decided in pairs:
            completion = chosen if side == "chosen" else rejected
            ids = [*prompt, *completion][:max_length]
            rows.append((ids, ([0] * len(prompt) + [int(decided)] * len(completion))[:max_length]))
    longest = max(len(ids) for ids, _ in rows)
    if pad_to_multiple_of:
        longest = math.ceil(longest / pad_to_multiple_of) * pad_to_multiple_of
    ids_BT = torch.full((len(rows), longest), pad_token_id)
    attention_BT = torch.zeros_like(ids_BT)
    completion_BT = torch.zeros_like(ids_BT)
    for i, (ids, mask) in enumerate(rows):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        attention_BT[i, : len(ids)] = 1
        completion_BT[i, : len(ids)] = torch.tensor(mask)
    return {
        "input_ids": ids_BT,
        "attention_mask": attention_BT,
        "completion_mask": completion_BT,
    }


def rollout_totals(rollouts: Sequence[Rollout], principles: Sequence[str]) -> dict[str, float]:
    """Sums over rollouts, so that processes can add theirs up; `rollout_metrics` divides them."""
    judged = [r.verdict for r in rollouts if r.decided and r.verdict is not None]
    lengths = [len(x.ids) for r in rollouts for x in (r.chosen, r.rejected)]
    totals = {
        "pairs": float(len(rollouts)),
        "decided": float(len(judged)),
        "margin": math.fsum(v.margin for v in judged),
        "orders_agree": float(sum(v.orders_agree for v in judged)),
        "broken": float(sum(is_broken(r) for r in rollouts)),
        "responses": float(len(lengths)),
        "tokens": float(sum(lengths)),
        "finished": float(sum(x.finished for r in rollouts for x in (r.chosen, r.rejected))),
        "chosen_tokens": float(sum(len(r.chosen.ids) for r in rollouts)),
        "rejected_tokens": float(sum(len(r.rejected.ids) for r in rollouts)),
    }
    for p, principle in enumerate(principles):
        wins = 0.0
        for verdict in judged:
            (aa, ab), (ba, bb) = verdict.probabilities[p]
            difference = (aa + bb) - (ab + ba)
            wins += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        totals[f"wins/{principle}"] = wins
    return totals


def is_broken(rollout: Rollout) -> bool:
    """Whether nothing can be learned since something failed: no tokens, or scores not finite."""
    if not (rollout.chosen.ids and rollout.rejected.ids):
        return True
    verdict = rollout.verdict
    return verdict is not None and bool(verdict.probabilities) and not math.isfinite(verdict.margin)


def rollout_metrics(totals: dict[str, float]) -> dict[str, float]:
    """The logged means, from (summed) `rollout_totals`.

    Margin, order agreement and the principles' win rates are over decided pairs; a principle's win
    rate is the share of pairs in which it sides with the verdict.
    """
    decided, responses = max(totals["decided"], 1.0), max(totals["responses"], 1.0)
    pairs = max(totals["pairs"], 1.0)
    metrics = {
        "judge/margin": totals["margin"] / decided,
        "judge/order_agreement": totals["orders_agree"] / decided,
        "judge/undecidable": 1.0 - totals["decided"] / pairs,
        "judge/broken": totals["broken"] / pairs,
        "completions/mean_length": totals["tokens"] / responses,
        "completions/finished": totals["finished"] / responses,
        "completions/chosen_length": totals["chosen_tokens"] / pairs,
        "completions/rejected_length": totals["rejected_tokens"] / pairs,
    }
    for name, value in totals.items():
        if name.startswith("wins/"):
            metrics[f"judge/win_rate/{name.removeprefix('wins/')}"] = value / decided
    return metrics


def write_rollouts(
    path: Path,
    rollouts: Iterable[Rollout],
    step: int,
    principles: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Writes one JSON line per rollout; the file is whole or not there.

    Args:
        step: the optimizer step that learns from them, from 1 on.
        principles: names of the principles, in the order of a verdict's probabilities.
        decode: ids of a prompt to its text, control tokens included: what the policy continued.
    """
    with atomic_write(path) as file:
        for rollout in rollouts:
            values = {
                "step": step,
                **_as_json(rollout),
                "principles": list(principles),
                "prompt": decode(rollout.prompt_ids),
            }
            file.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")


def _as_json(rollout: Rollout) -> dict[str, Any]:
    verdict = rollout.verdict
    return {
        "record": rollout.record,
        "context": rollout.context,
        "chosen": rollout.chosen.text,
        "rejected": rollout.rejected.text,
        "chosen_tokens": len(rollout.chosen.ids),
        "rejected_tokens": len(rollout.rejected.ids),
        "chosen_finished": rollout.chosen.finished,
        "rejected_finished": rollout.rejected.finished,
        "decided": rollout.decided,
        "margin": verdict.margin if rollout.decided and verdict else None,
        "orders_agree": verdict.orders_agree if verdict else None,
        # JSON knows no NaN: what is not finite is null.
        "probabilities": [
            [[p if math.isfinite(p) else None for p in letters] for letters in orders]
            for orders in verdict.probabilities
        ]
        if verdict
        else None,
        "undecidable_because": _why_undecided(rollout),
    }


def _why_undecided(rollout: Rollout) -> str | None:
    if rollout.decided:
        return None
    if rollout.verdict is None:
        return "equal texts"
    if not (rollout.chosen.ids and rollout.rejected.ids):
        return "a response without a token"
    return rollout.verdict.undecidable_because or "the verdict contradicts the tournament"


Samples = list[list[Response]]


class BatchesAhead:
    """The batches of an optimizer step, and those of the one after it, from one pass of data."""

    def __init__(self) -> None:
        self._source: Iterator[Any] | None = None
        self._waiting: list[Any] = []

    def take(self, source: Iterator[Any], count: int) -> tuple[list[Any], list[Any]]:
        """This step's batches, and as many more; fewer, or none, where the data end.

        Args:
            source: of one epoch; another one begins anew.
            count: batches of a step.
        """
        if source is not self._source:
            self._source, self._waiting = source, []
        self._draw(source, count)
        now, self._waiting = self._waiting[:count], self._waiting[count:]
        self._draw(source, count)
        return now, self._waiting[:count]

    def _draw(self, source: Iterator[Any], count: int) -> None:
        while len(self._waiting) < count:
            try:
                self._waiting.append(next(source))
            except StopIteration:
                return


class SamplesAhead:
    """Samples that are being drawn in a thread of their own, for given batches."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._drawn: tuple[Sequence[Any], Future[Samples]] | None = None

    def start(self, batches: Sequence[Any], draw: Callable[[], Samples]) -> None:
        """Begins to draw; what was begun before is waited for and forgotten."""
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._drawn = (batches, self._thread.submit(draw))

    def take(self, batches: Sequence[Any]) -> Samples | None:
        """The samples for these batches, once they are there; `None` if they are not being drawn.

        Raises:
            Exception: what drawing them raised.
        """
        if self._drawn is None:
            return None
        own, future = self._drawn
        self._drawn = None
        samples = future.result()
        same = len(own) == len(batches) and all(a is b for a, b in zip(own, batches, strict=True))
        return samples if same else None

    def close(self) -> None:
        """Waits for what is being drawn."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._drawn = None

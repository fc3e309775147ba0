"""Rollouts: prompts to judged pairs of own responses, and judged pairs to TRL's preference batch.

Three verbs: sample, judge, collate. It does not know the loss or the optimizer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from self_judge.config.self_training import PairSelection
from self_judge.datatypes import Comparison, Response, Verdict, stable_seed
from self_judge.inference.lockstep import LockstepPacking
from self_judge.inference.sampling import Sampler, TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import Bracket, Compare, knockouts
from self_judge.training.callbacks import StepClock
from self_judge.training.self_training.config import SelfJudgeConfig


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


def evaluation_batch(
    inputs: Mapping[str, Any], pad_token_id: int, max_length: int | None, multiple: int | None
) -> dict[str, torch.Tensor]:
    """The preference batch of prepared records with given responses; see `preference_batch`.

    Raises:
        ValueError: a record lacks one of its two responses; it is named.
    """
    for side in ("chosen", "rejected"):
        missing = next((i for i, ids in enumerate(inputs[f"{side}_ids"]) if not ids), None)
        if missing is not None:
            raise ValueError(
                f"record {int(inputs['record'][missing])} of the evaluation data has no "
                f"{side!r} response: evaluation compares given pairs"
            )
    columns = (inputs["prompt_ids"], inputs["chosen_ids"], inputs["rejected_ids"])
    pairs = [(p, c, r, True) for p, c, r in zip(*columns, strict=True)]
    return preference_batch(pairs, pad_token_id, max_length, multiple)


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


class RolloutPipeline:
    """The prompts of an optimizer step in, judged pairs out: samples, judges, and keeps the time.

    Args:
        judge: compares the responses.
        settings: of the run; a sampler that had to halve its batches halves them here too.
        clock: times the phases; the metrics go where its own go.
        sampler: within it, what samples from the policy as it is at this step.
        reference: within it, the judge's weights are in force.
        lockstep: the packing of a judge that processes share.
    """

    def __init__(
        self,
        judge: Judge,
        settings: SelfJudgeConfig,
        clock: StepClock,
        *,
        sampler: Callable[[], AbstractContextManager[Sampler]],
        reference: Callable[[], AbstractContextManager[None]],
        lockstep: LockstepPacking | None = None,
    ) -> None:
        self.judge, self.settings, self.clock = judge, settings, clock
        self.sampler, self.reference, self.lockstep = sampler, reference, lockstep
        self.sampled_tokens = 0
        self._batches, self._samples = BatchesAhead(), SamplesAhead()
        self._next: list[Any] = []

    def take(self, source: Iterator[Any], count: int) -> list[Any]:
        """A step's batches; with rollouts ahead those of the next step are drawn and held."""
        now, self._next = self._batches.take(source, count)
        return now

    def roll_out(
        self, batches: Sequence[Mapping[str, Any]], step: int, *, last: bool = False
    ) -> list[list[Rollout]]:
        """Samples and judges all prompts of a step at once.

        Args:
            batches: the step's micro-batches of prepared prompts; see `SelfJudgeCollator`.
            step: optimizer steps done so far; part of every seed.
            last: no step follows, so nothing is sampled ahead.

        Returns:
            One list of rollouts per micro-batch.
        """
        records = [int(r) for batch in batches for r in batch["record"]]
        contexts = [context for batch in batches for context in batch["context"]]
        prompts, _, seeds = asked = self._asked(batches, step)
        times, k = self.settings.rollouts_per_update, self.settings.num_generations
        with self.clock.phase("sampling"):
            ahead = self._samples.take(batches)
            responses = self._sampled(*asked) if ahead is None else ahead
        self.clock.metrics["rollouts/steps_behind"].append(float(ahead is not None))
        self.sampled_tokens = sum(len(r.ids) for own in responses for r in own)
        # Every rollout of a prompt has samples and lots of its own.
        each = [(i, t) for i in range(len(prompts)) for t in range(times)]
        # The matches of a tournament have contexts and responses in common, a single one has not.
        rounds = self.judge.prefix_cache() if k > 2 else nullcontext()
        with self.clock.phase("judging"), self.reference(), rounds:
            if self.lockstep is not None:
                self.lockstep.decision  # noqa: B018  trying it is for all processes at once
            rollouts = judged_rollouts(
                self.judge.compare,
                [records[i] for i, _ in each],
                [prompts[i] for i, _ in each],
                [contexts[i] for i, _ in each],
                [responses[i][t * k : (t + 1) * k] for i, t in each],
                [stable_seed(seeds[i], "again", t) if t else seeds[i] for i, t in each],
                self.settings.pair_selection,
            )
            if self.lockstep is not None:
                self.lockstep.finish()
        if self.settings.rollouts_ahead and not last:
            self._sample_ahead(step + 1)
        own = iter(rollouts)
        return [[next(own) for _ in range(times * len(b["record"]))] for b in batches]

    def _asked(
        self, batches: Sequence[Mapping[str, Any]], step: int
    ) -> tuple[list[list[int]], int, list[int]]:
        """The prompts of a step, how many responses each gets, and their seeds."""
        prompts = [ids for batch in batches for ids in batch["prompt_ids"]]
        # A record's samples depend on the seed, the step and the record alone: not on the batch it
        # is in, the number of processes or a resume in between.
        records = [int(r) for batch in batches for r in batch["record"]]
        seeds = [stable_seed(self.settings.seed, step, r) for r in records]
        return prompts, self.settings.rollouts_per_update * self.settings.num_generations, seeds

    def _sampled(self, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int]) -> Samples:
        with self.sampler() as sampler:
            responses = sampler.sample(prompts, n, seeds)
            if isinstance(sampler, TransformersSampler):  # less, if memory was full
                self.settings.generation_batch_size = sampler.batch_size
        return responses

    def _sample_ahead(self, step: int) -> None:
        """Has servers sample for the next step while this one updates."""
        with self.clock.phase("sampling"):
            # No process may still sample from the policy that is replaced.
            self.clock.accelerator.wait_for_everyone()
            with self.sampler() as servers:  # they stay when the context ends
                draw = servers.sample
        if self._next:  # else an epoch ends
            asked, batches = self._asked(self._next, step), self._next
            self._samples.start(batches, lambda: draw(*asked))

"""Turns prompts into judged pairs of the policy's responses, and pairs into TRL's batches.

This module samples, judges and collates. It does not depend on the loss or the optimizer.
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
from self_judge.judging.panel import AnyJudge
from self_judge.judging.tournament import Bracket, Compare, knockouts
from self_judge.training.callbacks import StepClock
from self_judge.training.self_training.config import SelfJudgeConfig


@dataclass(frozen=True, slots=True)
class Rollout:
    """One prompt with a pair of sampled responses, from which the policy learns.

    Attributes:
        record: the record's index in the dataset.
        prompt_ids, context: the policy's prompt, and the context that the judge saw.
        chosen, rejected: the preferred response and the other one, exactly as sampled.
        verdict: the judge's verdict, in which response `a` is `chosen`; `None` if the texts are
            equal.
        decided: whether the policy is trained on the pair.
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
    """Selects a training pair per prompt: the best response, and the worst or a random one.

    Two responses are judged once. If there are more, the winner of a knockout tournament is the
    best response. The worst response is the winner of a mirrored knockout, which starts with the
    losers of the first round and in which losers advance. These two responses are then compared
    directly, unless they have already met. The pair is decided only if their verdict prefers the
    best response.

    Returns:
        For each prompt, the indices of the better and the worse response, and the verdict in which
        response `a` is the better one (`None` if the texts are equal).

    Raises:
        ValueError: a prompt has fewer than two responses, or the lists differ in length.
    """
    # The knockout of `tournament.py` (qualities 3 5 1 4 2, seed 5) and its mirror:
    #
    #   best    4 bye    0-1 -> 1    3-2 -> 3      3 rounds with 4 matches: response 1 is the best
    #           3 bye    4-1 -> 1
    #           3-1 -> 1
    #   mirror  entrants: 0 and 2 (lost in round 1) and 4 (bye in round 1, lost later)
    #           4 bye    0-2 -> 2                  2 more matches: response 2 is the worst
    #           4-2 -> 2
    #   direct  1-2                                they have not met yet, so there is one more match
    #
    # 7 comparisons select the pair (1, 2). `known` stores all verdicts, so no match is judged
    # twice.
    for i, own in enumerate(responses):
        if len(own) < 2:
            raise ValueError(
                f"prompt {i} has {len(own)} responses, but a training pair requires at least 2"
            )
    texts = [[r.judged for r in own] for own in responses]
    # Responses without an answer do not take part. If fewer than two responses have an answer, all
    # responses take part, and the judge cannot decide.
    answered = [[k for k, r in enumerate(own) if r.answered] for own in responses]
    entered = [
        own if len(own) > 1 else list(range(len(all_)))
        for own, all_ in zip(answered, responses, strict=True)
    ]
    known: dict[tuple[int, int, int], Verdict] = {}
    brackets = knockouts(compare, contexts, texts, seeds=seeds, entrants=entered, known=known)
    best = [bracket.winner for bracket in brackets]
    if selection == "best_worst":
        losers = [_first_losers(bracket) for bracket in brackets]
        mirrored = knockouts(
            compare, contexts, texts, seeds=seeds, entrants=losers, seek="worst", known=known
        )
        worst = [bracket.winner for bracket in mirrored]
    else:
        worst = [
            random.Random(stable_seed(s, "other")).choice([k for k in own if k != b])
            for s, own, b in zip(seeds, entered, best, strict=True)
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
    """Returns the candidates for the worst response.

    The candidates are the losers of round 1 and the response with a bye in round 1, unless this
    response won the knockout. The winner of a match in round 1 is not a candidate, because it has
    beaten a worse response.
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
    """Judges the responses to every prompt and keeps one pair per prompt; see `select_pairs`."""
    pairs = select_pairs(compare, contexts, responses, seeds, selection)
    return [
        Rollout(
            record=records[i],
            prompt_ids=tuple(prompts[i]),
            context=contexts[i],
            chosen=responses[i][better],
            rejected=responses[i][worse],
            verdict=verdict,
            # The policy cannot learn from a response without tokens, even if the verdict is clear.
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
    """Returns TRL's batch: `input_ids`, `attention_mask`, `completion_mask`, each `(2B, T)`.

    Args:
        pairs: (prompt ids, chosen ids, rejected ids, decided). The two rows of an undecided pair
            have an empty completion mask. They are in the batch but do not contribute to the
            gradient.
        pad_token_id: the id used to pad rows on the right.
        max_length: rows are truncated to this number of tokens.
        pad_to_multiple_of: T is rounded up to a multiple of this number.

    Chosen rows come first. Ids are concatenated and never tokenized again.
    """
    # Pair 0 has prompt p q, chosen A B and rejected C. Pair 1 is undecided, and has prompt r and
    # responses D and E F.
    #
    #   input_ids   p q A B     attention_mask   1 1 1 1     completion_mask   0 0 1 1    chosen 0
    #               r D _ _                      1 1 0 0                       0 0 0 0    chosen 1
    #               p q C _                      1 1 1 0                       0 0 1 0    rejected 0
    #               r E F _                      1 1 1 0                       0 0 0 0    rejected 1
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
    """Returns the batch for prepared records with given responses; see `preference_batch`.

    Raises:
        ValueError: a record has no response. The message names the record.
    """
    for side in ("chosen", "rejected"):
        missing = next((i for i, ids in enumerate(inputs[f"{side}_ids"]) if not ids), None)
        if missing is not None:
            raise ValueError(
                f"record {int(inputs['record'][missing])} of the evaluation data has no "
                f"{side!r} response, but evaluation needs both responses"
            )
    columns = (inputs["prompt_ids"], inputs["chosen_ids"], inputs["rejected_ids"])
    pairs = [(p, c, r, True) for p, c, r in zip(*columns, strict=True)]
    return preference_batch(pairs, pad_token_id, max_length, multiple)


Samples = list[list[Response]]


class BatchesAhead:
    """Reads the batches of an optimizer step and of the next step in one pass over the data."""

    def __init__(self) -> None:
        self._source: Iterator[Any] | None = None
        self._waiting: list[Any] = []

    def take(self, source: Iterator[Any], count: int) -> tuple[list[Any], list[Any]]:
        """Returns this step's batches and those of the next step, up to the end of the data.

        Args:
            source: the batches of one epoch. With a new source, batches already read are discarded.
            count: the number of batches per step.
        """
        # Batches a b c d e, two per step:   [a b] [c d]   then   [c d] [e]   then   [e] []
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
    """Samples responses for given batches in a separate thread."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._drawn: tuple[Sequence[Any], Future[Samples]] | None = None

    def start(self, batches: Sequence[Any], draw: Callable[[], Samples]) -> None:
        """Waits for any earlier sampling, discards its samples, and starts sampling."""
        self.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._drawn = (batches, self._thread.submit(draw))

    def take(self, batches: Sequence[Any]) -> Samples | None:
        """Waits for the samples of these batches; returns `None` if there are none.

        Raises:
            Exception: any error that occurred during sampling.
        """
        if self._drawn is None:
            return None
        own, future = self._drawn
        self._drawn = None
        samples = future.result()
        same = len(own) == len(batches) and all(a is b for a, b in zip(own, batches, strict=True))
        return samples if same else None

    def close(self) -> None:
        """Waits until the current sampling has finished."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        self._drawn = None


class RolloutPipeline:
    """Samples and judges responses to the prompts in an optimizer step, and times these phases.

    Args:
        judge: compares the responses.
        settings: the run's settings. If a sampler halves its batch size, `generation_batch_size` is
            halved too.
        clock: times the phases and contains the metrics.
        sampler: a context manager that provides a sampler for the current policy.
        reference: a context manager that activates the judge's weights.
        lockstep: the packing for a judge that is sharded across processes.
    """

    def __init__(
        self,
        judge: AnyJudge,
        settings: SelfJudgeConfig,
        clock: StepClock,
        *,
        sampler: Callable[[], AbstractContextManager[Sampler]],
        reference: Callable[[], AbstractContextManager[None]],
        lockstep: LockstepPacking | None = None,
    ) -> None:
        self.judge, self.settings, self.clock = judge, settings, clock
        self.sampler, self.reference, self.lockstep = sampler, reference, lockstep
        self.sampled_tokens = self.thought_tokens = 0
        self._batches, self._samples = BatchesAhead(), SamplesAhead()
        self._next: list[Any] = []

    def take(self, source: Iterator[Any], count: int) -> list[Any]:
        """Returns a step's batches, and reads the next step's batches for `rollouts_ahead`."""
        now, self._next = self._batches.take(source, count)
        return now

    def roll_out(
        self, batches: Sequence[Mapping[str, Any]], step: int, *, last: bool = False
    ) -> list[list[Rollout]]:
        """Samples and judges responses to all prompts of a step at once.

        Args:
            batches: the step's micro-batches of prepared prompts; see `SelfJudgeCollator`.
            step: the number of finished optimizer steps, which is part of every seed.
            last: whether this is the last step, in which nothing is sampled ahead.

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
        # Each rollout of a prompt has its own samples and its own seed. With two rollouts of K = 2
        # samples, responses[i] = [s0 s1 s2 s3] gives the pairs (i, 0) from s0 s1 and (i, 1) from s2
        # s3.
        each = [(i, t) for i in range(len(prompts)) for t in range(times)]
        # The matches of a tournament share contexts and responses. With a single match, nothing is
        # shared.
        rounds = self.judge.prefix_cache() if k > 2 else nullcontext()
        with self.clock.phase("judging"), self.reference(), rounds:
            if self.lockstep is not None:
                self.lockstep.decision  # noqa: B018  all processes must run this trial together
            before = self.judge.thought_tokens
            rollouts = judged_rollouts(
                self.judge.compare,
                [records[i] for i, _ in each],
                [prompts[i] for i, _ in each],
                [contexts[i] for i, _ in each],
                [responses[i][t * k : (t + 1) * k] for i, t in each],
                [stable_seed(seeds[i], "again", t) if t else seeds[i] for i, t in each],
                self.settings.pair_selection,
            )
            self.thought_tokens = self.judge.thought_tokens - before
            if self.lockstep is not None:
                self.lockstep.finish()
        if self.settings.rollouts_ahead and not last:
            self._sample_ahead(step + 1)
        own = iter(rollouts)
        return [[next(own) for _ in range(times * len(b["record"]))] for b in batches]

    def _asked(
        self, batches: Sequence[Mapping[str, Any]], step: int
    ) -> tuple[list[list[int]], int, list[int]]:
        """Returns the prompts of a step, the number of responses per prompt, and the seeds."""
        prompts = [ids for batch in batches for ids in batch["prompt_ids"]]
        # A record's samples depend only on the seed, the step and the record. They do not depend on
        # the record's batch, the number of processes or whether the run was resumed.
        records = [int(r) for batch in batches for r in batch["record"]]
        seeds = [stable_seed(self.settings.seed, step, r) for r in records]
        return prompts, self.settings.rollouts_per_update * self.settings.num_generations, seeds

    def _sampled(self, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int]) -> Samples:
        with self.sampler() as sampler:
            responses = sampler.sample(prompts, n, seeds)
            if isinstance(sampler, TransformersSampler):  # reduced if memory ran out
                self.settings.generation_batch_size = sampler.batch_size
        return responses

    def _sample_ahead(self, step: int) -> None:
        """Lets the servers sample the next step's responses during this step's update."""
        with self.clock.phase("sampling"):
            # Every process must finish sampling from the policy before the policy is replaced.
            self.clock.accelerator.wait_for_everyone()
            with self.sampler() as servers:  # the servers outlive this context
                draw = servers.sample
        if self._next:  # empty at the end of an epoch
            asked, batches = self._asked(self._next, step), self._next
            self._samples.start(batches, lambda: draw(*asked))

"""Computes statistics of judges and policies, with confidence intervals.

Only `evaluate_judge` calls a judge. The other functions use only verdicts, scores, outcomes and
lengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest, bootstrap

from self_judge.data.records import judge_context
from self_judge.datatypes import Comparison, PreferenceRecord, Verdict
from self_judge.judging.voting import order_agreement, under_principle

if TYPE_CHECKING:
    from self_judge.judging.judge import Judge

Array = NDArray[np.float64]

# The standard deviation of the normal prior on γ. The prior keeps γ finite if length alone
# separates wins from losses.
PRIOR_SD = 2.5
_BOUND = 10.0  # keeps |θ| finite if all prompts are won, or all are lost


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with a 95 % confidence interval.

    Attributes:
        value: the mean.
        low, high: the ends of the interval.
        n: the number of values.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(successes: float, n: int) -> Estimate:
    """Returns a proportion with its Wilson interval.

    A tie counts as half a success. The interval uses the number of successes, rounded to an
    integer.

    Raises:
        ValueError: n is 0.
    """
    if n < 1:
        raise ValueError("a proportion needs at least one value")
    interval = binomtest(round(successes), n).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Returns a mean with its percentile bootstrap interval (9,999 resamples of the values).

    Args:
        values: one value per independent unit, such as a prompt.
        seed: the seed for resampling.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values))
    if len(set(values)) == 1:  # if all values are equal, the interval is a point
        return Estimate(mean, mean, mean, len(values))
    interval = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        method="percentile",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(values))


def bootstrap_counts(counts: Mapping[float, int], seed: int = 0) -> Estimate:
    """Computes `bootstrap_mean` from distinct values and their counts.

    Resampling n values is equivalent to drawing their counts from a multinomial distribution, so
    memory and time do not grow with n.

    Raises:
        ValueError: there are no values.
    """
    return bootstrap_strata([counts], seed)


def bootstrap_strata(strata: Sequence[Mapping[float, int]], seed: int = 0) -> Estimate:
    """Returns the mean over strata of each stratum's mean. Each stratum is resampled separately.

    Args:
        strata: the distinct values and their counts in each stratum.
        seed: the seed for resampling.

    Raises:
        ValueError: a stratum has no values.
    """
    rng = np.random.default_rng(seed)
    total, mean, resampled = 0, 0.0, np.zeros(9999)
    for counts in strata:
        n = sum(counts.values())
        if n < 1:
            raise ValueError("a mean needs at least one value")
        values = np.array(list(counts), dtype=float)
        weights = np.array(list(counts.values())) / n
        resampled += rng.multinomial(n, weights, size=9999) @ values / n
        mean += float(values @ weights)
        total += n
    low, high = np.quantile(resampled / len(strata), (0.025, 0.975))
    return Estimate(mean / len(strata), float(low), float(high), total)


def with_width(estimate: Estimate, lowest: float = 0.0, highest: float = 1.0) -> Estimate:
    """Returns a bootstrap estimate, with a Wilson interval if its own is a point.

    If all values are equal, resampling them shows no spread, although another value may differ.

    Args:
        lowest, highest: the range of the values.
    """
    if estimate.low < estimate.high:
        return estimate
    span = highest - lowest
    share = proportion((estimate.value - lowest) / span * estimate.n, estimate.n)
    low, high = lowest + span * share.low, lowest + span * share.high
    return Estimate(estimate.value, low, high, estimate.n)


def win_rate(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """Returns the fraction of prompts on which `ours` is higher. A tie counts as half a win."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return with_width(bootstrap_mean(wins, seed))


@dataclass(frozen=True, slots=True)
class JudgeQuality:
    """The quality of a judge on labeled pairs.

    Attributes:
        accuracy: the fraction of pairs in which the judge prefers the better response. An undecided
            pair counts as half a success.
        single_order: the accuracy of each order alone, averaged over the two orders.
        order_agreement: see `voting.order_agreement`.
        undecidable: the fraction of undecided pairs.
    """

    accuracy: Estimate
    single_order: float
    order_agreement: float
    undecidable: float


def judge_quality(verdicts: Sequence[Verdict]) -> JudgeQuality:
    """Computes a judge's quality from verdicts on pairs in which response `a` is better.

    Each pair is judged in both orders, so it does not matter which response is called `a`.

    Raises:
        ValueError: there are no verdicts.
    """
    correct = sum(
        1.0 if v.preferred == "a" else 0.5 if v.preferred is None else 0.0 for v in verdicts
    )
    margins = [m for v in verdicts if v.probabilities for m in v.order_margins()]
    alone = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    return JudgeQuality(
        accuracy=proportion(correct, len(verdicts)),
        single_order=statistics.fmean(alone) if alone else float("nan"),
        order_agreement=order_agreement(verdicts),
        undecidable=sum(v.preferred is None for v in verdicts) / len(verdicts),
    )


def labeled_comparisons(
    records: Iterable[PreferenceRecord],
) -> Iterator[tuple[Comparison, str | None]]:
    """Yields each pair with the better response as `a`, and the principle of its label."""
    for record in records:
        for pair in record.pairs:
            context = judge_context(record)
            yield Comparison(context, pair.chosen, pair.rejected), pair.principle


def evaluate_judge(
    judge: Judge, records: Sequence[PreferenceRecord], *, progress: bool = False
) -> JudgeQuality:
    """Computes a judge's agreement with the labels, which may apply to a single principle."""
    cases = list(labeled_comparisons(records))
    verdicts = judge.compare([comparison for comparison, _ in cases], progress=progress)
    principles = judge.principles
    return judge_quality(
        [
            verdict if principle is None else under_principle(verdict, principles.index(principle))
            for verdict, (_, principle) in zip(verdicts, cases, strict=True)
        ]
    )


# -- win rates at equal length, as in AlpacaEval 2 (arXiv 2404.04475) ------------------------------


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A win rate that is corrected for response length.

    Attributes:
        win_rate: σ(θ), the probability of a win against a response of equal length, with its
            interval.
        slope: γ, which is positive if longer responses tend to win.
        scale: the standard deviation of the length differences, in the unit of the lengths.
    """

    win_rate: Estimate
    slope: float
    scale: float


def length_controlled_win_rate(
    wins: Sequence[float], differences: Sequence[float], seed: int = 0, resamples: int = 999
) -> LengthControlled:
    """Fits P(win) = σ(θ + γ · tanh(Δ / sd(Δ))) and evaluates it at Δ = 0.

    AlpacaEval's model has an additional term for the difficulty of each instruction, which is
    estimated from many models. Two policies are not enough to estimate this term.

    Args:
        wins: one value per prompt: 1 for a win, 0 for a loss, or ½ for a tie.
        differences: the length of our response minus the length of theirs, for each prompt.
        seed: the seed for the bootstrap over prompts.
        resamples: the number of bootstrap samples. θ and γ are refitted to each sample.

    Raises:
        ValueError: there are no prompts.
    """
    if not len(wins):
        raise ValueError("a win rate needs at least one prompt")
    won, difference = np.asarray(wins, dtype=float), np.asarray(differences, dtype=float)
    scale = float(difference.std())
    length = np.tanh(difference / scale) if scale else np.zeros_like(difference)
    theta, slope = fit(won, length)
    value = float(expit(theta))
    if len(set(wins)) == 1:
        point = Estimate(value, value, value, len(won))
        return LengthControlled(with_width(point), slope, scale)
    interval = bootstrap(
        (won, length),
        lambda w, x: expit(fit(w, x)[0]),
        paired=True,
        vectorized=False,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    estimate = Estimate(value, float(interval.low), float(interval.high), len(won))
    return LengthControlled(estimate, slope, scale)


def fit(wins: Array, lengths: Array, prior_sd: float = PRIOR_SD) -> tuple[float, float]:
    """Fits θ and γ in a logistic regression of `wins`, which may be fractions, on `lengths`."""

    def loss(parameters: Array) -> tuple[float, Array]:
        theta, slope = parameters
        logits = theta + slope * lengths
        # -log σ(z) for a win, -log σ(-z) for a loss
        value = np.logaddexp(0, logits).sum() - (wins * logits).sum() + slope**2 / prior_sd**2 / 2
        missed = expit(logits) - wins
        return value, np.array([missed.sum(), (missed * lengths).sum() + slope / prior_sd**2])

    start = np.zeros(2)
    bounds = [(-_BOUND, _BOUND), (None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return float(found.x[0]), float(found.x[1])

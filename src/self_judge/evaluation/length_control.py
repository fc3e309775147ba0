"""Win rates at equal length, as AlpacaEval 2 controls for length (arXiv 2404.04475).

Pure statistics over outcomes and length differences. It knows neither responses nor judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import bootstrap

from self_judge.evaluation.statistics import Estimate

Array = NDArray[np.float64]

# Of the normal prior on γ: keeps it finite where length alone separates wins from losses.
PRIOR_SD = 2.5
_BOUND = 10.0  # of θ, when everything is won or lost


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A win rate with the effect of length taken out.

    Attributes:
        win_rate: σ(θ), the chance to win against a response as long as our own, with its interval.
        slope: γ, positive where longer responses win.
        scale: standard deviation of the length differences, in their unit.
    """

    win_rate: Estimate
    slope: float
    scale: float


def length_controlled_win_rate(
    wins: Sequence[float], differences: Sequence[float], seed: int = 0, resamples: int = 999
) -> LengthControlled:
    """Fits P(win) = σ(θ + γ · tanh(Δ / sd(Δ))) and reads it at Δ = 0.

    AlpacaEval's model has a further term for the difficulty of each instruction, which is estimated
    from many models; with two policies there is nothing to estimate it from.

    Args:
        wins: 1, 0, or ½ for a tie; one per prompt.
        differences: our length minus theirs, one per prompt.
        seed: of the bootstrap over prompts.
        resamples: of the bootstrap; the model is fitted anew to each.

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
    if len(won) == 1:
        return LengthControlled(Estimate(value, 0.0, 1.0, 1), slope, scale)
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
    """(θ, γ) of the logistic regression of wins (shares allowed) on one variable."""

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

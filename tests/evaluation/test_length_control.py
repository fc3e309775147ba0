"""Win rates at equal length: on made-up contests whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from self_judge.evaluation.statistics import fit, length_controlled_win_rate


def contest(n: int, theta: float, slope: float, lead: float, seed: int = 0):  # type: ignore[no-untyped-def]
    """Outcomes of n prompts where a's responses are `lead` characters longer on average."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(lead, 200, n)
    chance = expit(theta + slope * np.tanh(differences / differences.std()))
    return (generator.random(n) < chance).astype(float), differences


def test_a_policy_that_wins_by_length_alone_is_even_at_equal_length() -> None:
    wins, differences = contest(4000, 0.0, 2.0, lead=150)
    controlled = length_controlled_win_rate(wins, differences, resamples=99)
    assert wins.mean() > 0.6
    assert controlled.win_rate.low < 0.5 < controlled.win_rate.high
    assert controlled.slope == pytest.approx(2.0, abs=0.25)


def test_a_better_policy_with_shorter_responses_gains() -> None:
    wins, differences = contest(4000, 0.8, 1.5, lead=-150)
    controlled = length_controlled_win_rate(wins, differences, resamples=99)
    assert controlled.win_rate.value == pytest.approx(expit(0.8), abs=0.03)
    assert wins.mean() < controlled.win_rate.low


def test_without_differences_it_is_the_plain_win_rate() -> None:
    wins = [1, 1, 1, 0, 0.5]
    controlled = length_controlled_win_rate(wins, [0] * 5, resamples=99)
    assert controlled.win_rate.value == pytest.approx(0.7, abs=1e-3)
    assert (controlled.slope, controlled.scale) == (0, 0)


def test_everything_won_stays_finite() -> None:
    controlled = length_controlled_win_rate([1.0] * 20, list(range(20)), resamples=99)
    assert 0.9 < controlled.win_rate.value <= 1
    assert np.isfinite(controlled.slope)
    assert length_controlled_win_rate([1.0] * 2, [3, 4]).win_rate.low < 0.5


def test_the_fit_is_that_of_statsmodels() -> None:
    models = pytest.importorskip("statsmodels.api")
    wins, differences = contest(500, 0.4, 1.0, lead=50, seed=2)
    wins[:40] = 0.5  # ties
    length = np.tanh(differences / differences.std())
    theirs = models.GLM(wins, models.add_constant(length), family=models.families.Binomial()).fit()
    assert fit(wins, length, prior_sd=1e6) == pytest.approx(tuple(theirs.params), abs=1e-4)
    assert fit(wins, length) == pytest.approx(tuple(theirs.params), abs=0.02)


def test_no_prompts_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        length_controlled_win_rate([], [])

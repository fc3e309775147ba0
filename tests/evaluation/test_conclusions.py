"""What results mean: judges, comparisons and runs get red, amber or green conclusions."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from self_judge.datatypes import Verdict
from self_judge.evaluation.conclusions import (
    as_json,
    comparison_conclusions,
    judge_conclusions,
    judge_gain,
    training_conclusions,
)
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.evaluation.statistics import proportion
from self_judge.judging.voting import aggregate


def verdict(first: float, second: float, mass: float = 1.0) -> Verdict:
    """The verdict of a judge that gives the letter A these shares of the mass, in both orders."""
    orders = ((mass * first, mass * (1 - first)), (mass * second, mass * (1 - second)))
    return aggregate([orders])


def levels(
    right: float, *, pairs: int = 400, by_position: float = 0.0, mass: float = 1.0,
    lengths: Sequence[tuple[int, int]] = ((10, 20), (20, 10)),
) -> dict[str, str]:  # fmt: skip
    """The levels by rule for a judge that is right, or decides by position, this often."""
    tally, draws = JudgeTally(("helpfulness",)), random.Random(0)
    for i in range(pairs):
        if draws.random() < by_position:
            given = verdict(0.8, 0.79, mass)
        else:
            given = verdict(0.9, 0.1, mass) if draws.random() < right else verdict(0.1, 0.9, mass)
        tally.add(JudgedPair("a", given, None, lengths[i % len(lengths)]))
    return {c.rule: c.level for c in judge_conclusions(tally.report())}


def test_a_judge_above_chance_and_above_the_longer_response_is_green() -> None:
    assert levels(0.8) == {"accuracy": "green"}


@pytest.mark.parametrize(
    ("right", "pairs", "expected"),
    [
        (0.5, 400, {"chance": "red"}),
        (0.2, 400, {"chance": "red"}),
        (0.62, 40, {"chance": "amber", "few pairs": "amber"}),
    ],
)
def test_chance_is_red_and_too_few_pairs_are_amber(
    right: float, pairs: int, expected: dict[str, str]
) -> None:
    assert levels(right, pairs=pairs) == expected


@pytest.mark.parametrize(("right", "needed"), [(1.0, 10), (0.0, 10), (0.6, 100), (0.5, 9610)])
def test_the_number_of_pairs_to_evaluate_is_one_at_which_this_accuracy_excludes_chance(
    right: float, needed: int
) -> None:
    tally = JudgeTally(("x",))
    for i in range(1 if right in (0, 1) else 10):
        ours = i < 10 * right
        given = verdict(0.9, 0.1) if ours else verdict(0.1, 0.9)
        tally.add(JudgedPair("a", given, None, (1, 1)))
    (said,) = [c.text for c in judge_conclusions(tally.report()) if c.rule == "chance"]
    assert said.endswith(f"evaluate at least {needed:,} pairs")
    if right != 0.5:
        estimate = proportion(right * needed, needed)
        assert not estimate.low <= 0.5 <= estimate.high


def test_a_judge_that_does_not_answer_with_letters_is_named() -> None:
    assert levels(0.8, mass=0.01)["letter mass"] == "red"
    assert levels(0.8, mass=0.3)["letter mass"] == "amber"
    assert "letter mass" not in levels(0.8, mass=0.9)


def test_a_judge_that_decides_by_position_is_named() -> None:
    assert levels(0.9, by_position=0.8)["position"] == "red"
    assert levels(0.9, by_position=0.45)["position"] == "amber"
    assert "position" not in levels(0.9, by_position=0.2)


def test_a_judge_below_the_length_heuristic_is_named() -> None:
    longer = [(20, 10)] * 9 + [(10, 20)]
    assert levels(0.7, lengths=longer)["length"] == "red"
    assert levels(0.9, lengths=longer)["length"] == "amber"


def test_labels_without_a_better_response_are_red() -> None:
    tally = JudgeTally(("x",))
    tally.add(JudgedPair("tie", verdict(0.9, 0.1), None, (1, 1)))
    assert [(c.level, c.rule) for c in judge_conclusions(tally.report())] == [("red", "labels")]


def test_metrics_that_are_not_finite_do_not_end_a_run() -> None:
    nothing = [float("nan")] * 8
    assert training_conclusions({"judge/margin": nothing, "rewards/accuracies": nothing}) == []


def test_no_judged_pair_is_red() -> None:
    assert [c.level for c in judge_conclusions(JudgeTally(("x",)).report())] == ["red"]


def report(right: int, pairs: int = 200) -> dict[str, object]:
    tally = JudgeTally(("helpfulness",))
    for i in range(pairs):
        given = verdict(0.9, 0.1) if i < right else verdict(0.1, 0.9)
        tally.add(JudgedPair("a", given, None, ((10, 20), (20, 10))[i % 2]))
    return tally.report()


@pytest.mark.parametrize(
    ("before", "after", "level"), [(100, 160, "green"), (150, 155, "amber"), (180, 120, "red")]
)
def test_training_that_helps_the_judge_is_green(before: int, after: int, level: str) -> None:
    gain = judge_gain(report(before), report(after))[0]
    assert (gain.rule, gain.level) == ("gain", level)


def estimate(value: float, half: float = 0.05) -> dict[str, object]:
    return {"value": value, "ci95": [value - half, value + half], "n": 400}


def compared(rate: float, controlled: float, **more: object) -> dict[str, str]:
    results = {
        "prompts": 400,
        "win_rate": estimate(rate),
        "length_controlled_win_rate": estimate(controlled),
        "order_agreement": estimate(0.9),
        "undecidable": 0.0,
        "undecidable_because": {},
        "longer_wins_all": estimate(0.6),
        **more,
    }
    return {c.rule: c.level for c in comparison_conclusions(results)}


def test_a_comparison_says_which_policy_won_and_why_to_doubt_it() -> None:
    assert compared(0.7, 0.68) == {"win rate": "green"}
    assert compared(0.3, 0.32) == {"win rate": "red"}
    assert compared(0.52, 0.5) == {"win rate": "amber"}
    assert compared(0.7, 0.5) == {"length": "amber"}
    assert compared(0.7, 0.7, order_agreement=estimate(0.55))["position"] == "amber"
    assert compared(0.7, 0.7, undecidable=0.3)["undecidable"] == "red"
    cut = {"a": estimate(0.4), "b": estimate(1.0)}
    assert compared(0.7, 0.7, finished=cut)["cut responses"] == "amber"
    assert compared(0.7, 0.7, prompts=30)["few prompts"] == "amber"
    assert compared(0.7, 0.7, longer_wins_all=estimate(0.02)) == {
        "win rate": "green",
        "longer": "amber",
    }


STEADY = {
    "judge/margin": [0.4] * 8,
    "judge/order_agreement": [0.9] * 8,
    "judge/undecidable": [0.0] * 8,
    "completions/mean_length": [100.0] * 8,
    "rewards/accuracies": [0.5, 0.6, 0.7, 0.7, 0.7, 0.72, 0.74, 0.7],
    "objective/kl": [0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0],
}


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("judge/order_agreement", [0.9] * 4 + [0.7] * 4, ("order agreement", "amber")),
        ("judge/order_agreement", [0.6] * 4 + [0.4] * 4, ("order agreement", "red")),
        ("judge/undecidable", [0.0] * 4 + [0.2] * 4, ("undecidable", "amber")),
        ("judge/undecidable", [0.0] * 4 + [0.5] * 4, ("undecidable", "red")),
        ("completions/mean_length", [100.0] * 4 + [150.0] * 4, ("length", "amber")),
        ("completions/mean_length", [100.0] * 4 + [40.0] * 4, ("length", "red")),
        ("objective/kl", [0.0] * 4 + [50.0] * 4, ("KL", "amber")),
        ("objective/kl", [0.0] * 4 + [500.0] * 4, ("KL", "red")),
        ("rewards/accuracies", [0.5, 0.4, 0.6, 0.5] * 2, ("reward accuracy", "amber")),
        ("rewards/accuracies", [None] * 8, None),  # not logged as numbers
    ],
)
def test_a_run_that_drifts_is_named(
    metric: str, values: list[float], expected: tuple[str, str] | None
) -> None:
    found = {(c.rule, c.level) for c in training_conclusions({**STEADY, metric: values}, 1000)}
    bad = {(rule, level) for rule, level in found if level != "green"}
    assert bad == ({expected} if expected else set())


def test_a_steady_run_is_green_and_few_prompts_are_amber() -> None:
    assert {c.level for c in training_conclusions(STEADY, 1000)} == {"green"}
    assert "few prompts" in {c.rule for c in training_conclusions(STEADY, 20)}


def test_a_held_out_loss_that_rises_is_named() -> None:
    (found,) = training_conclusions({"loss": [2.0, 1.0], "eval_loss": [1.2, 1.0, 1.1]})
    assert (found.rule, found.level) == ("overfitting", "amber")
    assert not training_conclusions({"loss": [2.0, 1.0], "eval_loss": [1.2, 1.0, 1.0]})


def test_the_worst_conclusion_comes_first() -> None:
    drifting = {**STEADY, "objective/kl": [0.0] * 4 + [500.0] * 4}
    assert [line["level"] for line in as_json(training_conclusions(drifting, 20))] == [
        "red", "amber", "green",
    ]  # fmt: skip

"""Rewards from pairwise judgments: what each scheme gives, to whom, and in which form."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from self_judge import Judge, PairwiseReward
from self_judge.data import synthetic
from self_judge.judging.panel import Panel
from self_judge.judging.reward import Scheme
from value_judges import ValueScorer, value_judge

SCHEMES = get_args(Scheme)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def rewards(scheme: Any, *groups: list[str], knows: bool = True, **named: Any) -> list[list[float]]:
    """The rewards of each group; every group has a prompt of its own."""
    judge = value_judge(knows=knows)
    prompts = [f"prompt {i}" for i, own in enumerate(groups) for _ in own]
    flat = PairwiseReward(judge, scheme, **named)(prompts, [text for own in groups for text in own])
    found, start = [], 0
    for own in groups:
        found.append(flat[start : start + len(own)])
        start += len(own)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 20).map(str), min_size=2, max_size=9), st.integers(0, 99))
def test_rewards_are_shares_of_a_constant_and_equal_responses_get_equal_ones(
    scheme: Any, group: list[str], seed: int
) -> None:
    own = rewards(scheme, group, seed=seed)[0]
    n = len(group)
    different = rewards(scheme, [str(i) for i in range(n)])[0]
    assert math.isclose(sum(own), sum(different), abs_tol=1e-9)
    if scheme != "knockout":
        assert math.isclose(sum(own), n / 2, abs_tol=1e-9)
    assert all(0 <= reward <= 1 for reward in own)
    by_text: dict[str, set[float]] = {}
    for text, reward in zip(group, own, strict=True):
        by_text.setdefault(text, set()).add(round(reward, 9))
    assert all(len(given) == 1 for given in by_text.values())


def test_a_panel_rewards_as_its_majority_judges() -> None:
    knowing = {name: value_judge() for name in ("one", "two")}
    panel = Panel({**knowing, "three": value_judge(knows=False)})
    low, high, middle = PairwiseReward(panel)(["p"] * 3, ["1", "9", "5"])
    assert low < middle < high


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_the_best_of_a_group_gets_the_highest_reward(scheme: Any, n: int) -> None:
    for seed in range(5):
        own = rewards(scheme, [str(i * 3) for i in range(n)], seed=seed)[0]
        assert own.index(max(own)) == n - 1
        assert own.count(max(own)) == 1
        if scheme == "knockout":
            assert own[-1] == 1.0


def test_all_pairs_rewards_the_mean_share_of_the_scores() -> None:
    numbers = [1.0, 4.0, 11.0]
    share = 1 / (1 + np.exp((np.subtract.outer(numbers, numbers)) / -10))
    expected = [(row.sum() - 0.5) / 2 for row in share]
    assert rewards("all_pairs", ["1", "4", "11"])[0] == pytest.approx(expected, abs=1e-6)


def test_bradley_terry_fits_the_shares_of_a_judge_that_follows_it() -> None:
    own = rewards("bradley_terry", ["0", "4", "8", "30"])[0]
    assert own == sorted(own)
    assert own[3] - own[2] > own[2] - own[1] > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n", [2, 3, 5, 6, 8])
def test_a_group_in_which_nothing_is_decided_has_no_advantage(scheme: Any, n: int) -> None:
    own = rewards(scheme, [str(i) for i in range(n)], knows=False)[0]
    decided = rewards(scheme, [str(i) for i in range(n)])[0]
    assert own == pytest.approx([sum(decided) / n] * n)


@pytest.mark.parametrize(
    ("scheme", "matches"),
    [("all_pairs", 28), ("knockout", 7), ("swiss", 12), ("bradley_terry", 12)],
)
def test_a_scheme_costs_the_matches_that_it_promises(scheme: Any, matches: int) -> None:
    judge = value_judge()
    PairwiseReward(judge, scheme)(["x"] * 8, [str(i) for i in range(8)])
    assert judge.scorer.prompts == 2 * matches  # both orders


@pytest.mark.parametrize("scheme", ["swiss", "bradley_terry"])
def test_nobody_meets_twice_in_a_swiss_tournament_of_eight(scheme: Any) -> None:
    for seed in range(20):
        judge = value_judge()
        PairwiseReward(judge, scheme, seed=seed)(["x"] * 8, [str(i) for i in range(8)])
        assert judge.scorer.prompts == 24  # a repeated match would not be judged again


def test_equal_prompts_that_stand_together_are_a_group() -> None:
    judge = value_judge()
    own = PairwiseReward(judge)(["x", "x", "y", "y", "y", "x", "x"], list("1234567"))
    assert own[0] < own[1]
    assert own[2] < own[3] < own[4]
    assert own[5] < own[6]
    assert own[1] == pytest.approx(own[6])
    assert judge.scorer.prompts == 2 * (1 + 3 + 1)


def test_rewards_do_not_depend_on_the_other_groups_of_a_batch() -> None:
    first, second = ["3", "1", "2", "9"], ["5", "7", "6"]
    for scheme in SCHEMES:
        both = rewards(scheme, first, second)
        judge = value_judge()
        alone = PairwiseReward(judge, scheme)(["prompt 1"] * 3, second)
        assert both[1] == pytest.approx(alone)


def test_messages_and_texts_give_the_same_rewards_and_the_judge_sees_all_turns() -> None:
    seen: list[str] = []

    class Watching(ValueScorer):
        def letter_probabilities(self, prompts: Any, letter_ids: Any, done: Any) -> torch.Tensor:
            seen.extend(self.encoder.tokenizer.decode(ids) for ids in prompts)
            return super().letter_probabilities(prompts, letter_ids, done)

    judge = value_judge()
    judge.scorer = Watching(judge.encoder)
    reward = PairwiseReward(judge)
    text = reward(["Q?"] * 2, ["1", "8"])
    message = [{"role": "user", "content": "Q?"}]
    answers = [[{"role": "assistant", "content": n}] for n in "18"]
    assert reward([message] * 2, answers) == text
    turns = [
        *message,
        {"role": "assistant", "content": "So?"},
        {"role": "user", "content": "More."},
    ]
    assert reward([turns] * 2, answers) == text
    assert "Human: Q?\n\nAssistant: So?\n\nHuman: More.\n1 (A)\n8 (B)" in seen[-2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_thought_is_not_judged_and_one_without_an_answer_loses(scheme: Any) -> None:
    own = rewards(scheme, ["<think>9 (A)</think>\n\n3", "7", "<think>\nStill thinking", "5"])[0]
    assert own[2] == min(own)
    if scheme != "swiss":  # in two rounds, shares depend on whom a response meets
        assert own[1] == max(own)
    if scheme == "all_pairs":
        assert own[2] == 0
        plain = rewards(scheme, ["3", "7", "5"])[0]
        assert own[0] < own[3] < own[1]
        assert plain[0] < plain[2] < plain[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_answers_get_equal_rewards_whatever_their_thoughts(scheme: Any) -> None:
    thoughts = ["", "<think>Hm.</think>", "<think>Ah.</think>\n\n", "Oh.\n</think>\n\n"]
    for seed in range(5):
        own = rewards(scheme, [*(f"{thought}5" for thought in thoughts), "7", "1"], seed=seed)[0]
        assert len(set(own[:4])) == 1
        assert own[5] < own[0] < own[4]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_responses_without_an_answer_are_equal_and_are_not_judged(scheme: Any) -> None:
    judge = value_judge()
    never = ["<think>One", "<think>Two</think>", "[THINK]"]
    message = {"role": "assistant", "content": "", "reasoning_content": "Four"}  # as TRL parses it
    own = PairwiseReward(judge, scheme)(["x"] * 5, [*never, [message], "3"])
    assert len(set(own[:4])) == 1
    assert own[4] > own[0]
    assert PairwiseReward(judge, scheme)(["x"] * 3, never) == pytest.approx(
        [sum(rewards(scheme, ["1", "2", "3"])[0]) / 3] * 3
    )
    assert judge.scorer.prompts == 0


def test_metrics_and_foreign_columns_are_those_of_trl() -> None:
    logged: dict[str, float] = {}
    own = PairwiseReward(value_judge())(
        prompts=["x", "x"], completions=["1", "2"], completion_ids=[[1], [2]],
        log_metric=logged.__setitem__, log_extra=None, trainer_state=None, solution=["a", "b"],
    )  # fmt: skip
    assert len(own) == 2
    assert logged == {"judge/undecidable": 0, "judge/order_agreement": 1}
    assert PairwiseReward(value_judge(), "swiss").__name__ == "self_judge/swiss"


@pytest.mark.parametrize(
    ("prompts", "completions", "error", "message"),
    [
        (["x"], ["1", "2"], ValueError, "1 prompts, but 2 completions"),
        (
            ["x", "y"],
            ["1", "2"],
            ValueError,
            r"no prompt has two completions in a row \(prompt 0: 'x",
        ),
        (["x", 5], ["1", "2"], TypeError, "prompt 1 must be a text or a list of messages, got 5"),
        (["x", "x"], ["1", None], TypeError, "completion 1 must be a text or a list of messages"),
        (
            ["x", []],
            ["1", "2"],
            TypeError,
            r"prompt 1 must be a text or a list of messages, got \[\]",
        ),
        (["x", [{"role": "user"}]], ["1", "2"], TypeError, "prompt 1 must be a text"),
        (["x", [{"role": None, "content": "x"}]], ["1", "2"], TypeError, "prompt 1 must be a text"),
        (["x"] * 2, ["1", [{"role": 3, "content": "2"}]], TypeError, "completion 1 must be a text"),
        (
            ["x", "x"],
            ["1", [{"role": "assistant", "content": "2"}, {"role": "tool", "content": "3"}]],
            ValueError,
            "completion 1 has turns assistant, tool",
        ),
        (
            ["x", "x"],
            ["1", [{"role": "assistant", "content": "2", "tool_calls": [CALL]}]],
            ValueError,
            "completion 1 has a message with tool_calls: only text can be judged",
        ),
        (
            ["x", [{"role": "assistant", "content": None, "tool_calls": [CALL]}]],
            ["1", "2"],
            ValueError,
            "prompt 1 has a message with tool_calls: only text can be judged",
        ),
        (
            ["x", "x"],
            ["1", [{"role": "assistant", "content": [{"type": "image"}]}]],
            ValueError,
            "completion 1 has a message with content of type 'image'",
        ),
        (
            ["x", [{"role": "user", "content": None}]],
            ["1", "2"],
            ValueError,
            "prompt 1 has a message with content of type NoneType",
        ),
    ],
)
def test_a_wrong_entry_is_named_by_its_place(
    prompts: Any, completions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PairwiseReward(value_judge())(prompts, completions)


def test_an_unknown_scheme_and_a_model_in_place_of_a_judge_are_refused() -> None:
    with pytest.raises(ValueError, match="scheme must be one of all_pairs, knockout, swiss"):
        PairwiseReward(value_judge(), "elo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="judge must be a Judge, a Panel or a model folder"):
        PairwiseReward(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_nothing_to_reward_gives_nothing() -> None:
    assert PairwiseReward(value_judge())([], []) == []


def test_a_policy_in_training_judges_as_the_initial_model() -> None:
    tokenizer = synthetic.tiny_tokenizer()
    base = synthetic.tiny_model(tokenizer, 0, hidden_size=32, layers=2, heads=2)
    templates = synthetic.judge_templates(principles=False, overall=True)
    texts = ["The cow eats grass.", "The cow eats meat.", "I think the cow eats grass. Thanks!"]
    prompts = ["What does the cow eat? End with Thanks."] * 3
    before = PairwiseReward(Judge(base, tokenizer, templates))(prompts, texts)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    policy = get_peft_model(base, config)
    judge = Judge(policy, tokenizer, templates)
    assert PairwiseReward(judge)(prompts, texts) == pytest.approx(before, abs=1e-6)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)  # a frozen adapter belongs to the judge
    assert PairwiseReward(judge)(prompts, texts) != pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_a_surrogate_in_a_prompt_is_a_character_like_others(scheme: Any) -> None:
    reward = PairwiseReward(value_judge(), scheme)
    assert sum(reward(["p\ud800"] * 3, ["1", "2", "3"])) == pytest.approx(1.5)

"""Panels: several judges vote as principles do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from judge_pairs import ASKED, PAIRS
from self_judge import ChatEncoder, Comparison, Judge, aggregate
from self_judge.judging.panel import InitialModel, Panel

ONE = {"helpful": ASKED["helpful"]}


class Fixed:
    """A scorer that gives every prompt the same two probabilities."""

    max_length = None

    def __init__(self, a: float, b: float) -> None:
        self.letters = (a, b)

    def letter_probabilities(self, prompts: Any, letter_ids: Any, done: Any) -> torch.Tensor:
        return torch.tensor([self.letters] * len(prompts))


class Longer:
    """A scorer that prefers the longer response, by a margin of its own."""

    max_length = None

    def __init__(self, encoder: Any, margin: float) -> None:
        self.encoder, self.margin = encoder, margin

    def letter_probabilities(self, prompts: Any, letter_ids: Any, done: Any) -> torch.Tensor:
        rows = []
        for text in map(self.encoder.tokenizer.decode, prompts):
            a, b = (text.split(f"\n\n{letter}: ")[1].split("\n\n")[0] for letter in "AB")
            ahead = self.margin * (1 if len(a) > len(b) else -1)
            rows.append((0.5 + ahead, 0.5 - ahead))
        return torch.tensor(rows)


def judge(scorer: Any, tokenizer: Any, templates: Any = ONE) -> Judge:
    return Judge(scorer, tokenizer, templates)


def test_the_majority_of_members_decides_and_not_the_strongest(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    weak = [judge(Longer(encoder, 0.01), tokenizer) for _ in range(2)]
    strong = judge(Longer(encoder, -0.4), tokenizer)
    panel = Panel({"one": weak[0], "two": weak[1], "strong": strong})
    verdict = panel.compare([Comparison("?", "a long answer", "short")])[0]
    assert verdict.preferred == "a"
    assert verdict.margin < 0  # the mean is on the other side
    assert verdict.win_rate == pytest.approx(2 / 3)


def test_a_panel_votes_as_one_judge_with_its_members_principles(model: Any, tokenizer: Any) -> None:
    each = {p: judge(model, tokenizer, {p: ASKED[p]}) for p in ASKED}
    panel, whole = Panel(each), judge(model, tokenizer, ASKED)
    assert panel.principles == whole.principles
    for ours, theirs in zip(panel.compare(PAIRS), whole.compare(PAIRS), strict=True):
        assert ours == aggregate(ours.probabilities)
        assert torch.tensor(ours.probabilities).allclose(torch.tensor(theirs.probabilities))
        assert ours.preferred == theirs.preferred


def test_a_pair_that_one_member_cannot_judge_is_undecidable_with_its_reason(
    model: Any, tokenizer: Any
) -> None:
    short = Judge(model, tokenizer, ONE, max_length=120)
    panel = Panel({"short": short, "any": judge(model, tokenizer)})
    long = Comparison("?", "many words " * 90, "few")
    assert [v.undecidable_because for v in panel.compare([PAIRS[0], long])][1] == (
        "the pair does not fit into max_length"
    )
    broken = Panel({"nan": judge(Fixed(float("nan"), 0.1), tokenizer), "any": short})
    assert broken.compare(PAIRS[:1])[0].undecidable_because == "a score is not finite"


def test_what_is_no_panel_is_refused_in_one_line(model: Any, tokenizer: Any) -> None:
    one, two = judge(model, tokenizer), judge(model, tokenizer, ASKED)
    with pytest.raises(ValueError, match="at least two judges, got 1"):
        Panel({"one": one})
    with pytest.raises(ValueError, match=r"same number of principles.*one has 1, two has 2"):
        Panel({"one": one, "two": two})
    with pytest.raises(TypeError, match="member 'model' of a panel must be a Judge"):
        Panel({"model": model, "one": one})
    with pytest.raises(ValueError, match="only self-training has an initial model"):
        Panel({"one": one, "initial": InitialModel()}).compare(PAIRS)

"""Rollouts: which two responses are learned from, the batch they become, and what is logged."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from self_judge import Comparison, Verdict
from self_judge.datatypes import Response
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally
from self_judge.evaluation.statistics import judge_quality
from self_judge.judging.voting import aggregate, undecidable
from self_judge.training.self_training.rollout_log import (
    rollout_metrics,
    rollout_totals,
    show_pairs,
    write_rollouts,
)
from self_judge.training.self_training.rollouts import (
    Rollout,
    judged_rollouts,
    preference_batch,
    select_pairs,
)
from value_judges import ByValue, Undecided


def responses(*values: Any) -> list[Response]:
    return [Response((int(v), 4), str(v), True) for v in values]


def select(judge: Any, *own: list[Response], seed: int = 0, **arguments: Any) -> Any:
    contexts = [f"context {i}" for i in range(len(own))]
    return select_pairs(judge, contexts, own, [seed + i for i in range(len(own))], **arguments)


# -- which pair ------------------------------------------------------------------------------------


def test_two_responses_are_judged_once_all_prompts_together() -> None:
    judge = ByValue()
    pairs = select(judge, responses(3, 8), responses(9, 1), responses(5, 6))
    assert [(better, worse) for better, worse, _ in pairs] == [(1, 0), (0, 1), (1, 0)]
    assert all(verdict.preferred == "a" for _, _, verdict in pairs)
    assert [len(call) for call in judge.calls if call] == [3]


@given(
    st.lists(st.permutations(range(16)).map(lambda p: p[: 2 + p[0]]), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_of_more_the_best_and_the_worst_are_found(values: list[list[int]], seed: int) -> None:
    judge = ByValue()
    pairs = select(judge, *(responses(*own) for own in values), seed=seed)
    for own, (better, worse, verdict) in zip(values, pairs, strict=True):
        assert (own[better], own[worse]) == (max(own), min(own))
        assert verdict.preferred == "a"
        assert verdict.margin == pytest.approx((max(own) - min(own)) / 1000)
    asked = [(c.context, frozenset((c.response_a, c.response_b))) for c in judge.asked]
    assert len(asked) == len(set(asked)), "no pair is judged twice, either way round"


@pytest.mark.parametrize(("k", "most"), [(2, 1), (3, 3), (4, 5), (8, 11), (16, 23)])
def test_the_mirror_shares_the_first_round(k: int, most: int) -> None:
    # K − 1 matches for the best, ⌈K/2⌉ − 1 more for the worst, and one between the two.
    judge = ByValue()
    select(judge, responses(*range(k)))
    assert len(judge.asked) <= most


@pytest.mark.parametrize("k", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("judge", [ByValue(), Undecided()], ids=["decided", "undecided"])
@pytest.mark.parametrize("selection", ["best_worst", "best_random"])
def test_the_two_are_never_one_and_the_same(judge: Any, k: int, selection: str) -> None:
    for seed in range(60):
        ((better, worse, _),) = select(judge, responses(*range(k)), seed=seed, selection=selection)
        assert better != worse


class Circular(ByValue):
    """Rock, paper, scissors: every value loses to the next, the last to the first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def verdict(self, c: Comparison) -> Verdict:
        ahead = (int(c.response_a) - int(c.response_b)) % self.size
        return super().verdict(
            Comparison("", "1", "0") if 0 < ahead <= self.size // 2 else Comparison("", "0", "1")
        )


@pytest.mark.parametrize("k", [3, 5, 7])
def test_a_pair_on_which_the_judge_contradicts_itself_is_undecided(k: int) -> None:
    undecided = 0
    for seed in range(60):
        own = responses(*range(k))
        (rollout,) = judged_rollouts(Circular(k), [0], [[1]], ["c"], [own], [seed])
        direct = Circular(k).verdict(Comparison("c", rollout.chosen.text, rollout.rejected.text))
        assert rollout.chosen != rollout.rejected
        assert rollout.verdict is not None
        assert rollout.verdict.preferred == direct.preferred
        assert rollout.decided == (direct.preferred == "a")
        undecided += not rollout.decided
    assert undecided


def test_a_random_other_is_drawn_from_all_others_by_the_seed() -> None:
    own = responses(9, 1, 2, 3)
    drawn = [select(ByValue(), own, seed=s, selection="best_random")[0] for s in range(60)]
    assert {better for better, _, _ in drawn} == {0}
    assert {worse for _, worse, _ in drawn} == {1, 2, 3}
    assert drawn == [select(ByValue(), own, seed=s, selection="best_random")[0] for s in range(60)]


def test_two_equal_texts_have_no_verdict_and_are_undecided() -> None:
    judge = ByValue()
    same = [Response((5, 4), "7", True), Response((6,), "7", False)]
    (rollout,) = judged_rollouts(judge, [3], [[1, 2]], ["c"], [same], [0])
    assert judge.asked == []
    assert (rollout.verdict, rollout.decided) == (None, False)
    assert {rollout.chosen, rollout.rejected} == set(same)


def test_an_undecidable_pair_is_kept_and_not_decided() -> None:
    (rollout,) = judged_rollouts(Undecided(), [3], [[1, 2]], ["c"], [responses(1, 2)], [0])
    assert not rollout.decided
    assert rollout.verdict is not None
    assert rollout.verdict.preferred is None


def test_a_single_response_makes_no_pair() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 has 1 responses, .* at least 2"):
        select(ByValue(), responses(1, 2), responses(3))


def test_a_rollout_keeps_what_was_sampled_and_judged() -> None:
    own = [responses(1, 5, 3), responses(8, 2)]
    rollouts = judged_rollouts(
        ByValue(), [7, 4], [[10, 11], [12]], ["first", "second"], own, [0, 0]
    )
    assert [(r.record, r.prompt_ids, r.context) for r in rollouts] == [
        (7, (10, 11), "first"),
        (4, (12,), "second"),
    ]
    assert [(r.chosen, r.rejected) for r in rollouts] == [(own[0][1], own[0][0]), tuple(own[1])]
    assert all(r.decided for r in rollouts)


# -- the batch -------------------------------------------------------------------------------------

PAD = 99


def test_a_batch_holds_exactly_the_sampled_ids_chosen_rows_first() -> None:
    batch = preference_batch(
        [([1, 2], [10, 11, 4], [20], True), ([3], [30, 4], [40, 41, 42, 43], True)], PAD
    )
    assert batch["input_ids"].tolist() == [
        [1, 2, 10, 11, 4],
        [3, 30, 4, PAD, PAD],
        [1, 2, 20, PAD, PAD],
        [3, 40, 41, 42, 43],
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    assert batch["completion_mask"].tolist() == [
        [0, 0, 1, 1, 1],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 1, 1, 1],
    ]
    assert all(t.dtype == torch.long for t in batch.values())


def test_an_undecided_pair_keeps_both_rows_with_an_empty_completion_mask() -> None:
    batch = preference_batch([([1], [5, 6], [7], False), ([1], [5], [6], True)], PAD)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 5, PAD], [1, 7, PAD], [1, 6, PAD]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 2, 2]
    assert batch["completion_mask"].sum(1).tolist() == [0, 1, 0, 1]


def test_a_token_that_looks_like_padding_is_still_trained_on() -> None:
    batch = preference_batch([([1], [PAD, PAD], [5], True)], PAD)
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_rows_are_cut_at_max_length_and_rounded_up_to_a_multiple() -> None:
    pair = ([1, 2, 3], [5, 6, 7, 8], [9], True)
    cut = preference_batch([pair], PAD, max_length=5)
    assert cut["input_ids"].tolist() == [[1, 2, 3, 5, 6], [1, 2, 3, 9, PAD]]
    assert cut["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    padded = preference_batch([pair], PAD, pad_to_multiple_of=8)
    assert all(t.shape == (2, 8) for t in padded.values())
    assert padded["attention_mask"].sum(1).tolist() == [7, 4]


# -- metrics ---------------------------------------------------------------------------------------


def verdict(first: Any, second: Any = ((0.5, 0.3), (0.3, 0.5))) -> Verdict:
    """By principle: `(p(A), p(B))` with the chosen response first, then second."""
    from self_judge.judging.voting import aggregate

    return aggregate([first, second])


def rollout(judged: Verdict | None, chosen: int, rejected: int, finished: bool = True) -> Rollout:
    decided = judged is not None and judged.preferred == "a"
    return Rollout(
        0,
        (1,),
        "c",
        Response(tuple(range(chosen)), "x", True),
        Response(tuple(range(rejected)), "y", finished),
        judged,
        decided,
    )


AGREE = verdict(((0.6, 0.2), (0.1, 0.3)))  # margins 0.3 and 0.2
SPLIT = verdict(((0.1, 0.3), (0.3, 0.1)), ((0.9, 0.1), (0.1, 0.9)))  # -0.2 and 0.8


def test_metrics_are_those_computed_by_hand() -> None:
    rollouts = [
        rollout(AGREE, 4, 6),
        rollout(SPLIT, 10, 2, finished=False),
        rollout(None, 1, 1),
        rollout(verdict(((math.nan, 0), (0, 0))), 3, 5),
    ]
    metrics = rollout_metrics(rollout_totals(rollouts, ["helpful", "honest"]))
    assert metrics == pytest.approx(
        {
            "judge/margin": (0.25 + 0.3) / 2,
            "judge/order_agreement": 1.0,
            "judge/order_agreement/helpful": 1.0,
            "judge/order_agreement/honest": 1.0,
            "judge/letter_mass": 0.7,
            "judge/undecidable": 0.5,
            "judge/broken": 0.25,
            "judge/win_rate/helpful": 0.5,
            "judge/win_rate/honest": 1.0,
            "completions/mean_length": (4 + 6 + 10 + 2 + 1 + 1 + 3 + 5) / 8,
            "completions/finished": 7 / 8,
            "completions/chosen_length": 18 / 4,
            "completions/rejected_length": 14 / 4,
        }
    )


def test_order_agreement_is_the_same_in_training_and_in_evaluation() -> None:
    """Exact ties have two orders; pairs without finite scores have none."""
    tie, broken = verdict(((0.4, 0.2), (0.4, 0.2))), verdict(((math.nan, 0), (0, 0)))
    unfit = undecidable((), "the pair does not fit into max_length")
    verdicts = [AGREE, AGREE, tie, broken, unfit]
    totals = rollout_totals([rollout(v, 1, 1) for v in verdicts], ["helpful"])
    tally = JudgeTally(["helpful"])
    for own in verdicts:
        tally.add(JudgedPair("a", own, None, (1, 1)))
    assert rollout_metrics(totals)["judge/order_agreement"] == pytest.approx(2 / 3)
    assert judge_quality(verdicts).order_agreement == pytest.approx(2 / 3)
    assert tally.report()["order_agreement"]["value"] == pytest.approx(2 / 3)


def test_a_principle_with_an_exact_tie_counts_half() -> None:
    tie = ((0.4, 0.2), (0.4, 0.2))
    totals = rollout_totals([rollout(verdict(tie), 1, 1)], ["tied", "other"])
    assert (totals["wins/tied"], totals["wins/other"]) == (0.5, 1.0)


def test_totals_of_processes_add_up_to_those_of_all() -> None:
    rollouts = [rollout(AGREE, 4, 6), rollout(SPLIT, 10, 2), rollout(None, 1, 1)]
    parts = [rollout_totals(r, ["p", "q"]) for r in (rollouts[:1], rollouts[1:])]
    summed = {key: sum(part[key] for part in parts) for key in parts[0]}
    assert summed == pytest.approx(rollout_totals(rollouts, ["p", "q"]))


def test_metrics_of_a_step_without_a_decided_pair_are_finite() -> None:
    metrics = rollout_metrics(rollout_totals([rollout(None, 2, 2)], ["p"]))
    assert metrics["judge/undecidable"] == 1.0
    assert metrics["judge/margin"] == metrics["judge/win_rate/p"] == 0.0


# -- the file --------------------------------------------------------------------------------------


def write(path: Path, rollouts: Any, step: int) -> None:
    write_rollouts(path, rollouts, step, ["helpful"], lambda ids: f"prompt of {len(ids)} ids")


def test_rollouts_are_written_one_json_line_each(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step-000007.jsonl"
    write(path, [rollout(AGREE, 2, 3, finished=False), rollout(None, 1, 1)], step=7)
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first["step"] == 7
    assert (first["chosen"], first["rejected"], first["decided"]) == ("x", "y", True)
    assert (first["chosen_tokens"], first["rejected_tokens"]) == (2, 3)
    assert first["principles"] == ["helpful"]
    assert first["prompt"] == "prompt of 1 ids"
    assert (first["chosen_finished"], first["rejected_finished"]) == (True, False)
    assert first["margin"] == pytest.approx(0.25)
    assert first["probabilities"][0] == [[0.6, 0.2], [0.1, 0.3]]
    assert first["undecidable_because"] is None
    assert second["decided"] is False
    assert second["margin"] is second["probabilities"] is None
    assert second["undecidable_because"] == "equal texts"
    assert [p.name for p in path.parent.iterdir()] == ["step-000007.jsonl"]


def strictly(line: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_broken_score_is_written_as_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    write(path, [rollout(verdict(((math.nan, 0.1), (math.inf, 0.2))), 1, 1)], step=1)
    written = strictly(path.read_text())
    assert written["probabilities"][0] == [[None, 0.1], [None, 0.2]]
    assert "not finite" in written["undecidable_because"]


def test_a_contradiction_says_so(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    write(path, [rollout(AGREE.swapped(), 1, 1)], step=1)
    assert "contradicts" in strictly(path.read_text())["undecidable_because"]


def test_any_text_can_be_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    hostile = 'line\nbreak\u2028 "quotes" \\ud800 日本 🙂 \ud800'
    given_ = Rollout(0, (1,), hostile, *responses(1, 2), None, False)
    write(path, [given_], step=1)
    with path.open(encoding="utf-8") as file:
        (line,) = file
    assert strictly(line)["context"] == hostile
    assert "日本" in line, "readable as it stands"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    write(path, [rollout(AGREE, 1, 1)], step=1)
    before = path.read_bytes()

    def interrupted() -> Any:
        yield rollout(AGREE, 2, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted(), step=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_sampled_pairs_reach_the_tracker_as_a_table(
    tracker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[dict[str, Any]] = []
    stand_in: Any = types.ModuleType(tracker)
    stand_in.Table = lambda dataframe: dataframe.to_dict("records")
    stand_in.log = logged.append
    monkeypatch.setitem(sys.modules, tracker, stand_in)
    verdict = aggregate([((0.6, 0.3), (0.3, 0.6))])
    answers = (Response((1,), "yes", True), Response((2,), "no", True))
    pairs = [
        Rollout(0, (1,), "why?", *answers, verdict, True),
        Rollout(0, (1,), "hub_token=abcdefghijklmnop", *answers, None, False),
    ]
    show_pairs(pairs, 7, [tracker])
    ((name, rows),) = logged[0].items()
    assert (name, len(logged), len(rows)) == ("pairs", 1, 2)
    assert rows[0] == {
        "step": 7, "context": "why?", "chosen": "yes", "rejected": "no", "margin": verdict.margin
    }  # fmt: skip
    assert rows[1]["context"] == "hub_token=***"
    assert "sampled pairs at step 7" in capsys.readouterr().out
    show_pairs(pairs, 8, ["tensorboard"])
    assert len(logged) == 1

"""Tournaments: who meets whom, who goes on, and what a caller can rely on."""

from __future__ import annotations

import copy
import itertools
import random
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TEMPLATES
from self_judge import Comparison, Judge, JudgeTemplates, Verdict, tournament_rejection_sampling
from self_judge.datatypes import stable_seed
from self_judge.judging.tournament import (
    Bracket,
    Match,
    judged_knockouts,
    knockout_steps,
    knockouts,
    pairings,
)
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import save_judge_settings
from value_judges import ByValue, Undecided


def play(judge: Any, *responses: list[str], seed: int = 0, **arguments: Any) -> list[Bracket]:
    contexts = [f"context {i}" for i in range(len(responses))]
    seeds = [stable_seed(seed, i) for i in range(len(responses))]
    return knockouts(judge, contexts, responses, seeds=seeds, **arguments)


def matches(bracket: Bracket) -> list[Match]:
    return [m for played in bracket.rounds for m in played]


# -- who meets whom --------------------------------------------------------------------------------


def test_neighbours_meet_and_the_last_of_an_odd_number_has_a_bye() -> None:
    assert pairings([4, 2, 7, 1]) == [(4, 2), (7, 1)]
    assert pairings([4, 2, 7]) == [(7, None), (4, 2)]
    assert pairings([4]) == [(4, None)]
    assert pairings([]) == []


@pytest.mark.parametrize("n", range(1, 18))
def test_n_responses_play_n_minus_one_matches_in_log_n_rounds(n: int) -> None:
    judge = ByValue()
    bracket = play(judge, [str(i) for i in range(n)])[0]
    assert len(judge.asked) == n - 1
    assert len(bracket.rounds) == (n - 1).bit_length()
    entered = sorted(k for m in (bracket.rounds or [()])[0] for k in (m.a, m.b) if k is not None)
    assert entered == (list(range(n)) if n > 1 else [])
    for played in bracket.rounds:
        byes = [m for m in played if m.b is None]
        assert len(byes) <= 1
        assert all(m.winner == m.a and m.verdict is None and not m.by_lot for m in byes)
    for before, after in zip(bracket.rounds, bracket.rounds[1:], strict=False):
        went_on = [m.winner for m in before]
        assert [(m.a, m.b) for m in after] == pairings(went_on)


@given(
    st.lists(st.permutations(range(12)).map(lambda p: p[: 1 + p[0]]), min_size=1, max_size=4),
    st.integers(0, 2**63),
)
def test_a_judge_with_an_order_of_its_own_finds_the_best_and_the_worst(
    values: list[list[int]], seed: int
) -> None:
    responses = [[str(v) for v in own] for own in values]
    for seek, extreme in (("best", max), ("worst", min)):
        brackets = play(ByValue(), *responses, seed=seed, seek=seek)
        assert [own[b.winner] for own, b in zip(values, brackets, strict=True)] == [
            extreme(own) for own in values
        ]


def test_only_the_named_entrants_take_part() -> None:
    judge = ByValue()
    entrants = [[0, 2, 3]]
    bracket = play(judge, ["3", "9", "5", "4"], entrants=entrants)[0]
    assert bracket.winner == 2
    assert "9" not in {t for c in judge.asked for t in (c.response_a, c.response_b)}
    assert entrants == [[0, 2, 3]]


# -- how the judge is asked ------------------------------------------------------------------------


def test_all_matches_of_a_round_over_all_contexts_are_judged_in_one_call() -> None:
    judge = ByValue()
    brackets = play(judge, list("12345678"), list("123"), ["7"], list("4321"))
    assert [len(call) for call in judge.calls] == [4 + 1 + 2, 2 + 1 + 1, 1]
    assert [len(b.rounds) for b in brackets] == [3, 2, 0, 2]
    for call in judge.calls[:1]:
        assert [c.context for c in call] == ["context 0"] * 4 + ["context 1"] + ["context 3"] * 2


def test_the_bracket_holds_the_verdict_on_the_two_who_met() -> None:
    responses = ["5", "3", "8", "1", "9"]
    bracket = play(ByValue(), responses)[0]
    for match in matches(bracket):
        if match.b is not None:
            assert match.verdict is not None
            assert match.winner == (match.a if match.verdict.preferred == "a" else match.b)
            expected = (float(responses[match.a]) - float(responses[match.b])) / 1000
            assert match.verdict.margin == pytest.approx(expected)
    assert bracket.winner == bracket.rounds[-1][0].winner == 4


def test_a_known_verdict_is_not_asked_for_again_whichever_way_round_it_is() -> None:
    known: dict[tuple[int, int, int], Verdict] = {}
    play(ByValue(), list("42"), list("13"), known=known)
    assert len(known) == 2
    turned = {(i, b, a): v.swapped() for (i, a, b), v in known.items()}
    for given_ in (known, turned):
        again = ByValue()
        brackets = play(again, list("42"), list("13"), known=given_)
        assert again.calls == []
        assert [b.winner for b in brackets] == [0, 1]


def test_equal_texts_need_no_judge_and_are_drawn_by_lot() -> None:
    judge = ByValue()
    bracket = play(judge, ["7", "7", "7", "7"])[0]
    assert judge.calls == []
    assert all(m.by_lot and m.verdict is None for m in matches(bracket))


def test_an_undecided_match_is_drawn_by_lot_and_says_so() -> None:
    winners = []
    for seed in range(400):
        bracket = play(Undecided(), ["x", "y"], seed=seed)[0]
        (match,) = matches(bracket)
        assert match.by_lot
        assert {match.a, match.b} == {0, 1}
        assert match.verdict is not None
        assert match.verdict.undecidable_because == "an exact tie"
        winners.append(bracket.winner)
    assert 160 < sum(winners) < 240  # four standard deviations


def test_the_lot_falls_on_either_place_in_the_draw() -> None:
    played = [m for s in range(50) for m in matches(play(Undecided(), ["x", "y"], seed=s)[0])]
    assert {m.winner == m.a for m in played} == {True, False}


def test_who_meets_whom_and_who_has_the_bye_is_drawn() -> None:
    first_rounds = [play(ByValue(), list("12345"), seed=s)[0].rounds[0] for s in range(100)]
    met = {frozenset((m.a, m.b)) for played in first_rounds for m in played if m.b is not None}
    byes = {m.a for played in first_rounds for m in played if m.b is None}
    assert len(met) == 10
    assert byes == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("n", [4, 8])
def test_where_nothing_is_decided_every_place_wins_about_as_often(n: int) -> None:
    wins = [0] * n
    for seed in range(100 * n):
        wins[play(Undecided(), [str(i) for i in range(n)], seed=seed)[0].winner] += 1
    assert all(60 < w < 140 for w in wins)


def test_a_judge_that_answers_too_few_is_an_error() -> None:
    with pytest.raises(ValueError):
        play(lambda comparisons: [], ["1", "2"])


# -- what the caller keeps -------------------------------------------------------------------------


def test_a_seed_repeats_the_draw_and_another_changes_it() -> None:
    responses = [[str(i) for i in range(9)]] * 2
    first = play(Undecided(), *responses, seed=1)
    assert play(Undecided(), *responses, seed=1) == first
    assert play(Undecided(), *responses, seed=2) != first
    assert first[0] != first[1]  # contexts have draws of their own


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    random.seed(1)
    state = random.getstate()
    first = play(Undecided(), list("123456"))
    assert random.getstate() == state
    random.seed(2)
    assert play(Undecided(), list("123456")) == first


def test_the_callers_lists_stay_as_they_are() -> None:
    responses = [list("31524"), list("12")]
    before = copy.deepcopy(responses)
    play(ByValue(), *responses)
    assert responses == before


def test_no_contexts_give_no_winners() -> None:
    assert knockouts(ByValue(), [], [], seeds=[]) == []


def test_a_context_without_responses_is_named() -> None:
    with pytest.raises(ValueError, match="context 1 has no responses to choose from: 'context 1'"):
        play(ByValue(), ["1"], [])


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 contexts, 1 lists of responses, 2 seeds"):
        knockouts(ByValue(), ["x", "y"], [["1"]], seeds=[0, 0])


def test_one_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"responses\[0\] is a single string"):
        knockouts(ByValue(), ["x"], ["123"], seeds=[0])


# -- self-rejection with a model -------------------------------------------------------------------

CONTEXTS = ["what is it?", "who is that?", "where?"]
RESPONSES = [["yes", "no", "I think so", "it is the capital"], ["he"], ["here", "there", "Paris"]]


@pytest.fixture
def arguments(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "model": model,
        "tokenizer": tokenizer,
        "judge_templates": TEMPLATES,
        "contexts": CONTEXTS,
        "responses": copy.deepcopy(RESPONSES),
    }


def test_self_rejection_returns_the_winner_of_each_bracket(arguments: dict[str, Any]) -> None:
    winners, brackets = tournament_rejection_sampling(**arguments, return_brackets=True)
    assert winners[1] == "he"
    assert winners == [own[b.winner] for own, b in zip(RESPONSES, brackets, strict=True)]
    assert [len([m for m in matches(b) if m.b is not None]) for b in brackets] == [3, 0, 2]
    assert tournament_rejection_sampling(**arguments) == winners
    assert arguments["responses"] == RESPONSES


def test_every_match_goes_to_the_response_that_the_judge_prefers(
    arguments: dict[str, Any], model: Any, tokenizer: Any
) -> None:
    judge = Judge(model, tokenizer, TEMPLATES)
    _, brackets = tournament_rejection_sampling(**arguments, seed=3, return_brackets=True)
    for i, bracket in enumerate(brackets):
        for m in matches(bracket):
            if m.b is not None:
                pair = Comparison(CONTEXTS[i], RESPONSES[i][m.a], RESPONSES[i][m.b])
                preferred = judge.compare([pair])[0].preferred
                assert m.winner == (m.a if preferred == "a" else m.b)


def test_token_ids_are_derived_and_checked_where_given(
    arguments: dict[str, Any], encoder: ChatEncoder, templates: JudgeTemplates
) -> None:
    a, b = encoder.letter_ids(templates)
    winners = tournament_rejection_sampling(**arguments)
    assert tournament_rejection_sampling(**arguments, token_id_a=a, token_id_b=b) == winners
    with pytest.raises(ValueError, match=f"token_id_b={a}.*'ĠA'.*'ĠB'"):
        tournament_rejection_sampling(**arguments, token_id_b=a)


def test_an_encoder_templates_object_or_ready_judge_serve_as_well(
    arguments: dict[str, Any], encoder: ChatEncoder, templates: JudgeTemplates, model: Any
) -> None:
    winners = tournament_rejection_sampling(**arguments)
    arguments.update(tokenizer=encoder, judge_templates=templates)
    assert tournament_rejection_sampling(**arguments) == winners
    ready = Judge(model, encoder, templates)
    given_ = tournament_rejection_sampling(judge=ready, contexts=CONTEXTS, responses=RESPONSES)
    assert given_ == winners


@pytest.fixture
def folder(tmp_path: Any, model: Any, encoder: ChatEncoder, templates: JudgeTemplates) -> Any:
    model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    save_judge_settings(tmp_path, encoder, templates, encoder.letter_ids(templates))
    return tmp_path


def test_the_folder_of_a_judge_is_enough(
    arguments: dict[str, Any], folder: Any, encoder: ChatEncoder
) -> None:
    winners = tournament_rejection_sampling(**arguments)
    lists = {"contexts": CONTEXTS, "responses": RESPONSES}
    assert tournament_rejection_sampling(model=folder, **lists) == winners
    assert tournament_rejection_sampling(model=str(folder), tokenizer=encoder, **lists) == winners
    with pytest.raises(ValueError, match="token_id_a=5"):
        tournament_rejection_sampling(model=folder, token_id_a=5, **lists)


@pytest.mark.parametrize("given", ["model", "folder"])
def test_what_is_asked_of_the_judge_reaches_it(
    given: str, arguments: dict[str, Any], folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[Judge] = []

    def kept(judge: Judge, contexts: Any, *rest: Any, **others: Any) -> list[Bracket]:
        judges.append(judge)
        return judged_knockouts(judge, contexts, *rest, **others)

    monkeypatch.setattr("self_judge.judging.tournament.judged_knockouts", kept)
    one = {"helpful": TEMPLATES["helpful"]}
    arguments.update(judge_templates=one, max_length=300, judge_batch_size=3)
    if given == "folder":
        arguments.update(model=folder)
    tournament_rejection_sampling(**arguments)
    del arguments["judge_batch_size"]
    tournament_rejection_sampling(**arguments)
    assert judges[0].templates.principles == ("helpful",)
    assert judges[0].max_length == 300
    assert [judge.scorer.batch_size for judge in judges] == [3, 8]  # type: ignore[attr-defined]
    for name in ("token_id_a", "token_id_b"):
        with pytest.raises(ValueError, match=f"{name}=5"):
            tournament_rejection_sampling(**arguments, **{name: 5})


def test_the_draw_is_another_for_another_seed_and_for_every_context() -> None:
    class Undecidable:
        def compare(self, comparisons: Any, progress: bool = False) -> list[Verdict]:
            return [Undecided().verdict(c) for c in comparisons]

        def prefix_cache(self) -> Any:
            return nullcontext()

    lists = {"contexts": ["the same"] * 12, "responses": [[f"{k}" for k in range(16)]] * 12}

    def drawn(**seed: int) -> list[str]:
        return tournament_rejection_sampling(judge=Undecidable(), **lists, **seed)

    assert len(set(drawn())) > 4
    assert drawn(seed=0) == drawn() != drawn(seed=1)


def test_a_bar_is_shown_where_asked_for_and_only_there(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tournament_rejection_sampling(**arguments)
    assert "judging" not in capsys.readouterr().err
    tournament_rejection_sampling(**arguments, progress=True)
    assert "judging" in capsys.readouterr().err


def test_an_encoder_given_beside_a_folder_is_used(folder: Any, encoder: ChatEncoder) -> None:
    (folder / "tokenizer.json").unlink()
    lists = {"contexts": CONTEXTS, "responses": RESPONSES}
    assert len(tournament_rejection_sampling(model=folder, tokenizer=encoder, **lists)) == 3


def test_a_length_at_which_nothing_fits_leaves_it_to_the_lot(arguments: dict[str, Any]) -> None:
    _, brackets = tournament_rejection_sampling(**arguments, max_length=49, return_brackets=True)
    assert all(m.by_lot for b in brackets for m in matches(b) if m.b is not None)


@pytest.mark.parametrize("left_out", ["model", "tokenizer", "judge_templates"])
def test_what_is_needed_and_missing_is_said(arguments: dict[str, Any], left_out: str) -> None:
    del arguments[left_out]
    with pytest.raises(ValueError, match="or model, tokenizer and judge_templates"):
        tournament_rejection_sampling(**arguments)


def test_contexts_are_played_together_as_far_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(ByValue):
        def compare(self, comparisons: Any, progress: bool = False) -> list[Verdict]:
            return self(comparisons)

        def prefix_cache(self) -> Any:
            return nullcontext()

    monkeypatch.setattr("self_judge.judging.tournament._MATCHES_TOGETHER", 4)

    def first_rounds(*sizes: int) -> list[int]:
        judge = Counting()
        responses = [[f"{k}" for k in range(n)] for n in sizes]
        contexts = [f"context {i}" for i in range(len(sizes))]
        judged_knockouts(judge, contexts, responses, seeds=range(len(sizes)))  # type: ignore[arg-type]
        shown = [{c.context for c in call} for call in judge.calls]
        return [len(s) for s in dict.fromkeys(map(frozenset, shown))]

    assert first_rounds(5, 5, 5, 5, 5) == [2, 2, 1]
    assert first_rounds(2, 2, 2, 2, 2) == [4, 1]
    assert first_rounds(40, 40) == [1, 1]


def test_rounds_judged_through_a_memory_give_the_same_brackets(
    monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any, templates: JudgeTemplates
) -> None:
    judge = Judge(model, tokenizer, templates)
    together = "self_judge.judging.tournament._MATCHES_TOGETHER"
    monkeypatch.setattr(together, 5)  # several groups of contexts
    contexts = [f"Human: what about {word}?" for word in ("otters", "rain", "the sea", "soup")]
    responses = [
        [f"{c[-6:]} answer {k}" for k in range(n)]
        for c, n in zip(contexts, (5, 2, 8, 1), strict=True)
    ]
    seeds = [3, 1, 4, 1]
    plain = knockouts(judge.compare, contexts, responses, seeds=seeds)
    judged = judged_knockouts(judge, contexts, responses, seeds=seeds)
    for a, b in zip(plain, judged, strict=True):
        assert [[(m.a, m.b, m.winner) for m in r] for r in a.rounds] == [
            [(m.a, m.b, m.winner) for m in r] for r in b.rounds
        ]


@given(st.integers(3, 300), st.integers(0, 2**32))
def test_no_entrant_has_two_byes(n: int, seed: int) -> None:
    # With values of their own, entrants win as the values say: other seeds, other winners.
    values = random.Random(seed).sample(range(n), n)
    for seek in ("best", "worst"):
        bracket = play(ByValue(), [str(v) for v in values], seed=seed, seek=seek)[0]
        byes = [m.a for m in matches(bracket) if m.b is None]
        assert len(byes) == len(set(byes))


@pytest.mark.parametrize("n", [5, 9, 17, 33, 65])
def test_an_entrant_with_a_bye_plays_in_the_next_round(n: int) -> None:
    for seed in range(20):
        rounds = play(ByValue(), [str(i) for i in range(n)], seed=seed)[0].rounds
        for before, after in itertools.pairwise(rounds):
            for rested in (m.a for m in before if m.b is None):
                assert rested in {k for m in after if m.b is not None for k in (m.a, m.b)}


# -- in steps --------------------------------------------------------------------------------------


def test_a_knockout_in_steps_is_the_same_knockout() -> None:
    """A caller that judges by itself, such as a server, gets the bracket of `knockouts`."""
    texts = ["3", "5", "1", "4", "2"]
    steps, judge = knockout_steps("context 0", texts, stable_seed(7, 0)), ByValue()
    asked = [next(steps)]
    for _ in range(2):
        asked.append(steps.send(judge(asked[-1])))
    with pytest.raises(StopIteration) as end:
        steps.send(judge(asked[-1]))
    assert [len(comparisons) for comparisons in asked] == [2, 1, 1]
    assert [end.value.value] == play(ByValue(), texts, seed=7)

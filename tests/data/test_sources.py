"""Preference data: where records come from, what of them is selected, what bad input gets."""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from conftest import SHARED
from self_judge import ChatEncoder, JudgeTemplates
from self_judge.config.schema import Source
from self_judge.data.benchmarks import BenchmarkSource, read_comparisons
from self_judge.data.dialogues import parse_dialogue, select_hh, select_preference
from self_judge.data.files import placed, read_raw
from self_judge.data.records import is_held_out, judge_context
from self_judge.data.sources import (
    PreferenceData,
    load_preferences,
    read_prompts,
    select_records,
    to_self_judge_rows,
)
from self_judge.data.ultrafeedback import select_ultrafeedback
from self_judge.datatypes import PreferenceRecord
from self_judge.errors import DataError
from self_judge.training.jsft.examples import ExampleEncoder, record_from_json, record_to_json

DATA = SHARED / "data"
real_data = pytest.mark.skipif(not DATA.exists(), reason=f"the real data is not at {DATA}")

HH = {
    "chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: No.",
}
PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def selected(rows: Iterable[dict[str, Any]], label: str, **options: Any) -> PreferenceData:
    """What is selected of records that come from no file."""
    return select_records(placed(label, rows), label=label, **options)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def hh(*turns: str) -> str:
    """An HH dialogue of alternating turns."""
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def completion(response: str, system: str = "", **ratings: Any) -> dict[str, Any]:
    """A completion; a rating is its value, or (value, rationale)."""
    annotations = {}
    for principle, rating in ratings.items():
        value, rationale = rating if isinstance(rating, tuple) else (rating, f"so is {response}")
        annotations[principle] = {"Rating": value, "Rationale": rationale}
    return {"response": response, "custom_system_prompt": system, "annotations": annotations}


def ultrafeedback(*completions: dict[str, Any], instruction: str = "Do it.") -> dict[str, Any]:
    return {"instruction": instruction, "completions": list(completions)}


def only(record: PreferenceRecord | None) -> PreferenceRecord:
    assert record is not None
    return record


# --- the real data --------------------------------------------------------------------------------

HH_COUNTS = {
    "base_train": (1287, 1287, 1275, {"empty": 3, "identical": 1, "prefix": 8, "header": 12}),
    "base_test_1000": (1000, 1000, 997, {"empty": 1, "identical": 1, "prefix": 1, "header": 16}),
    "online_train": (1137, 1137, 1130, {"empty": 3, "identical": 2, "no answer": 2}),
    "rs_train": (2747, 2747, 2712, {"identical": 32, "prefix": 3, "header": 45}),
}
REASONS = {
    "empty": "skipped pair: empty response",
    "identical": "skipped pair: identical responses",
    "prefix": "skipped pair: the two dialogues differ before the last answer",
    "header": "removed redundant header of a turn",
    "no answer": "skipped pair: the dialogue does not end with an answer",
}


@real_data
@pytest.mark.parametrize("name", HH_COUNTS)
def test_the_traps_in_the_real_hh_data_are_counted(name: str) -> None:
    read, demonstrations, pairs, reasons = HH_COUNTS[name]
    assert load_preferences(str(DATA / "hh-rlhf" / f"{name}.jsonl.gz")).counts == {
        "read": read,
        "other subset": 0,
        "records": demonstrations,
        "demonstrations": demonstrations,
        "pairs": pairs,
        **{REASONS[reason]: number for reason, number in reasons.items()},
    }


@real_data
@pytest.mark.parametrize("name", HH_COUNTS)
def test_real_hh_dialogues_become_alternating_turns_that_lose_no_text(name: str) -> None:
    path = str(DATA / "hh-rlhf" / f"{name}.jsonl.gz")
    for raw, record in zip(read_raw(path), load_preferences(path).records, strict=True):
        roles = [m["role"] for m in record.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        turns = [m["content"] for m in record.prompt] + [str(record.demonstration)]
        assert all(turn.strip() for turn in turns)
        spoken = re.sub(r"\n\n(Human|Assistant):(\s*(Human|Assistant):)?", "", raw["chosen"])
        assert "".join("".join(turns).split()) == "".join(spoken.split())
        for pair in record.pairs:
            assert pair.chosen == record.demonstration
            assert "" not in (pair.chosen.strip(), pair.rejected.strip())
            assert pair.chosen != pair.rejected


@real_data
def test_hh_helpful_takes_demonstrations_of_both_and_pairs_of_the_base_alone() -> None:
    base, online = (str(DATA / "hh-rlhf" / f"{n}_train.jsonl.gz") for n in ("base", "online"))
    data = load_preferences([{"path": base}, {"path": online, "pairs": False}])
    assert data.counts_by_source[base]["pairs"] == 1275
    assert data.counts_by_source[online]["pairs"] == 0
    assert data.counts["demonstrations"] == 1287 + 1137
    assert not any(what.startswith("skipped") for what in data.counts_by_source[online])
    assert "1,287  demonstrations" in data.describe()


@real_data
@pytest.mark.parametrize(
    ("name", "records", "pairs", "reasons"),
    [
        (
            "binarized_train_1000",
            999,
            884,
            {
                "skipped record: empty response": 1,
                "skipped pair: empty response": 1,
                "skipped pair: tied scores": 111,
                "skipped pair: identical responses": 3,
            },
        ),
        ("binarized_eval_200", 200, 175, {"skipped pair: tied scores": 25}),
    ],
)
def test_ties_and_empty_answers_in_the_real_binarized_data_are_counted(
    name: str, records: int, pairs: int, reasons: dict[str, int]
) -> None:
    counts = load_preferences(str(DATA / "ultrafeedback" / f"{name}.jsonl.gz")).counts
    assert (counts["demonstrations"], counts["pairs"]) == (records, pairs)
    assert {k: n for k, n in counts.items() if k.startswith("skipped")} == reasons


@real_data
@pytest.mark.parametrize("name", ["record_cairo", "record_flan_oldschema"])
def test_both_generations_of_the_real_ultrafeedback_schema_are_read(name: str) -> None:
    raw = json.loads((DATA / "ultrafeedback" / f"{name}.json").read_text())
    original = raw["completions"][0]
    data = load_preferences(str(DATA / "ultrafeedback" / f"{name}.json"))
    assert data.counts["skipped pair: a single rated response"] == 1
    record = data.records[0]
    assert record.demonstration == original["response"]
    assert record.prompt[0] == {"role": "system", "content": original["custom_system_prompt"]}
    # A worse twin makes a pair: its rationales join the reasons for the type and for the rating.
    twin = copy.deepcopy(original)
    twin["response"] = "I do not know."
    for annotation in twin["annotations"].values():
        (annotation[0] if isinstance(annotation, list) else annotation)["Rating"] = "1"
    raw["completions"].append(twin)
    pairs = only(select_ultrafeedback(raw, 0, principles=True, rationales=True).record).pairs
    principles = ["helpfulness", "honesty", "instruction_following", "truthfulness"]
    assert [pair.principle for pair in pairs] == principles

    def explained(principle: str) -> Any:
        annotation = original["annotations"][principle]
        annotation = annotation[0] if isinstance(annotation, list) else annotation
        names = ("Rationale", "Rationale For Rating")
        return " ".join(annotation[name] for name in names if name in annotation)

    assert [p.rationale_chosen for p in pairs] == [explained(p) for p in principles]


@real_data
def test_a_folder_gives_the_files_of_the_split_that_their_names_tell() -> None:
    folder = str(DATA / "hh-rlhf")
    assert load_preferences(folder).counts["read"] == 1287 + 1137 + 2747
    assert load_preferences({"path": folder, "split": "test"}).counts["read"] == 1000


@real_data
def test_real_question_files_are_prompts() -> None:
    bench = read_prompts(str(DATA / "prompts" / "mt_bench_question.jsonl"))
    assert len(bench) == 80
    assert bench[0][0]["content"].startswith("Compose an engaging travel blog post")
    assert len(read_prompts(str(DATA / "prompts" / "vicuna_bench_question.jsonl"))) == 80


# --- HH -------------------------------------------------------------------------------------------


def test_an_hh_record_gives_its_dialogue_a_demonstration_and_a_pair() -> None:
    record = only(select_hh(HH, 7, source="here").record)
    assert record.prompt == (user("Hi?"), assistant("Hello."), user("Why?"))
    assert record.demonstration == "Because."
    assert [(p.chosen, p.rejected, p.principle) for p in record.pairs] == [
        ("Because.", "No.", None)
    ]
    assert (record.source, record.index) == ("here", 7)


def test_consecutive_turns_of_one_speaker_are_joined_and_empty_ones_dropped() -> None:
    chosen = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c\n\nAssistant: d"
    rejected = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c\n\nAssistant: e"
    record = only(select_hh({"chosen": chosen, "rejected": rejected}, 0).record)
    assert record.prompt == (user("a\n\nb"),)
    assert (record.pairs[0].chosen, record.pairs[0].rejected) == ("c\n\nd", "c\n\ne")
    assert len(parse_dialogue(chosen)) == 5


@pytest.mark.parametrize("more", ["Human:", "Assistant: ", "Human: Assistant:"])
def test_redundant_headers_of_turns_are_removed_and_counted_in_every_form(more: str) -> None:
    text = f"\n\nHuman: {more} q\n\nAssistant: "
    for raw in (
        {"chosen": f"{text}{more}yes", "rejected": f"{text}no"},
        {"prompt": text.rstrip(), "chosen": "yes", "rejected": "no"},
    ):
        data = selected([raw], label="x")
        assert data.records[0].prompt == (user("q"),)
        assert [(p.chosen, p.rejected) for p in data.records[0].pairs] == [("yes", "no")]
        assert data.counts["removed redundant header of a turn"] == (1 if "prompt" in raw else 2)


def test_a_marker_inside_a_line_is_text() -> None:
    text = "\n\nHuman: Who speaks, Human: or\nAssistant: me?\n\nAssistant: Humans: I."
    assert parse_dialogue(text) == [
        user("Who speaks, Human: or\nAssistant: me?"),
        assistant("Humans: I."),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        (hh("q", "x"), hh("q", "x "), "pair: identical responses"),
        (hh("q", "x"), hh("q", ""), "pair: empty response"),
        (
            hh("q", "x", "r", "z"),
            hh("q", "y", "r", "v"),
            "pair: the two dialogues differ before the last answer",
        ),
        (hh("q", "x"), hh("q", "y", "r"), "pair: the dialogue does not end with an answer"),
    ],
)
def test_a_degenerate_hh_pair_leaves_the_demonstration(
    chosen: str, rejected: str, why: str
) -> None:
    selection = select_hh({"chosen": chosen, "rejected": rejected}, 0)
    assert only(selection.record).demonstration in ("x", "z")
    assert only(selection.record).pairs == ()
    assert selection.skipped == (why,)
    without = select_hh({"chosen": chosen, "rejected": rejected}, 0, with_pairs=False)
    assert (without.record, without.skipped) == (selection.record, ())


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (hh("q", ""), "record: empty response"),
        (hh("q", "x", "r"), "record: the dialogue does not end with an answer"),
        (hh("", "x"), "record: empty prompt"),
    ],
)
def test_an_hh_record_without_a_usable_answer_is_left_out(chosen: str, why: str) -> None:
    selection = select_hh({"chosen": chosen, "rejected": hh("q", "y")}, 0)
    assert (selection.record, selection.skipped) == (None, (why,))


# --- UltraFeedback --------------------------------------------------------------------------------


def test_the_best_mean_rating_wins_and_loses_to_nothing_of_the_same_score() -> None:
    raw = ultrafeedback(
        completion("tie, short", "S1", honesty="4", helpfulness="4"),
        completion("the longer of the tie", "S2", honesty="5", helpfulness=3),
        completion("worse", honesty="1", helpfulness="4"),
    )
    record = only(select_ultrafeedback(raw, 0).record)
    assert record.demonstration == "the longer of the tie"
    assert record.prompt == ({"role": "system", "content": "S2"}, user("Do it."))
    assert [(p.chosen, p.rejected) for p in record.pairs] == [("the longer of the tie", "worse")]


def test_the_judge_sees_the_instruction_without_the_system_prompt_of_one_response() -> None:
    raw = ultrafeedback(completion("good", "Be good.", h="5"), completion("bad", h="1"))
    record = only(select_ultrafeedback(raw, 0).record)
    assert judge_context(record) == "Do it."


@pytest.mark.parametrize("rating", ["N/A", "", None, "not rated"])
def test_what_is_not_rated_does_not_count_into_the_mean(rating: str | None) -> None:
    raw = ultrafeedback(
        completion("a", honesty="4", helpfulness=rating),
        completion("bb", honesty="3", helpfulness="4"),
        completion("never rated, and long", honesty=rating),
    )
    record = only(select_ultrafeedback(raw, 0).record)
    assert [(p.chosen, p.rejected) for p in record.pairs] == [("a", "bb")]


@pytest.mark.parametrize(
    ("completions", "why"),
    [
        ([], "record: no completions"),
        ([completion("x", honesty="N/A"), completion(" ", honesty="5")], "record: no rated resp"),
        ([completion("x", honesty="2")], "pair: a single rated response"),
        ([completion("x", honesty="2"), completion("y", honesty=2.0)], "pair: tied scores"),
        ([completion("x", honesty="2"), completion("x", honesty="1")], "pair: tied scores"),
    ],
)
def test_ultrafeedback_records_without_a_pair_say_why(
    completions: list[dict[str, Any]], why: str
) -> None:
    selection = select_ultrafeedback(ultrafeedback(*completions), 0)
    assert len(selection.skipped) == 1
    assert selection.skipped[0].startswith(why)
    assert (selection.record is None) == why.startswith("record")


def test_a_pair_per_principle_goes_by_the_ratings_of_that_principle() -> None:
    raw = ultrafeedback(
        completion("kind", honesty="1", helpfulness="5", truthfulness="3"),
        completion("frank", honesty="5", helpfulness="1", truthfulness="3"),
    )
    selection = select_ultrafeedback(raw, 0, principles=True)
    found = {p.principle: (p.chosen, p.rejected) for p in only(selection.record).pairs}
    assert found == {"honesty": ("frank", "kind"), "helpfulness": ("kind", "frank")}
    assert selection.skipped == ("pair, truthfulness: no two different ratings",)
    assert all(p.rationale_chosen is None for p in only(selection.record).pairs)
    named = select_ultrafeedback(raw, 0, principles=["helpfulness"])
    assert [p.principle for p in only(named.record).pairs] == ["helpfulness"]


def test_the_pair_of_a_principle_has_the_best_completion_and_a_worse_one_if_it_can() -> None:
    """The oracle is the rule itself, on records drawn at random."""
    rng = random.Random(0)
    seen = set()
    for number in range(300):
        ratings = [[rng.randint(1, 3) for _ in range(2)] for _ in range(4)]
        rated = [completion("x" * (9 - i), honesty=h, help=k) for i, (h, k) in enumerate(ratings)]
        raw = ultrafeedback(*rng.sample(rated, 4), instruction=f"Do {number}.")
        record = only(select_ultrafeedback(raw, 0, principles=["honesty"]).record)
        own = {c["response"]: r[0] for c, r in zip(rated, ratings, strict=True)}
        means = {c["response"]: sum(r) for c, r in zip(rated, ratings, strict=True)}
        best = max(means, key=lambda text: (means[text], len(text)))
        assert record.demonstration == best
        if len(set(own.values())) == 1:
            assert record.pairs == ()
            seen.add("none")
            continue
        (pair,) = record.pairs
        assert own[pair.chosen] > own[pair.rejected]
        if any(own[best] > other for other in own.values()):
            assert pair.chosen == best
            seen.add("best wins")
        else:  # the best is worse than another on this principle
            assert pair.rejected == best
            seen.add("best loses")
    assert seen == {"none", "best wins", "best loses"}


def test_if_the_best_cannot_be_paired_the_next_in_the_ranking_is() -> None:
    raw = ultrafeedback(
        completion("best", honesty=("5", "Better than Text 2."), other="5"),
        completion("second", honesty=("4", "Good."), other="5"),
        completion("third", honesty=("3", "Fair."), other="4"),
        completion("fourth", honesty=("2", "As Text1 says."), other="4"),
    )
    for seed in range(8):
        selection = select_ultrafeedback(raw, 0, seed=seed, principles=["honesty"], rationales=True)
        (pair,) = only(selection.record).pairs
        assert (pair.chosen, pair.rejected) == ("second", "third")


def test_rationales_that_mention_other_texts_are_not_learned() -> None:
    raw = ultrafeedback(
        completion("a", honesty=("5", "The text is honest."), helpfulness=("5", "Good.")),
        completion("b", honesty=("1", "Worse than Text 1."), helpfulness=("1", "")),
        completion("c", honesty=("2", "It lies.")),
    )
    selection = select_ultrafeedback(raw, 0, principles=True, rationales=True)
    (pair,) = only(selection.record).pairs
    assert (pair.chosen, pair.rejected) == ("a", "c")
    assert (pair.rationale_chosen, pair.rationale_rejected) == ("The text is honest.", "It lies.")
    assert selection.skipped == (
        "pair, helpfulness: a rationale is missing or mentions other texts",
    )


def test_jsft_answers_under_the_system_prompt_and_judges_without_it(
    encoder: ChatEncoder, templates: JudgeTemplates
) -> None:
    raw = ultrafeedback(completion("good", "Be good.", h="5"), completion("bad", h="1"))
    stored = record_to_json(only(select_ultrafeedback(raw, 0).record))
    sft, *judged = ExampleEncoder(encoder, templates, (1, 2)).examples(record_from_json(stored))
    assert "Be good." in encoder.tokenizer.decode(list(sft.input_ids))
    assert len(judged) == 4
    for example in judged:
        text = encoder.tokenizer.decode(list(example.input_ids))
        assert "Do it." in text
        assert "Be good." not in text


def test_random_pairs_depend_on_the_seed_and_the_record_alone() -> None:
    raw = [
        ultrafeedback(
            *(completion(f"answer {j}", honesty=str(j)) for j in range(5)), instruction=f"Do {i}."
        )
        for i in range(40)
    ]

    def losers(records: list[dict[str, Any]], seed: int) -> dict[str, str]:
        data = selected(records, label="x", seed=seed)
        return {judge_context(r): r.pairs[0].rejected for r in data.records}

    assert losers(raw, 0) == losers(raw[::-1], 0)
    assert losers(raw, 0) != losers(raw, 1)
    assert set(losers(raw, 0).values()) == {f"answer {j}" for j in range(4)}


# --- TRL preference data --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(PLAIN, id="standard, explicit prompt"),
        pytest.param(
            {"prompt": "Why?", "chosen": "Why? Because.", "rejected": "Why? No."},
            id="standard, prompt repeated",
        ),
        pytest.param(
            {"chosen": "Why? Because.", "rejected": "Why? No."}, id="standard, implicit prompt"
        ),
        pytest.param(
            {
                "prompt": "\n\nHuman: Why?\n\nAssistant:",
                "chosen": " Because.",
                "rejected": " No.",
            },
            id="standard, HH prompt",
        ),
        pytest.param(
            {
                "prompt": [user("Why?")],
                "chosen": [assistant("Because.")],
                "rejected": [assistant("No.")],
            },
            id="conversational, explicit prompt",
        ),
        pytest.param(
            {
                "chosen": [user("Why?"), assistant("Because.")],
                "rejected": [user("Why?"), assistant("No.")],
            },
            id="conversational, implicit prompt",
        ),
        pytest.param(
            {
                "prompt": "Why?",
                "chosen": [user("Why?"), assistant("Because.")],
                "rejected": [user("Why?"), assistant("No.")],
            },
            id="text as prompt, whole dialogues",
        ),
        pytest.param(
            {"prompt": [user("Why?")], "chosen": "Because.", "rejected": "No."},
            id="messages as prompt, texts as responses",
        ),
    ],
)
def test_every_form_of_trl_preference_data_is_the_same_record(raw: dict[str, Any]) -> None:
    record = only(select_preference(raw, 0).record)
    assert record.prompt == (user("Why?"),)
    assert record.demonstration == "Because."
    assert [(p.chosen, p.rejected) for p in record.pairs] == [("Because.", "No.")]


def test_a_system_message_and_earlier_turns_stay_in_the_prompt() -> None:
    earlier = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yo"), user("So?")]
    raw = {"prompt": earlier, "chosen": [assistant("x")], "rejected": [assistant("y")]}
    record = only(select_preference(raw, 0).record)
    assert list(record.prompt) == earlier
    overlap = {
        "prompt": earlier[:2],
        "chosen": [*earlier[1:], assistant("x")],
        "rejected": [*earlier[1:], assistant("y")],
    }
    assert list(only(select_preference(overlap, 0).record).prompt) == earlier


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({**PLAIN, "rejected": "Because. "}, "pair: identical responses"),
        ({**PLAIN, "rejected": "\n"}, "pair: empty response"),
        ({**PLAIN, "score_chosen": 7.0, "score_rejected": 7.0}, "pair: tied scores"),
        (
            {**PLAIN, "metadata": {"score_chosen": 6, "score_rejected": 7}},
            "pair: chosen has the lower score",
        ),
        (
            {
                "chosen": [user("a"), assistant("x"), user("b"), assistant("Because.")],
                "rejected": [user("a"), assistant("y"), user("b"), assistant("No.")],
            },
            "pair: the two dialogues differ before the last answer",
        ),
        ({**PLAIN, "chosen": ""}, "record: empty response"),
        ({**PLAIN, "prompt": " "}, "record: empty prompt"),
        ({"chosen": "Because.", "rejected": "No."}, "record: no common prompt"),
    ],
)
def test_degenerate_preference_records_are_skipped_and_say_why(
    raw: dict[str, Any], why: str
) -> None:
    selection = select_preference(raw, 0)
    assert selection.skipped == (why,)
    if why.startswith("pair"):
        assert only(selection.record).demonstration == "Because."
        assert only(selection.record).pairs == ()
    else:
        assert selection.record is None


# --- malformed records ----------------------------------------------------------------------------


def without_annotations() -> dict[str, Any]:
    raw = ultrafeedback(completion("x", honesty="2"))
    del raw["completions"][0]["annotations"]
    return raw


@pytest.mark.parametrize(
    ("select", "raw", "message"),
    [
        (select_hh, {"rejected": "x"}, "field 'chosen': is missing; found ['rejected']"),
        (select_hh, {**HH, "chosen": 3}, "field 'chosen': expected text, got int"),
        (
            select_hh,
            {**HH, "rejected": "Assistant: I."},
            "field 'rejected': does not start with 'Human:': 'Assistant: I.'",
        ),
        (select_hh, {**HH, "chosen": hh("q", "\ud800")}, "field 'chosen': is not valid Unicode"),
        (select_ultrafeedback, {"instruction": "x"}, "field 'completions': is missing"),
        (
            select_ultrafeedback,
            {"instruction": "x", "completions": {"response": ["y"]}},
            "field 'completions': expected a list, got dict",
        ),
        (
            select_ultrafeedback,
            without_annotations(),
            "field 'completions[0].annotations': is missing",
        ),
        (
            select_ultrafeedback,
            ultrafeedback(completion("x", honesty=["2"])),
            "field 'completions[0].annotations.honesty.Rating': expected a number or text",
        ),
        (select_preference, {"prompt": "x", "chosen": "y"}, "field 'rejected': is missing"),
        (select_preference, {**PLAIN, "chosen": None}, "field 'chosen': expected text or a list"),
        (select_preference, {**PLAIN, "prompt": 5}, "field 'prompt': expected text or messages"),
        (
            select_preference,
            {"instruction": "x", "chosen": "y", "rejected": "z"},
            "field 'prompt': is missing; rename the column 'instruction'",
        ),
        (
            select_preference,
            {**PLAIN, "chosen": [{"role": "bot", "content": "x"}]},
            "field 'chosen[0].role': is 'bot', expected one of system, user, assistant, tool",
        ),
        (
            select_preference,
            {**PLAIN, "rejected": [user("x")]},
            "field 'rejected': ends with role 'user', expected the last message to have role",
        ),
        (
            select_preference,
            {
                "prompt": [user("x"), assistant("y")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            "field 'prompt': ends with role 'assistant', expected 'user'",
        ),
        (
            select_preference,
            {"prompt": "\ud800", "chosen": "x", "rejected": "y"},
            "field 'prompt': is not valid Unicode: it contains an unpaired surrogate",
        ),
        (
            select_preference,
            {"prompt": "\ud800", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "field 'prompt': is not valid Unicode: it contains an unpaired surrogate",
        ),
    ],
)
def test_a_malformed_record_is_an_error_that_names_source_record_and_field(
    select: Callable[..., Any], raw: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as error:
        select(raw, 41, source="some/data")
    assert str(error.value).startswith(f"some/data, record 41, {message}")
    assert "\n" not in str(error.value)


# --- files ----------------------------------------------------------------------------------------


def rows(n: int) -> list[dict[str, str]]:
    return [{**PLAIN, "prompt": f"Why {i}?"} for i in range(n)]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    compress = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
    }.get(path.suffix)
    if compress is not None:
        path.write_bytes(compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def lines(n: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows(n))


@pytest.mark.parametrize(
    "kind",
    [
        *("x.json", "x.json.gz", "x.jsonl", "x.jsonl.gz", "x.jsonl.bz2", "x.json.xz"),
        *("x.ndjson", "x.json.zst", "x.jsonl.zst"),
        *("x.parquet", "lines.json", "saved", "splits"),
    ],
)
def test_every_local_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    dataset = datasets.Dataset.from_list(rows(3))
    if kind == "x.parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
    else:
        write(path, json.dumps(rows(3)) if kind.startswith("x.json.") else lines(3))
    assert list(read_raw(str(path))) == rows(3)
    assert load_preferences(str(path)).counts["pairs"] == 3


@pytest.mark.parametrize("name", ["b.xlsx", "b.arrow", "b.jsonl.7z", "b.csv.lz4", "b.parquet.gz"])
def test_data_in_a_form_that_cannot_be_read_is_named_and_not_left_out(
    tmp_path: Path, name: str
) -> None:
    write(tmp_path / "a.jsonl", lines(2))
    (tmp_path / name).write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("not data")
    with pytest.raises(DataError, match=rf"/{name}: unknown file type; .*move"):
        load_preferences(str(tmp_path))
    with pytest.raises(DataError, match=rf"/{name}: unknown file type; "):
        list(read_comparisons(BenchmarkSource(str(tmp_path))))
    write(tmp_path / "train.jsonl", lines(3))  # now no file without a split is read
    assert load_preferences(str(tmp_path)).counts["read"] == 3


def test_compressed_data_that_is_damaged_is_named(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "x.jsonl.zst", lines(2))).read_bytes()
    for content in (whole[:-9], b"not compressed"):
        (tmp_path / "x.jsonl.zst").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl\.zst: not a valid zst file"):
            load_preferences(str(tmp_path))


@pytest.mark.parametrize("second", ["train.jsonl.gz", "train.csv"])
def test_one_file_in_two_forms_is_not_read_twice(second: str, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "train.jsonl").write_text(row)
    assert load_preferences(str(tmp_path)).counts["read"] == 1
    (tmp_path / second).write_bytes(gzip.compress(row.encode()))
    with pytest.raises(DataError, match="look like one file in two forms"):
        load_preferences(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("b.jsonl", "line 3"),
        ("b.json", "record 1"),
        ("b.csv", "record 1"),
        ("b.parquet", "record 1"),
    ],
)
def test_a_bad_record_in_a_folder_is_named_by_its_file_and_place(
    tmp_path: Path, name: str, place: str
) -> None:
    write(
        tmp_path / "a.jsonl", json.dumps({"prompt": [user("Why?")], "chosen": "a", "rejected": "b"})
    )
    bad = '[{"role": "human", "content": "Why?"}]'
    records = [PLAIN, {**PLAIN, "prompt": bad}]
    if name == "b.jsonl":  # a blank line counts, too
        write(tmp_path / name, "\n\n".join(map(json.dumps, records)))
    elif name == "b.json":
        write(tmp_path / name, json.dumps(records))
    else:
        frame = pandas.DataFrame(records)
        (frame.to_csv if name == "b.csv" else frame.to_parquet)(tmp_path / name, index=False)
    for read in (load_preferences, lambda path: list(read_comparisons(BenchmarkSource(path)))):
        with pytest.raises(DataError, match=rf"/{name}, {place}, field 'prompt\[0\]"):
            read(str(tmp_path))


def test_ratings_of_mixed_types_and_annotations_of_mixed_fields_can_be_read(
    tmp_path: Path,
) -> None:
    raw = [
        ultrafeedback(completion("a", honesty="5"), completion("b", honesty=2)),
        ultrafeedback(completion("c", helpfulness=4), completion("d", helpfulness="N/A")),
        ultrafeedback(),
    ]
    path = write(tmp_path / "uf.jsonl", "".join(json.dumps(r) + "\n" for r in raw))
    assert load_preferences(path).counts == {
        "read": 3,
        "other subset": 0,
        "records": 2,
        "demonstrations": 2,
        "pairs": 1,
        "skipped pair: a single rated response": 1,
        "skipped record: no completions": 1,
    }


def test_ultrafeedback_through_arrow_gives_the_same_selection(tmp_path: Path) -> None:
    raw = [
        ultrafeedback(completion("a", "S", honesty="5"), completion("b", honesty="2")),
        ultrafeedback(completion("c", helpfulness="4"), completion("d", helpfulness="N/A")),
    ]
    datasets.Dataset.from_list(raw).save_to_disk(tmp_path / "uf")
    through_arrow = load_preferences(str(tmp_path / "uf"), principles=True, rationales=True)
    direct = selected(raw, label="x", principles=True, rationales=True)
    assert through_arrow.counts == direct.counts
    assert [r.pairs for r in through_arrow.records] == [r.pairs for r in direct.records]


def test_a_byte_order_mark_and_blank_lines_are_no_trouble(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", "\ufeff" + lines(2) + "\n\n")
    assert len(list(read_raw(path))) == 2


def test_a_local_copy_of_a_hub_repository_reads_like_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "repo" / "helpful-base" / "train.jsonl.gz", json.dumps(HH))
    write(tmp_path / "repo" / "helpful-base" / "test.jsonl.gz", json.dumps(HH) + "\n" * 2)
    source = Source(str(tmp_path / "repo"), data_dir="helpful-base", split="test")
    assert load_preferences(source).counts["pairs"] == 1
    with pytest.raises(DataError, match=r"no data file .* its folders: helpful-base$"):
        load_preferences(str(tmp_path / "repo"))


def test_hub_datasets_are_loaded_as_datasets_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([HH] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base"}
    data = load_preferences(source, max_records=2, num_proc=2)
    assert data.counts_by_source["Anthropic/hh-rlhf/helpful-base[train]"]["pairs"] == 2
    assert calls == [
        (
            ("Anthropic/hh-rlhf", None),
            {"data_dir": "helpful-base", "split": "train", "revision": None, "num_proc": 2},
        )
    ]


BROKEN = {
    "missing file": (lambda d: str(d / "no.jsonl"), "no such file or folder"),
    "empty file": (lambda d: write(d / "x.jsonl", " \n"), "the file has no records"),
    "empty json": (lambda d: write(d / "x.json", ""), "the file has no records"),
    "empty list": (lambda d: write(d / "x.json", "[]"), "the file has no records"),
    "bad line": (
        lambda d: write(d / "x.jsonl", lines(2) + "{oops\n"),
        "x.jsonl, line 3: not JSON (Expecting property name",
    ),
    "bad line of .json": (
        lambda d: write(d / "x.json", lines(2) + "{oops\n"),
        "x.json, line 3: not JSON (Expecting property name",
    ),
    "bad json": (lambda d: write(d / "x.json", '[{"a": 1},\n 2'), "x.json, line 2: not JSON"),
    "no object": (
        lambda d: write(d / "x.jsonl", lines(1) + "[1]\n"),
        "x.jsonl, line 2: expected a JSON object, got list",
    ),
    "unknown kind": (
        lambda d: write(d / "x.xml", "<a/>"),
        "unknown file type; supported types are .json",
    ),
    "no gzip": (
        lambda d: str((d / "x.jsonl.gz", (d / "x.jsonl.gz").write_text(lines(1)))[0]),
        "not a valid gzip file",
    ),
    "no bzip2": (
        lambda d: str((d / "x.json.bz2", (d / "x.json.bz2").write_text(lines(1)))[0]),
        "x.json.bz2: not a valid bz2 file",
    ),
    "no xz": (
        lambda d: str((d / "x.csv.xz", (d / "x.csv.xz").write_text(lines(1)))[0]),
        "x.csv.xz: not a valid xz file",
    ),
    "lz4": (
        lambda d: write(d / "x.jsonl.lz4", lines(1)),
        "written by save_to_disk: convert or decompress the file",
    ),
    "a key twice": (
        lambda d: write(d / "x.jsonl", lines(1) + '{"prompt": "q", "prompt": "r"}\n'),
        "x.jsonl, line 2: not JSON (the key 'prompt' appears twice in an object)",
    ),
    "a key of a message twice": (
        lambda d: write(d / "x.json", '[{"prompt": {"content": "q", "content": "r"}}]'),
        "x.json: not JSON (the key 'content' appears twice in an object)",
    ),
    "a column of Parquet twice": (
        lambda d: twice(d / "x.parquet"),
        "x.parquet: two columns have the same name: ['prompt', 'prompt']",
    ),
    "no UTF-8": (
        lambda d: str((d / "x.jsonl", (d / "x.jsonl").write_bytes(b'{"a": "\xff"}'))[0]),
        "not UTF-8 text",
    ),
    "no parquet": (lambda d: write(d / "x.parquet", "PAR"), "not a valid parquet file"),
    "empty folder": (
        lambda d: str(d),
        "no data file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet (text",
    ),
    "no such split": (
        lambda d: str((d, write(d / "test.jsonl", lines(1)))[0]),
        "no file for split 'train'; found splits: test",
    ),
    "offline": (
        lambda d: "nobody/nothing",
        "nobody/nothing: not a local path, and cannot be loaded from the Hub (Couldn't reach",
    ),
    "other columns": (
        lambda d: write(d / "x.jsonl", '{"messages": []}'),
        "x.jsonl: cannot detect the kind of data from the columns ['messages']; expected chosen",
    ),
}


def twice(path: Path) -> str:
    names = ["prompt", "prompt"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["q"])] * 2, names=names)
    pyarrow.parquet.write_table(table, path)
    return str(path)


@pytest.mark.parametrize("what", BROKEN)
def test_a_source_that_cannot_be_read_gets_one_line(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    make, message = BROKEN[what]
    with pytest.raises(DataError) as error:
        load_preferences(make(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gzip_file_that_is_cut_short_is_told_so(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.jsonl.gz", lines(500)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: the gzip file is truncated"):
        load_preferences(str(path))


def test_a_saved_dataset_without_the_split_names_those_it_has(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(rows(1))
    datasets.DatasetDict({"train": dataset, "dev": dataset}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"no split 'test'; it has train, dev"):
        load_preferences({"path": str(tmp_path / "d"), "split": "test"})


def test_files_that_name_no_split_are_never_a_test_set(tmp_path: Path) -> None:
    write(tmp_path / "part-0.jsonl", lines(1))
    write(tmp_path / "part-1.jsonl", lines(2))
    assert load_preferences(str(tmp_path)).counts["read"] == 3
    with pytest.raises(DataError, match="no file for split 'test'"):
        load_preferences({"path": str(tmp_path), "split": "test"})


# --- options --------------------------------------------------------------------------------------


def test_the_held_out_prompts_and_the_others_are_all_and_share_none() -> None:
    raw = rows(500)
    parts = {
        subset: {
            judge_context(r)
            for r in selected(raw, label="x", subset=subset, held_out=0.1, seed=seed).records
        }
        for seed, subset in enumerate(("train", "held_out"))
    }
    assert parts["train"] | parts["held_out"] == {row["prompt"] for row in raw}
    assert not parts["train"] & parts["held_out"]
    assert 30 <= len(parts["held_out"]) <= 70
    assert is_held_out("Why 1?", 0.5) == is_held_out(" Why 1?\n", 0.5)


def test_dialogues_with_the_same_first_question_are_held_out_together() -> None:
    raw = [
        {"chosen": hh(f"first {i}", *more, "yes"), "rejected": hh(f"first {i}", *more, "no")}
        for i in range(50)
        for more in ((), ("x", f"second {i}"))
    ]
    data = selected(raw, label="x", subset="held_out", held_out=0.3)
    firsts = [record.prompt[0]["content"] for record in data.records]
    assert firsts
    assert all(firsts.count(first) == 2 for first in firsts)


def test_max_records_keeps_the_first_that_can_be_used() -> None:
    raw = [{**PLAIN, "chosen": ""}, *rows(5)]
    data = selected(raw, label="x", max_records=2)
    assert [judge_context(r) for r in data.records] == ["Why 0?", "Why 1?"]
    assert data.counts["read"] == 3


def test_pairs_alone_have_no_demonstration() -> None:
    raw = [*rows(1), {**PLAIN, "rejected": PLAIN["chosen"]}]
    data = selected(raw, label="x", sft=False)
    assert [r.demonstration for r in data.records] == [None]
    assert data.counts["skipped record: no pair is left"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hhh"}, "kind must be one of auto, hh, .* got 'hhh'"),
        ({"subset": "dev"}, "subset must be 'train', 'held_out' or 'all', got 'dev'"),
        ({"held_out": 1.0}, r"held_out must be a fraction of the prompts in \[0, 1\), got 1.0"),
        ({"subset": "held_out"}, "subset 'held_out' is empty because held_out is 0"),
        ({"rationales": True}, "rationales requires principles"),
        ({"max_records": 0}, "max_records must be at least 1"),
        ({"principles": True}, "x: pairs per principle need ratings per principle"),
    ],
)
def test_options_that_make_no_sense_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        selected(rows(2), label="x", **options)


def test_a_source_of_which_nothing_can_be_used_is_an_error_with_the_reasons() -> None:
    with pytest.raises(DataError, match=r"x: no record could be used .*empty response: 2"):
        selected([{**PLAIN, "chosen": ""}] * 2, label="x")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a", "sorce": 1}, r"sorce: unknown; valid names are path, split, data_dir"),
        ({"split": "test"}, r"path: missing"),
        ({"path": "a", "kind": "hhh"}, r"kind: expected .*auto.*hh.*got text 'hhh'"),
        ({"path": "a", "sft": False, "pairs": False}, "sft and pairs are both false"),
        ({"path": ".", "name": "en"}, "name 'en' applies only to Hub datasets"),
        ({"path": ".", "data_dir": "no"}, "no: no such folder"),
    ],
)
def test_a_source_that_makes_no_sense_is_an_error(source: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(source)


def test_a_data_frame_is_not_read_as_the_names_of_its_columns() -> None:
    frame = pandas.DataFrame([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="got DataFrame"):
        load_preferences(frame)


def test_an_empty_path_is_not_the_working_folder() -> None:
    with pytest.raises(DataError, match="the path of the data is empty"):
        load_preferences("")


def test_a_list_of_records_keeps_columns_that_the_first_record_lacks() -> None:
    given = [
        {"chosen": [user("hello"), assistant("a")], "rejected": [user("hello"), assistant("b")]},
        {"prompt": [user("why?")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ]
    questions = [record.prompt[-1]["content"] for record in load_preferences(given).records]
    assert questions == ["hello", "why?"]


def test_rows_for_self_training_have_prompt_context_and_the_given_pair() -> None:
    records = selected([HH, {**HH, "rejected": HH["chosen"]}], label="x").records
    prompt = [user("Hi?"), assistant("Hello."), user("Why?")]
    context = "Human: Hi?\n\nAssistant: Hello.\n\nHuman: Why?"
    shared = {"prompt": prompt, "context": context}
    assert to_self_judge_rows(records) == [
        {**shared, "chosen": "Because.", "rejected": "No."},
        {**shared, "chosen": None, "rejected": None},
    ]


def test_prompts_are_read_from_texts_messages_and_turns(tmp_path: Path) -> None:
    given = [{"prompt": "a"}, {"messages": [user("b")]}, {"turns": ["c", "d"]}]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(p) + "\n" for p in given))
    assert read_prompts(path) == [[user("a")], [user("b")], [user("c")]]
    bad = write(tmp_path / "q.jsonl", '{"prompt": " "}')
    with pytest.raises(DataError, match=r"line 1, field 'prompt': expected non-empty text"):
        read_prompts(bad)


def test_reading_local_data_needs_neither_torch_nor_datasets(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", lines(1))
    program = (
        "import sys; from self_judge.data.sources import load_preferences; "
        f"load_preferences({path!r}); print([m for m in ('torch', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

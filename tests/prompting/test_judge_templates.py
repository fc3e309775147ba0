"""Judge templates: what is checked, what is substituted, and what stays text."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TEMPLATES
from self_judge import Comparison, JudgeTemplates
from self_judge.errors import TemplateError
from self_judge.prompting.judge_templates import JudgeTemplate, dialogue_text, substitute, turns_of

USER = "{context} {response_a} {response_b}"
RATIONALE = " A: {rationale_a} B: {rationale_b}"


def one(**parts: Any) -> dict[str, dict[str, Any]]:
    return {"honest": {"user": USER, "assistant": "Response", **parts}}


def test_a_comparison_is_rendered_into_system_question_and_unfinished_answer() -> None:
    templates = JudgeTemplates(TEMPLATES)
    assert templates.principles == ("helpful", "honest")
    assert templates.render("honest", Comparison("why?", "so", "no")) == [
        {"role": "system", "content": "you judge"},
        {"role": "user", "content": "Q: why?\n\nA: so\n\nB: no\n\nWhich one is honest?"},
        {"role": "assistant", "content": "The honest one is Response"},
    ]
    assert [m["role"] for m in templates.render("helpful", Comparison("", "", ""))] == [
        "user",
        "assistant",
    ]


def test_swapping_a_comparison_swaps_the_responses_and_nothing_else() -> None:
    templates = JudgeTemplates(TEMPLATES)
    comparison = Comparison("why?", "so", "no")
    swapped = templates.render("helpful", comparison.swapped())
    assert swapped == templates.render("helpful", Comparison("why?", "no", "so"))
    assert swapped[-1] == templates.render("helpful", comparison)[-1]


def test_the_lead_in_ends_without_white_space_since_the_letter_brings_its_own() -> None:
    templates = JudgeTemplates(one(assistant="It is Response \n"))
    assert templates["honest"].assistant == "It is Response"


@pytest.mark.parametrize(
    ("given_templates", "said"),
    [
        ({}, "at least one principle"),
        ("a text", "got str"),
        ({"honest": "a text"}, "'honest' must be a mapping"),
        (one(user="{context} {response_a}"), "'honest' lacks {response_b}"),
        (one(user="none"), "{context}, {response_a}, {response_b}"),
        (one(user=None), "'honest' needs a non-empty string as 'user'"),
        (one(assistant=" \n"), "'honest' needs a non-empty string as 'assistant'"),
        ({"honest": {"user": USER}}, "'honest' needs a non-empty string as 'assistant'"),
        (one(system=3), "'honest' needs a string (or nothing) as 'system'"),
        (one(lead_in="x"), "'honest' has unknown parts ['lead_in']"),
    ],
)
def test_a_bad_template_is_refused_by_name_and_by_what_is_missing(
    given_templates: Any, said: str
) -> None:
    with pytest.raises(TemplateError) as refused:
        JudgeTemplates(given_templates)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rationale", "said"),
    [
        ("{rationale_a}", "'honest' lacks {rationale_b}"),
        ({"honest": "none"}, "lacks {rationale_a}, {rationale_b}"),
        ({"kind": RATIONALE}, "principles ['kind'], but the judge templates have ['honest']"),
        ({"honest": 3}, "'honest' must be a string, got int"),
        (3, "one string for all principles or a mapping"),
    ],
)
def test_a_bad_rationale_text_is_refused(rationale: Any, said: str) -> None:
    with pytest.raises(TemplateError) as refused:
        JudgeTemplates(one(), rationale)
    assert said in str(refused.value)


def test_rationales_follow_the_order_they_are_given_in() -> None:
    templates = JudgeTemplates(one(), RATIONALE)
    assert templates.has_rationales
    assert templates.render_rationale("honest", "good", "bad") == " A: good B: bad"
    assert not JudgeTemplates(one()).has_rationales


def test_placeholders_and_braces_in_data_are_just_text() -> None:
    templates = JudgeTemplates(one(user='{"json": {}} {unknown} ' + USER))
    comparison = Comparison("{response_a}", "{response_b}{context}", "{0} {{x}} {% y %}")
    question = templates.render("honest", comparison)[0]["content"]
    assert question == (
        '{"json": {}} {unknown} {response_a} {response_b}{context} {0} {{x}} {% y %}'
    )
    rationales = JudgeTemplates(one(), RATIONALE)
    assert rationales.render_rationale("honest", "{rationale_b}", "{") == " A: {rationale_b} B: {"


@given(st.text(), st.text())
def test_substitution_inserts_values_verbatim(first: str, second: str) -> None:
    values = {"first": first, "second": second}
    assert substitute("<{first}|{second}|{first}>", values) == f"<{first}|{second}|{first}>"


def test_templates_survive_json_and_pickling() -> None:
    templates = JudgeTemplates(TEMPLATES, RATIONALE)
    saved = json.loads(json.dumps(templates.to_dict()))
    for again in (JudgeTemplates.from_dict(saved), pickle.loads(pickle.dumps(templates))):
        assert again.to_dict() == templates.to_dict()
        assert again.principles == templates.principles
    plain = JudgeTemplates({"x": JudgeTemplate(user=USER, assistant="Response")})
    assert not JudgeTemplates.from_dict(plain.to_dict()).has_rationales


def test_a_single_question_stands_alone_and_a_dialogue_gets_labels() -> None:
    question = {"role": "user", "content": " why?\n"}
    answer = {"role": "assistant", "content": "so"}
    assert dialogue_text([question]) == "why?"
    assert dialogue_text([question, answer, question]) == (
        "Human: why?\n\nAssistant: so\n\nHuman: why?"
    )
    assert dialogue_text([{"role": "system", "content": "be kind"}, question]) == (
        "System: be kind\n\nHuman: why?"
    )


@pytest.mark.parametrize(
    ("context", "shorter"),
    [
        ("Human: a\n\nAssistant: b\n\nHuman: c", ["Assistant: b\n\nHuman: c", "Human: c"]),
        ("System: s\n\nHuman: c", ["Human: c"]),
        ("a question\n\nin paragraphs", []),
        # Queries of the method: the label at the end opens the answer, it is not a turn.
        ("Human: a\n\nHuman: c\n\nAssistant:", ["Human: c\n\nAssistant:"]),
        ("Human: a\n\nHuman: c\n\nAssistant: ", ["Human: c\n\nAssistant: "]),
        ("\n\nHuman: c", ["Human: c"]),
    ],
)
def test_a_context_loses_its_oldest_turns_down_to_the_question(
    context: str, shorter: list[str]
) -> None:
    turns = turns_of(context)
    assert ["\n\n".join(turns[k:]) for k in range(1, len(turns))] == shorter

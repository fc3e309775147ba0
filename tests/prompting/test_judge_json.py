"""judge.json: whoever judges later asks in the words that the model was taught with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML, ROOT, TEMPLATES, Make
from self_judge import ChatEncoder, Judge, JudgeTemplates
from self_judge.config.schema import load_run
from self_judge.errors import ModelError
from self_judge.judging.choice import JudgeChoice
from self_judge.prompting.judge_json import (
    encoder_as_taught,
    load_judge_settings,
    save_judge_settings,
)
from self_judge.training.setup import jsft_chat_setup, self_judge_chat_setup

# A template that is told how to address the model.
TOLD = "{{ tone | default('plain') }}: " + CHATML
ASKED = [{"role": "user", "content": "Where does the otter live?"}]


@pytest.mark.parametrize("rationale", [None, "\n\nA: {rationale_a}\nB: {rationale_b} {braces} ✓"])
def test_judge_settings_come_back_as_they_were_saved(
    tmp_path: Path, encoder: ChatEncoder, rationale: str | None
) -> None:
    templates = JudgeTemplates(TEMPLATES, rationale)
    letters = encoder.letter_ids(templates)
    path = save_judge_settings(tmp_path / "new" / "folder", encoder, templates, letters)
    assert [p.name for p in path.parent.iterdir()] == ["judge.json"]
    saved = load_judge_settings(path.parent)
    assert saved is not None
    assert saved.templates.to_dict() == templates.to_dict()
    assert saved.templates.principles == ("helpful", "honest")
    assert (saved.token_id_a, saved.token_id_b) == letters
    assert saved.chat_template == encoder.chat_template
    assert saved.chat_template_kwargs == encoder.chat_template_kwargs


def test_a_folder_or_hub_name_without_judge_settings_has_none(tmp_path: Path) -> None:
    assert load_judge_settings(tmp_path) is None
    assert load_judge_settings("someone/some-model") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        '"judge"',
        "{}",
        '{"judge": {}, "token_id_a": 1, "token_id_b": 2}',
        '{"judge": {"p": {"user": "no place for responses", "assistant": "x"}}}',
    ],
)
def test_a_broken_judge_file_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "judge.json").write_text(content)
    with pytest.raises(ModelError, match=r"judge\.json is not a judge file") as caught:
        load_judge_settings(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_judge_file_lacking_or_garbling_a_letter_is_refused(
    tmp_path: Path, encoder: ChatEncoder, templates: JudgeTemplates
) -> None:
    path = save_judge_settings(tmp_path, encoder, templates, (1, 2))
    content = json.loads(path.read_text())
    for broken in (None, "A", [1]):
        path.write_text(json.dumps({**content, "token_id_b": broken}))
        with pytest.raises(ModelError, match="not a judge file"):
            load_judge_settings(tmp_path)


# -- values for the chat template ------------------------------------------------------------------


@pytest.fixture
def stern(saved_judge: Path, tokenizer: Any) -> Path:
    """A judge that was taught with a value for its chat template."""
    encoder = ChatEncoder(tokenizer, TOLD, chat_template_kwargs={"tone": "stern"})
    templates = JudgeTemplates(TEMPLATES)
    save_judge_settings(saved_judge, encoder, templates, encoder.letter_ids(templates))
    return saved_judge


def said(encoder: ChatEncoder) -> str:
    """How the prompt of one question begins."""
    return encoder.tokenizer.decode(encoder.encode_prompt(ASKED))[:8]


def test_whoever_loads_a_judge_gives_its_chat_template_the_same_values(
    stern: Path, make: Make, tmp_path: Path
) -> None:
    from self_judge.models import load_model

    assert said(Judge.from_pretrained(stern, device="cpu").encoder) == "stern: <"
    assert said(JudgeChoice(str(stern)).load().encoder) == "stern: <"
    run = load_run(
        ROOT / "configs" / "hh_self_judge.yaml", [f"model.model_name_or_path={stern}"], "self_judge"
    )
    assert said(self_judge_chat_setup(run)[0]) == "stern: <"
    trainer = make(model=load_model(stern), judge_templates=None)
    assert said(trainer.encoder) == "stern: <"
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert said(Judge.from_pretrained(tmp_path / "trained", device="cpu").encoder) == "stern: <"


def test_values_in_a_run_file_win_over_the_saved_ones_one_by_one(stern: Path) -> None:
    saved = load_judge_settings(stern)
    assert saved is not None
    tokenizer = JudgeChoice(str(stern)).load().encoder.tokenizer
    mild = encoder_as_taught(tokenizer, saved, chat_template_kwargs={"tone": "mild"})
    assert said(mild) == "mild: <|"
    more = encoder_as_taught(tokenizer, saved, chat_template_kwargs={"other": [1, None]})
    assert said(more) == "stern: <"
    assert more.chat_template_kwargs == {
        "enable_thinking": False,
        "tone": "stern",
        "other": [1, None],
    }


def test_a_run_file_gives_values_to_the_chat_template(base: Path) -> None:
    run = load_run(
        ROOT / "configs" / "hh_jsft.yaml",
        [
            f"model.model_name_or_path={base}",
            f"templates.chat={json.dumps(TOLD)}",
            "templates.chat_template_kwargs={tone: kind}",
        ],
        "jsft",
    )
    assert said(jsft_chat_setup(run)[0]) == "kind: <|"


def test_a_judge_file_from_before_values_were_kept_still_loads(stern: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stern, tmp_path / "older")
    content = json.loads((folder / "judge.json").read_text())
    del content["chat_template_kwargs"]
    (folder / "judge.json").write_text(json.dumps(content))
    assert said(Judge.from_pretrained(folder, device="cpu").encoder) == "plain: <"


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}])
def test_a_value_that_no_file_can_keep_is_refused_before_training(
    tokenizer: Any, value: object
) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs must be plain JSON values"):
        ChatEncoder(tokenizer, chat_template_kwargs={"tools": value})

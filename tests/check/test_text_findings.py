"""What `self-judge check` and a run say about clocks in templates and data rendered before."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import CHATML, ROOT
from run_overrides import given as held_out
from run_overrides import one_step
from self_judge.check.check import Report, check
from self_judge.commands.train import run_jsft, run_self_judge
from self_judge.config.schema import load_run
from self_judge.prompting import chat_encoder
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.training.setup import jsft_chat_setup, self_judge_chat_setup

JSFT = str(ROOT / "configs" / "hh_jsft.yaml")
TRAIN = str(ROOT / "configs" / "hh_self_judge.yaml")
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
KEY = "templates.chat_template_kwargs.strftime_now"


def given(model: Path, source: Path, *more: str) -> list[str]:
    return held_out(model, source, "dataset.held_out=0.0", *more)


def small(output: Path, section: str) -> list[str]:
    saves = ("training_args.save_strategy=steps", "training_args.save_steps=1")
    return one_step(output, section, *saves, "training_args.eval_strategy=no")


def told(report: Report, level: str) -> list[str]:
    return [f"{f.about}: {f.text}" for f in report.findings if f.level == level]


@pytest.fixture
def today(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The day on which encoders are made."""

    class Today(chat_encoder.datetime.date):
        day = "2026-03-05"

        @classmethod
        def today(cls) -> Any:
            return chat_encoder.datetime.date.fromisoformat(cls.day)

    class Module:
        date = Today

    monkeypatch.setattr(chat_encoder, "datetime", Module)
    return Today


def test_a_template_that_reads_the_clock_is_told_of_with_its_date(
    base: Path, data: dict[str, Path], today: Any
) -> None:
    chat = f"templates.chat={json.dumps(DATED)}"
    [said] = [x for x in told(check(JSFT, given(base, data["hh"], chat)), "note") if KEY in x]
    assert "contain the date 2026-03-05. Set this key" in said
    chosen = given(base, data["hh"], chat, f"{KEY}='2026-01-02'")
    [said] = [x for x in told(check(JSFT, chosen), "note") if KEY in x]
    assert "contain the date 2026-01-02" in said
    assert not [x for x in told(check(JSFT, given(base, data["hh"])), "note") if "clock" in x]


def test_a_run_its_continuation_and_its_successors_share_one_date(
    base: Path, data: dict[str, Path], tmp_path: Path, today: Any
) -> None:
    overrides = [
        *given(base, data["hh"], f"templates.chat={json.dumps(DATED)}"),
        *small(tmp_path / "jsft", "jsft_args"),
    ]
    run_jsft(load_run(JSFT, overrides, "jsft"))
    for folder in (tmp_path / "jsft", tmp_path / "jsft" / "checkpoint-1"):
        saved = load_judge_settings(folder)
        assert saved is not None
        assert saved.chat_template_kwargs["strftime_now"] == "2026-03-05"
    today.day = "2026-03-06"
    for resume, date in (
        ("true", "2026-03-05"),
        (tmp_path / "jsft" / "checkpoint-1", "2026-03-05"),
        ("null", "2026-03-06"),
    ):
        more = [*overrides, f"training_args.resume_from_checkpoint={resume}"]
        encoder, _ = jsft_chat_setup(load_run(JSFT, more, "jsft"))
        assert encoder.chat_template_kwargs["strftime_now"] == date
    train = [
        *given(tmp_path / "jsft", data["hh"], "self_judge_args.max_new_tokens=4"),
        *small(tmp_path / "policy", "self_judge_args"),
    ]
    policy = run_self_judge(load_run(TRAIN, train, "self_judge"))
    trained = load_judge_settings(policy)
    assert trained is not None
    assert trained.chat_template_kwargs["strftime_now"] == "2026-03-05"
    other = [*train, f"{KEY}='2026-03-07'"]
    assert "is '2026-03-07', but was '2026-03-05' in the model's training" in "\n".join(
        told(check(TRAIN, other), "problem")
    )


def test_a_judge_file_without_a_date_is_warned_of(
    base: Path, data: dict[str, Path], tmp_path: Path, today: Any
) -> None:
    overrides = [
        *given(base, data["hh"], f"templates.chat={json.dumps(DATED)}"),
        *small(tmp_path / "jsft", "jsft_args"),
    ]
    run_jsft(load_run(JSFT, overrides, "jsft"))
    content = json.loads((tmp_path / "jsft" / "judge.json").read_text())
    del content["chat_template_kwargs"]["strftime_now"]
    (tmp_path / "jsft" / "judge.json").write_text(json.dumps(content))
    asked = given(tmp_path / "jsft", data["hh"])
    report = check(TRAIN, asked)
    assert "does not contain the date" in "\n".join(told(report, "warning"))
    assert "strftime_now" not in "\n".join(told(report, "problem"))
    known = check(TRAIN, [*asked, f"{KEY}='2026-03-05'"])
    assert "does not contain the date" not in "\n".join(told(known, "warning"))
    encoder, _ = self_judge_chat_setup(
        load_run(TRAIN, [*asked, f"{KEY}='2026-03-05'"], "self_judge")
    )
    assert encoder.chat_template_kwargs["strftime_now"] == "2026-03-05"


# -- data that was rendered before -----------------------------------------------------------------


def pairs(path: Path, spoiled: dict[int, dict[str, str]], count: int = 8) -> Path:
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"{i} is a number.", "rejected": f"{i} is a < b."}
        for i in range(count)
    ]
    for i, changes in spoiled.items():
        rows[i] |= changes
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("field", "text", "marker"),
    [
        ("chosen", "<|im_start|>assistant\nyes<|im_end|>\n", "<|im_start|>"),
        ("rejected", "yes<|im_end|>", "<|im_end|>"),
        ("prompt", "<|im_start|>user\nWhat?<|im_end|>", "<|im_start|>"),
        ("chosen", "yes<|eot_id|>", "<|eot_id|>"),  # rendered for another model
        ("chosen", "[INST] what [/INST] yes", "[INST]"),
        ("rejected", "<start_of_turn>model\nno", "<start_of_turn>"),
        ("chosen", "yes<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("rejected", "<|turn>model\nno<turn|>", "<|turn>"),
        ("rejected", "no<turn|>", "<turn|>"),
    ],
)
def test_data_rendered_before_is_warned_of_with_its_first_record(
    base: Path, tmp_path: Path, field: str, text: str, marker: str
) -> None:
    source = pairs(tmp_path / "rendered.jsonl", {3: {field: text}, 6: {field: text + "!"}})
    report = check(JSFT, given(base, source))
    [said] = [x for x in told(report, "warning") if "rendered already" in x]
    assert "2 of 8 records have turn markers" in said
    assert f"The first is {marker!r} in " in said
    assert "rendered.jsonl, record 3" in said
    assert "\n" not in said


def test_a_run_counts_them_in_one_line(base: Path, tmp_path: Path) -> None:
    source = pairs(tmp_path / "rendered.jsonl", {5: {"chosen": "yes<|im_end|>"}})
    stream = io.StringIO()
    overrides = [*given(base, source), *small(tmp_path / "jsft", "jsft_args")]
    run_jsft(load_run(JSFT, overrides, "jsft"), Console(file=stream, width=1000))
    [line] = [x for x in stream.getvalue().splitlines() if "rendered already" in x]
    assert "warning: 1 of 8 records have turn markers in their texts" in line
    assert "record 5" in line


def test_plain_data_with_brackets_is_not_warned_of(base: Path, tmp_path: Path) -> None:
    harmless = {"chosen": "<b>a</b> | [x] <think>", "rejected": "user assistant [INST <|"}
    source = pairs(tmp_path / "plain.jsonl", {2: harmless})
    assert "rendered already" not in "\n".join(told(check(JSFT, given(base, source)), "warning"))


@pytest.mark.parametrize(("longer", "warned"), [(24, True), (12, False), (1, True)])
def test_lengths_that_tell_the_better_response_are_warned_of(
    longer: int, warned: bool, base: Path, tmp_path: Path
) -> None:
    rejected = {i: {"chosen": "yes", "rejected": "n" if i < longer else "n" * 9} for i in range(24)}
    source = pairs(tmp_path / "x.jsonl", rejected, 24)
    said = [x for x in told(check(JSFT, given(base, source)), "warning") if "length alone" in x]
    share = {24: "100%", 1: "4%"}.get(longer)
    assert len(said) == warned
    assert all(f"longer in {share} of the pairs, so the judge may learn" in x for x in said)

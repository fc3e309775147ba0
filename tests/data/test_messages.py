"""Messages with more than a role and a text, and turns with more than one header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from self_judge import ChatEncoder
from self_judge.cli import main
from self_judge.data.benchmarks import BenchmarkSource, read_comparisons
from self_judge.data.dialogues import parse_dialogue
from self_judge.data.files import placed
from self_judge.data.sources import PreferenceData, read_prompts, select_records
from self_judge.errors import DataError, EncodingError
from self_judge.prompting.thoughts import answer_of

CALL = {"type": "function", "function": {"name": "search", "arguments": "{}"}}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def row(answer: dict[str, Any], asked: Any = "Why?", *before: dict[str, Any]) -> dict[str, Any]:
    """A preference record with a given chosen message."""
    return {
        "prompt": [*before, message("user", asked)],
        "chosen": [answer],
        "rejected": [message("assistant", "No.")],
    }


GOOD = row(message("assistant", "Because."))
BAD = {
    "tool_calls": row(message("assistant", "Because.", tool_calls=[CALL])),
    "tool_calls (no content)": row(message("assistant", None, tool_calls=[CALL])),
    "function_call": row(message("assistant", "", function_call=CALL["function"])),
    "tool_call_id": row(
        message("assistant", "Because."), "Why?", message("tool", "3", tool_call_id="x")
    ),
    "name": row(message("assistant", "Because."), "Why?", message("tool", "3", name="search")),
    "content of type 'image_url'": row(
        message("assistant", "Because."), [*text("Why?"), {"type": "image_url", "image_url": "x"}]
    ),
}


def selected(rows: Iterable[dict[str, Any]], label: str, **options: Any) -> PreferenceData:
    """What is selected of records that come from no file."""
    return select_records(placed(label, rows), label=label, **options)


@pytest.mark.parametrize("reason", BAD)
def test_a_message_that_is_more_than_text_is_skipped_and_counted(reason: str) -> None:
    why = f"a message with {reason.partition(' (')[0]}"
    data = selected([GOOD, BAD[reason], GOOD], label="x")
    assert [record.index for record in data.records] == [0, 2]
    assert data.counts[f"skipped record: {why}"] == 1
    assert f"1  skipped record: {why}" in data.describe()
    with pytest.raises(DataError, match=f"skipped record: {why}: 1"):
        selected([BAD[reason]], label="x")


def test_two_answers_that_differ_in_their_calls_are_not_identical() -> None:
    same = {**GOOD, "chosen": [message("assistant", "No.", tool_calls=[CALL])]}
    data = selected([GOOD, same], label="x")
    assert "skipped pair: identical responses" not in data.counts


def test_empty_keys_as_arrow_writes_them_are_no_keys() -> None:
    rows = [GOOD, row(message("assistant", "Because.", tool_calls=None, name=None))]
    rows += [row(message("assistant", text("Be", "cause."), tool_calls=[], images=[]))]
    rows += [Dataset.from_list([row(message("assistant", "Because.", name=None))])[0]]
    first, *others = selected(rows, label="x").records
    assert all((r.prompt, r.pairs) == (first.prompt, first.pairs) for r in others)


def test_text_in_parts_is_the_text_as_templates_write_it() -> None:
    parts = row(message("assistant", text("Be", "cause.")), text("Wh", "y?"))
    (whole,), (joined,) = (selected([r], label="x").records for r in (GOOD, parts))
    assert (joined.prompt, joined.demonstration) == (whole.prompt, whole.demonstration)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_an_answer_is_left_out_and_counted(key: str) -> None:
    answer = message("assistant", "Because.", **{key: "secret"})
    earlier = [message("user", "Hi"), message("assistant", "Yes?", **{key: "old"})]
    data = selected([row(answer, "Why?", *earlier), GOOD], label="x")
    assert "secret" not in str(data.records)
    assert data.counts[f"removed {key}"] == 1
    assert data.counts["pairs"] == 2


COLUMNS: dict[str, Any] = {"tools": [CALL], "images": ["a.png"], "image": "a.png"}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_record_with_tools_or_images_beside_its_messages_is_skipped_and_counted(
    column: str, tmp_path: Path, make: Any, queries: list[dict[str, Any]]
) -> None:
    plain = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    for record in (GOOD, plain):
        bad = {**record, column: COLUMNS[column]}
        data = selected([record, bad, {**record, column: None}], label="x")
        assert [r.index for r in data.records] == [0, 2]
        assert data.counts[f"skipped record: a column '{column}'"] == 1
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", column: COLUMNS[column]}))
    with pytest.raises(DataError, match=f"line 1: has {column}, which cannot be judged"):
        read_prompts(str(path))
    # TRL refuses images itself.
    with pytest.raises(ValueError, match=f"has a column '{column}'|vision-related"):
        make(train_dataset=Dataset.from_list([{"prompt": "Why?", column: COLUMNS[column]}]))


def test_columns_of_tools_without_tools_are_no_tools() -> None:
    rows = [{**GOOD, "tools": none, "images": []} for none in ([], "[]", "", None)]
    assert len(selected(rows, label="x").records) == 4


def test_an_evaluation_skips_and_counts_them_as_well(tmp_path: Path) -> None:
    from collections import Counter

    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, *BAD.values()])))
    skipped: Counter[str] = Counter()
    assert len(list(read_comparisons(BenchmarkSource(str(path)), skipped))) == 1
    assert skipped["record: a message with tool_calls"] == 2
    assert skipped.total() == len(BAD)


@pytest.mark.parametrize("command", ["judge", "tournament"])
def test_a_command_that_answers_every_line_names_the_one_it_cannot(
    command: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "in.jsonl"
    rest = {"responses": ["yes", "no"]}
    source.write_text(json.dumps({"prompt": [*BAD["name"]["prompt"]], **rest}))
    target = tmp_path / "out.jsonl"
    assert main([command, str(source), str(target), "--model", str(saved_judge)]) == 2
    error = capsys.readouterr().err
    assert "has name" in error
    assert "in.jsonl" in error
    source.write_text(json.dumps({"prompt": [message("user", text("Wh", "y?"))], **rest}))
    assert main([command, str(source), str(target), "--model", str(saved_judge)]) == 0


def test_prompts_of_a_comparison_are_read_from_parts_and_refused_with_images(
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": [message("user", text("Wh", "y?"))]}))
    assert read_prompts(str(path)) == [[message("user", "Why?")]]
    path.write_text(json.dumps({"prompt": BAD["content of type 'image_url'"]["prompt"]}))
    with pytest.raises(DataError, match=r"line 1, field 'prompt\[0\]': has content of type"):
        read_prompts(str(path))


@pytest.mark.parametrize("opening", ["<think>\n", "<think> ", "<|channel>thought\n", "[THINK] "])
def test_the_common_start_of_two_dialogues_ends_before_their_thoughts(opening: str) -> None:
    closing = {"<t": "</think>", "<|": "<channel|>", "[T": "[/THINK]"}[opening[:2]]
    pair = {
        "chosen": f"Why? {opening}The secret is one{closing}Because.",
        "rejected": f"Why? {opening}The secret is two{closing}No.",
    }
    (record,) = selected([pair], label="x").records
    assert record.prompt == (message("user", "Why?"),)
    assert answer_of(record.pairs[0].chosen) == "Because."
    assert answer_of(record.pairs[0].rejected) == "No."
    data = selected([pair, {k: v.removeprefix("Why? ") for k, v in pair.items()}], label="x")
    assert data.counts["skipped record: no common prompt"] == 1
    for between in ("", "\n\n"):  # a thought that both share
        same = {
            k: v.replace("two", "one").replace(closing, closing + between) for k, v in pair.items()
        }
        (record,) = selected([same], label="x").records
        assert record.prompt == (message("user", "Why?"),)
        assert answer_of(record.pairs[0].chosen) == "Because."


@pytest.mark.parametrize("asked", ["What does <think> mean?", "Is <think>a</think> a thought?"])
def test_a_question_about_the_markers_of_thoughts_stays_whole(asked: str) -> None:
    pair = {"chosen": f"{asked} Yes.", "rejected": f"{asked} No."}
    (record,) = selected([pair], label="x").records
    assert record.prompt == (message("user", asked),)


@pytest.mark.parametrize("role", [5, None, ["user"], {}])
def test_a_role_that_is_no_text_is_named(
    role: Any, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": [message(role, "Why?")], "responses": ["a", "b"]}))
    for command in ("judge", "tournament"):
        target = tmp_path / "out.jsonl"
        assert main([command, str(source), str(target), "--model", str(saved_judge)]) == 2
        assert "role" in capsys.readouterr().err


# -- in Python -------------------------------------------------------------------------------------


def test_the_encoder_joins_parts_and_refuses_what_it_would_lose(encoder: ChatEncoder) -> None:
    parts: Any = [message("user", text("Wh", "y?"))]
    plain: Any = [message("user", "Why?")]
    assert encoder.encode_prompt(parts) == encoder.encode_prompt(plain)
    for reason, bad in BAD.items():
        dialogue: Any = [*bad["prompt"], *bad["chosen"]]
        with pytest.raises(EncodingError) as error:
            encoder.encode_dialogue(dialogue)
        assert f"has {reason.partition(' (')[0]}: only text" in str(error.value)
    thinking: Any = [*plain, message("assistant", "Because.", reasoning_content="Hm.")]
    with pytest.raises(EncodingError, match="reasoning_content"):
        encoder.encode_dialogue(thinking)
    # Templates leave out the thoughts of earlier turns.
    without: Any = [*plain, message("assistant", "Because.")]
    assert encoder.encode_prompt([*thinking, *plain]) == encoder.encode_prompt([*without, *plain])


def test_rows_for_self_training_likewise(make: Any, queries: list[dict[str, Any]]) -> None:
    parts = [message("user", text("what is ", "it?"))]
    ids, plain = (
        make(train_dataset=Dataset.from_list([{"prompt": prompt}])).train_dataset[0]["prompt_ids"]
        for prompt in (parts, [message("user", "what is it?")])
    )
    assert ids == plain
    with pytest.raises(ValueError, match="record 0 of the train dataset: 'prompt' has a message "
                                         "with tool_call_id"):  # fmt: skip
        make(train_dataset=Dataset.from_list([{"prompt": BAD["tool_call_id"]["prompt"]}]))


# -- HH --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "kept"),
    [
        ("Human: Hello.", "Hello."),
        ("Assistant: Hello.", "Hello."),
        ("  Human:  Assistant: Hello.", "Hello."),
        ("Human:", ""),
        ("A Human: Hello.", "A Human: Hello."),
        ("Humans: Hello.", "Humans: Hello."),
        ("Hello.\nHuman: you?", "Hello.\nHuman: you?"),
    ],
)
def test_a_second_header_of_a_turn_is_removed(turn: str, kept: str) -> None:
    dialogue = f"\n\nHuman: Hi?\n\nAssistant: {turn}\n\nHuman: {turn}\n\nAssistant: x"
    assert [m["content"] for m in parse_dialogue(dialogue)] == ["Hi?", kept, kept, "x"]


def test_removed_headers_are_counted_the_prompts_once() -> None:
    prompt = "\n\nHuman: Hi?\n\nAssistant: Human: Hello.\n\nHuman: Why?\n\nAssistant: "
    rows = [
        {"chosen": prompt + "Human: Because.", "rejected": prompt + "Assistant: No."},
        {"chosen": prompt + "Human: Same.", "rejected": prompt + "Same."},
    ]
    data = selected(rows, label="x")
    assert data.counts["removed redundant header of a turn"] == 3 + 2
    assert data.counts["skipped pair: identical responses"] == 1
    assert data.records[0].pairs[0].chosen == "Because."
    assert data.records[0].pairs[0].rejected == "No."

"""The data are what they say: columns, formats, splits and datasets in memory."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from self_judge import load_preferences
from self_judge.data.benchmarks import BenchmarkSource, read_comparisons
from self_judge.data.files import read_raw
from self_judge.data.sources import PreferenceData, read_prompts
from self_judge.errors import DataError

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
WORDS = ("query", "good answer", "worse", "Réponse", "a.b", "text", "x=y", "prompt", "rejected")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parts(data: PreferenceData) -> list[tuple[Any, ...]]:
    """What is learned of each record."""
    return [(list(r.prompt), r.demonstration, [(p.chosen, p.rejected) for p in r.pairs])
            for r in data.records]  # fmt: skip


LEARNED = [([user("Why?")], "Because.", [("Because.", "No.")])]


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_columns_of_any_names_are_mapped(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    names = rng.sample(WORDS, 3)
    columns = dict(zip(("prompt", "chosen", "rejected"), names, strict=True))
    row = {column: PAIR[name] for name, column in columns.items()}
    source = {"path": write(tmp_path / "x.jsonl", row), "columns": columns}
    data = load_preferences(source)
    assert parts(data) == LEARNED
    assert not [what for what in data.counts if what.startswith("unused")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "q"}, r"x.jsonl: columns.promt: unknown; did you mean prompt\?"),
        ({"prompt": "Q"}, r"x.jsonl, line 1, field 'Q': is missing \(columns.prompt\); found"),
        ({"chosen": 3}, "columns.chosen: expected text, got a whole number 3"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    columns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", {"q": "Why?", "chosen": "Because.", "rejected": "No."})
    with pytest.raises(DataError, match=message):
        load_preferences({"path": path, "columns": columns})


@pytest.mark.parametrize("name", ["input", "instruction", "question", "query", "problem", "Frage"])
def test_another_column_of_text_is_never_passed_over_for_a_guessed_prompt(
    name: str, tmp_path: Path
) -> None:
    row = {name: "Who sat?", "chosen": "The cat sat.", "rejected": "The dog sat."}
    path = write(tmp_path / "x.jsonl", row)
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert "field 'prompt': is missing" in str(error.value)
    assert f"columns: {{prompt: {name}}}" in str(error.value)
    assert "\n" not in str(error.value)
    data = load_preferences({"path": path, "columns": {"prompt": name}})
    assert parts(data)[0][:2] == ([user("Who sat?")], "The cat sat.")


@pytest.mark.parametrize("value", ["text", ["a", "b"], [user("hi")], {"of": {"a": "model"}}])
def test_text_that_is_not_used_is_counted_by_its_column(value: Any, tmp_path: Path) -> None:
    given = [{**PAIR, "aside": value}, {**PAIR, "aside": None}, {**PAIR, "aside": " ", "n": 3}]
    data = load_preferences(write(tmp_path / "x.jsonl", *given))
    assert data.counts["unused column: aside"] == 1
    assert "unused column: aside" in data.describe()
    assert "unused column: n" not in data.counts


def test_a_column_that_a_mapping_replaces_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**PAIR, "prompt": "No!", "question": "Why?"})
    data = load_preferences({"path": path, "columns": {"prompt": "question"}})
    assert parts(data) == LEARNED
    assert data.counts["unused column: prompt (replaced)"] == 1


def test_columns_of_hh_and_ultrafeedback_that_are_not_used_are_counted(tmp_path: Path) -> None:
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rated = {"response": "x", "annotations": {"honesty": {"Rating": "3"}}}
    uf = {"instruction": "Do.", "completions": [rated]}
    for name, row in (("hh.jsonl", hh), ("uf.jsonl", uf)):
        counts = load_preferences(write(tmp_path / name, {**row, "system": "S"})).counts
        assert counts["unused column: system"] == 1


# --- what precedes the prompt ---------------------------------------------------------------------

EARLIER = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
HISTORY = [[m["content"] for m in EARLIER[i : i + 2]] for i in (0, 2)]


@pytest.mark.parametrize(
    "history", [HISTORY, EARLIER, json.dumps(HISTORY), json.dumps(EARLIER), str(EARLIER)]
)
@pytest.mark.parametrize(
    "pair",
    [
        PAIR,
        {"chosen": [user("Why?"), assistant("Because.")], "rejected": [user("Why?"),
         assistant("No.")]},
    ],
)  # fmt: skip
def test_system_and_history_precede_the_prompt(
    history: Any, pair: dict[str, Any], tmp_path: Path
) -> None:
    row = {**pair, "system": "Be kind.", "history": history}
    data = load_preferences(write(tmp_path / "x.jsonl", row))
    system = {"role": "system", "content": "Be kind."}
    assert parts(data) == [([system, *EARLIER, user("Why?")], *LEARNED[0][1:])]
    asked = {"prompt": "Why?", "system": "Be kind.", "history": history}
    assert read_prompts(write(tmp_path / "p.jsonl", asked)) == [[system, *EARLIER, user("Why?")]]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"history": "She said hello."}, "history"),
        ({"history": "[" * 100_000}, "history"),
        ({"history": [["only a question"]]}, "history"),
        ({"history": {"q": "a"}}, "history[0].role"),
        ({"system": ["S"]}, "system"),
        ({"prompt": [{"role": "system", "content": "T"}, user("Why?")], "system": "S"}, "system"),
    ],
)
def test_context_that_cannot_be_used_is_refused(
    more: dict[str, Any], field: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", {**PAIR, **more})
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert f"line 1, field '{field}': " in str(error.value)


def test_an_instruction_is_joined_with_its_input(tmp_path: Path) -> None:
    given = [{"instruction": "Add.", "input": "1 1"}, {"instruction": "Add.", "input": ""}]
    path = write(tmp_path / "x.jsonl", *given, {"instruction": "Add."})
    assert read_prompts(path) == [[user("Add.\n\n1 1")], [user("Add.")], [user("Add.")]]


# --- messages in other forms ----------------------------------------------------------------------


def forms(message: dict[str, str]) -> list[Any]:
    """One message in all forms that people have."""
    listed = [message]
    return [listed, message, json.dumps(listed), json.dumps(message), str(listed),
            json.dumps(json.dumps(listed)), " " + json.dumps(listed, indent=1)]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_single_messages_and_messages_as_text_are_messages(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    row = {
        "prompt": rng.choice([*forms(user("Why?")), "Why?"]),
        "chosen": rng.choice([*forms(assistant("It's so.")), "It's so."]),
        "rejected": rng.choice([*forms(assistant("No.")), "No."]),
    }
    data = load_preferences(write(tmp_path / "x.jsonl", row))
    assert parts(data) == [([user("Why?")], "It's so.", [("It's so.", "No.")])]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ('[{"role": "assistant", "content": "cut of', "looks like messages as text, but is not"),
        ("[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]", "not JSON"),
        ('[{"from": "gpt", "value": "x"}]', "field 'chosen[0].role': is missing"),
        ('[{"role": "bot", "content": "x"}]', "field 'chosen[0].role': is 'bot'"),
        ({"role": "user", "content": "x"}, "field 'chosen': ends with role 'user'"),
    ],
)
def test_messages_as_text_that_cannot_be_read_are_not_learned_as_text(
    chosen: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.jsonl", {**PAIR, "chosen": chosen})
    with pytest.raises(DataError) as error:
        load_preferences(path)
    assert message in str(error.value)


@pytest.mark.parametrize("answer", ['{"role": "admin", "id": 3}', "[1, 2]", "{}", '[{"a": 1}]'])
def test_json_that_is_an_answer_remains_text(answer: str, tmp_path: Path) -> None:
    data = load_preferences(write(tmp_path / "x.jsonl", {**PAIR, "chosen": answer}))
    assert parts(data)[0][1] == answer


def openai(**more: Any) -> dict[str, Any]:
    return {
        "input": {"messages": [user("Why?")], "tools": [], "parallel_tool_calls": True, **more},
        "preferred_output": [assistant("Because.")],
        "non_preferred_output": [assistant("No.")],
    }


def test_openais_preference_data_is_read_and_its_tools_are_not_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", openai(), openai(tools=[{"type": "function"}]))
    data = load_preferences(path)
    assert parts(data) == LEARNED
    assert data.counts["skipped record: a column 'tools'"] == 1
    (compared,) = read_comparisons(BenchmarkSource(write(tmp_path / "y.jsonl", openai())))
    texts = (compared.comparison.response_a, compared.comparison.response_b)
    assert texts["ab".index(compared.label)] == "Because."


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz", "x.tsv.gz", "X.CSV"])
@pytest.mark.parametrize("seed", range(3))
def test_tables_give_the_texts_that_were_written(name: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    pieces = ["Why", ",", '"', "\n", "\t", ";", "é", " ", "'", "😀", "\\", "a" * 200_000]
    rows = [
        {column: f"{column}{''.join(rng.choices(pieces, k=6))}{i}." for column in PAIR}
        for i in range(5)
    ]
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(PAIR), delimiter="\t" if "tsv" in name else ",")
        table.writeheader()
        table.writerows(rows)
    content = plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_raw(str(tmp_path / name))) == rows
    assert len(load_preferences(str(tmp_path / name)).records) == 5


def test_messages_in_a_table_are_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "good answer", "rejected", "score_chosen", "score_rejected"])
        table.writerow([[user("Why?")], json.dumps([assistant("Because.")]), "No.", "2", "1.5"])
    columns = {"prompt": "question", "chosen": "good answer"}
    assert parts(load_preferences({"path": str(path), "columns": columns})) == LEARNED


def test_a_table_with_semicolons_is_read_like_one_with_commas(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b;\n c?", "chosen": 'ja, "ä"', "rejected": "no"}]
    for delimiter in ",;":
        path = tmp_path / "x.csv"
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, rows[0], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
        assert list(read_raw(str(path))) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1\n", "x.csv, line 3: expected 2 values, as in the header"),
        ('a,b\n"1\n1",2\n1,2,3\n', "x.csv, line 4: expected 2 values"),
        ("a,b,a\n1,2,3\n", "x.csv, line 1: two columns are named 'a'; rename one"),
        ("a,\n1,2\n", "x.csv, line 1: a column has no name: name or remove it"),
        ('a,b\n1,2\n"1"x,2\n', "x.csv, line 3: not a valid table"),
        ('a,b\n1,"2\n', "x.csv, line 2: not a valid table (unexpected end of data)"),
        ("a,b\n", "x.csv: the file has no records"),
        ("", "x.csv: the file has no records"),
    ],
)
def test_a_damaged_table_gets_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        list(read_raw(str(path)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- folders --------------------------------------------------------------------------------------

SPLITS = ("train_prefs", "test_prefs", "train_sft", "test_sft", "train_gen")
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: parts/a*
  - split: odd
    path: [parts/b.jsonl, parts/c.jsonl]
- config_name: other
  data_files: parts/c*
---
# A dataset
"""


@pytest.mark.parametrize(
    "name", ["{}.jsonl", "{}-00000-of-00001.jsonl", "data/{}-00000-of-00002.jsonl"]
)
def test_the_split_names_of_the_hub_stay_apart(name: str, tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path / name.format(split), {**PAIR, "prompt": split})
    write(tmp_path / "dataset_infos.json", {"default": {}})
    for split in SPLITS:
        data = load_preferences({"path": str(tmp_path), "split": split})
        assert [r.prompt[0]["content"] for r in data.records] == [split]
    with pytest.raises(DataError, match=r"no file for split 'train'; found splits: .*train_prefs"):
        load_preferences(str(tmp_path))


def prompts_of(folder: Path, **options: Any) -> list[str]:
    return [record["prompt"] for record in read_raw(str(folder), **options)]


def test_a_dataset_card_names_the_files_as_for_load_dataset(tmp_path: Path) -> None:
    for name in ("a0", "a1", "b", "c"):
        write(tmp_path / "parts" / f"{name}.jsonl", {**PAIR, "prompt": name})
    (tmp_path / "README.md").write_text(CARD)
    for options in ({}, {"split": "odd"}, {"name": "other"}):
        ours = prompts_of(tmp_path, **options)
        split = options.get("split", "train")
        hub = datasets.load_dataset(
            str(tmp_path), options.get("name"), split=split, cache_dir=str(tmp_path / "cache")
        )
        assert sorted(ours) == sorted(hub["prompt"])
    with pytest.raises(DataError, match="no configuration 'x'; set name to one of: default, other"):
        prompts_of(tmp_path, name="x")
    with pytest.raises(DataError, match="no file for split 'test'; found splits: odd, train"):
        prompts_of(tmp_path, split="test")


def test_descriptions_and_hidden_files_are_not_data(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    for name in ("._train.jsonl", ".train.jsonl", "dataset_infos.json", "dataset_info.json"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 not data")
    assert len(load_preferences(str(tmp_path)).records) == 1
    write(tmp_path / "bench" / "one" / "a.jsonl", PAIR)
    (tmp_path / "bench" / "one" / "._a.jsonl").write_bytes(b"\x00\xff")
    assert len(list(read_comparisons(BenchmarkSource(str(tmp_path / "bench"))))) == 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_git_lfs_pointer_is_named_as_one(name: str, inside: bool, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match=rf"{name}: a git-lfs pointer .*: git lfs pull$"):
        load_preferences(str(tmp_path) if inside else str(tmp_path / name))


# --- datasets in memory ---------------------------------------------------------------------------


def test_a_dataset_in_memory_is_a_source(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list([PAIR])
    both = datasets.DatasetDict(train=dataset, test=dataset.select([]))
    swapped = {"path": dataset, "columns": {"chosen": "rejected", "rejected": "chosen"}}
    for given in (dataset, [dataset], both, dataset.to_iterable_dataset(), {"path": dataset}):
        assert parts(load_preferences(given)) == LEARNED
    file = write(tmp_path / "x.jsonl", PAIR)
    data = load_preferences([dataset, swapped, file])
    assert [part[1] for part in parts(data)] == ["Because.", "No.", "Because."]
    assert list(data.counts_by_source) == ["dataset 0 in memory", "dataset 1 in memory", file]
    assert read_prompts(dataset) == [[user("Why?")]]
    assert len(list(read_comparisons(BenchmarkSource(dataset)))) == 1


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_a_dataset_of_any_format_gives_plain_values(format: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}
    plain = datasets.Dataset.from_list([row])
    streamed = datasets.IterableDatasetDict(train=plain.to_iterable_dataset())
    for given in (plain.with_format(format), streamed):
        (record,) = load_preferences(given).records
        assert record.demonstration == "a"
        assert not record.pairs  # its scores are read


def test_what_is_no_source_is_refused_without_printing_it() -> None:
    secret = "do not print me" * 20
    for given in ([{"path": "x", "nope": secret}], [{"nope": secret}], 5, [5], [None]):
        with pytest.raises(DataError) as error:
            load_preferences(given)  # type: ignore[arg-type]
        assert len(str(error.value)) < 300
    both = datasets.DatasetDict(dev=datasets.Dataset.from_list([PAIR]))
    with pytest.raises(DataError, match=r"no split 'train'; it has dev"):
        load_preferences(both)


# --- shares of little data ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_share_of_little_data_may_be_empty_but_training_data_may_not(
    share: float, rows: int
) -> None:
    given = datasets.Dataset.from_list([{**PAIR, "prompt": f"Why {i}?"} for i in range(rows)])
    held_out = load_preferences(given, subset="held_out", held_out=share)
    if len(held_out.records) < rows:
        train = load_preferences(given, held_out=share)
        assert len(train.records) + len(held_out.records) == rows
        return
    with pytest.raises(DataError, match=r"all \d usable records are held out .*set held_out to 0"):
        load_preferences(given, held_out=share)


def test_a_source_without_a_held_out_record_leaves_those_of_the_others(tmp_path: Path) -> None:
    small = write(tmp_path / "s.jsonl", PAIR)
    large = write(tmp_path / "l.jsonl", *[{**PAIR, "prompt": f"Why {i}?"} for i in range(80)])
    data = load_preferences([small, large], subset="held_out", held_out=0.1)
    assert {record.source for record in data.records} == {large}
    assert data.counts_by_source[small]["other subset"] == 1


# --- labeled comparisons --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [("1", "2", "0"), ("model_a", "model_b", "draw"), ("b", "a", "")]
)
def test_labels_are_mapped_by_their_values(values: tuple[str, str, str], tmp_path: Path) -> None:
    given = [
        {"q": "Why?", "one": "Because.", "two": "No.", "who": int(v) if v.isdigit() else v}
        for v in values
    ]
    columns = {"prompt": "q", "response_a": "one", "response_b": "two", "label": "who"}
    labels = dict(zip(("label.a", "label.b", "label.tie"), values, strict=True))
    path = write(tmp_path / "x.jsonl", *given)
    found = list(read_comparisons(BenchmarkSource(path, columns={**columns, **labels})))
    assert [pair.label for pair in found] == ["a", "b", "tie"]
    texts = {(p.comparison.context, p.comparison.response_a) for p in found}
    assert texts == {("Why?", "Because.")}
    del labels["label.tie"]
    with pytest.raises(DataError, match=r"line 3, field 'label': is .*, expected one of"):
        list(read_comparisons(BenchmarkSource(path, columns={**columns, **labels})))

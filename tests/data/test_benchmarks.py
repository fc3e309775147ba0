"""Judge benchmarks in their own formats -> labeled comparisons."""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED
from self_judge.data.benchmarks import BenchmarkSource, read_comparisons
from self_judge.data.labeled_pairs import LabeledComparison
from self_judge.errors import DataError


def read(
    path: Path, *records: dict[str, Any], skipped: Counter[str] | None = None, **options: Any
) -> list[LabeledComparison]:
    if records:
        path.write_text("\n".join(map(json.dumps, records)))
    return list(read_comparisons(BenchmarkSource(str(path), **options), skipped))


def better(pair: LabeledComparison) -> str:
    c = pair.comparison
    return {"a": c.response_a, "b": c.response_b}[pair.label]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def test_llmbar_keeps_the_order_of_its_outputs(file: Path) -> None:
    given = {"input": "Why?", "output_1": "No.", "output_2": "Because.", "label": 2}
    (pair,) = read(file, given)
    assert (pair.comparison.response_a, pair.label) == ("No.", "b")
    assert pair.comparison.context == "Why?"


def test_pandalm_goes_by_the_majority_and_has_ties(file: Path) -> None:
    common = {"instruction": "Fix it", "input": "a b", "response1": "x", "response2": "y"}
    votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (0, 1, 2)]
    records = [
        {**common, **{f"annotator{i}": v for i, v in enumerate(own, start=1)}} for own in votes
    ]
    skipped: Counter[str] = Counter()
    pairs = read(file, *records, skipped=skipped)
    assert [pair.label for pair in pairs] == ["a", "b", "tie"]
    assert pairs[0].comparison.context == "Fix it\n\na b"
    assert skipped == {"no majority among the annotators": 1}


def test_mt_bench_votes_show_the_dialogue_after_the_first_question(file: Path) -> None:
    def dialogue(side: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": f"{text}{side if role == 'assistant' else ''}"}
            for role, text in zip(
                ["user", "assistant"] * 2, ["Q1", "first ", "Q2", "second "], strict=True
            )
        ]

    vote = {"conversation_a": dialogue("a"), "conversation_b": dialogue("b"), "judge": "x"}
    one, two, tie = read(
        file,
        {**vote, "winner": "model_b", "turn": 1},
        {**vote, "winner": "model_a", "turn": 2},
        {**vote, "winner": "tie", "turn": 2},
    )
    assert (one.comparison.context, one.comparison.response_b) == ("Q1", "first b")
    assert (one.label, one.subset) == ("b", "turn 1")
    assert two.comparison.context == "Q1"
    assert two.comparison.response_a == "first a\n\nHuman: Q2\n\nAssistant: second a"
    assert [two.label, tie.label] == ["a", "tie"]


def test_reward_bench_and_hhh_name_their_subsets(tmp_path: Path) -> None:
    (one,) = read(
        tmp_path / "rewardbench.jsonl",
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "subset": "chat", "id": 3},
    )
    (two,) = read(
        tmp_path / "hhh.jsonl",
        {"source": "honest", "instruction": "Why?", "chosen": "Because.", "rejected": "No."},
    )
    targets = {"choices": ["No.", "Because."], "labels": [0, 1]}
    (three,) = read(tmp_path / "hub.jsonl", {"input": "Why?", "targets": targets})
    assert [p.subset for p in (one, two, three)] == ["chat", "honest", ""]
    assert [better(p) for p in (one, two, three)] == ["Because."] * 3
    assert {p.comparison.context for p in (one, two, three)} == {"Why?"}


def test_what_is_named_better_is_not_always_shown_first(file: Path) -> None:
    records = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(200)]
    pairs = read(file, *records)
    assert [better(p) for p in pairs] == ["yes"] * 200
    assert 70 < sum(p.label == "a" for p in pairs) < 130
    assert [p.digest for p in pairs] == [p.digest for p in read(file)]


def test_hh_dialogues_and_skipped_pairs_are_counted(file: Path) -> None:
    skipped: Counter[str] = Counter()
    (pair,) = read(
        file,
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes",
        },
        skipped=skipped,
    )
    assert (pair.comparison.context, better(pair)) == ("Hi", "Yes")
    assert skipped == {"pair: identical responses": 1}


_DIALOGUE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
_OTHER = [_DIALOGUE[0], {"role": "assistant", "content": "y"}]
_AB = {"response_a": "x", "response_b": "y"}


@pytest.mark.parametrize(
    "record",
    [
        {"input": "q", "output_1": "x", "output_2": "y", "label": 1},
        {
            **{"instruction": "q", "response1": "x", "response2": "y"},
            **{"annotator1": 1, "annotator2": 1, "annotator3": 0},
        },
        {"question": "q", "response_A": "x", "response_B": "y", "label": "A>B", "source": "s"},
        {"conversation_a": _DIALOGUE, "conversation_b": _OTHER, "winner": "model_a"},
        {"prompt": "q", **_AB, "winner": "model_a"},
        {"prompt": "q", **_AB, "label": "a", "subset": "s"},
        {"prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"},
        {"prompt": "q", "chosen": ["x"], "rejected": ["y"], "subset": "Math"},
        {"prompt": "q", "chosen": ["x"], "rejected": ["y"], "subset": "Ties", "id": "ref:1"},
        {"input": "q", "targets": {"choices": ["x", "y"], "labels": [1, 0]}},
        {"instruction": "q", "chosen": "x", "rejected": "y"},
    ],
)
def test_every_benchmark_names_the_columns_with_text_that_it_does_not_use(
    record: dict[str, Any], file: Path
) -> None:
    skipped: Counter[str] = Counter()
    assert read(file, {**record, "aside": "text", "number": 1}, skipped=skipped)
    assert skipped == {"column 'aside'": 1}


def test_a_folder_of_folders_has_a_subset_each(tmp_path: Path) -> None:
    for name in ("Natural", "Adversarial/Manual"):
        (tmp_path / name).mkdir(parents=True)
        given = [{"input": "q", "output_1": "x", "output_2": "y", "label": 1}]
        (tmp_path / name / "dataset.json").write_text(json.dumps(given))
    assert [p.subset for p in read(tmp_path)] == ["Adversarial/Manual", "Natural"]
    assert [p.subset for p in read(tmp_path, data_dir="Natural")] == [""]
    given = {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Yes",
        "rejected": "\n\nHuman: Hi\n\nAssistant: No",
    }
    for split in ("train", "test"):
        read(tmp_path / f"Natural/{split}.jsonl", given)
    (tmp_path / "Natural/dataset.json").unlink()
    pairs = read(tmp_path)
    assert [p.subset for p in pairs] == ["Adversarial/Manual", "Natural"]
    assert pairs[1].source.endswith("test.jsonl")


def test_one_file_in_two_forms_is_not_read_twice(tmp_path: Path) -> None:
    pair = {"response_a": "a", "response_b": "b", "label": "a", "prompt": "q"}
    (tmp_path / "easy").mkdir()
    assert len(read(tmp_path / "easy" / "pairs.jsonl", pair)) == 1
    (tmp_path / "easy" / "pairs.json").write_text(json.dumps([pair]))
    with pytest.raises(DataError, match=r"pairs\.json and pairs\.jsonl look like one file in two"):
        read(tmp_path)


def test_parts_of_a_file_in_a_folder_data_are_one_subset(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(3):
        given = {"prompt": f"{i}?", "chosen": "x", "rejected": "y", "subset": "abc"[i]}
        read(tmp_path / f"data/test-0000{i}-of-00003.jsonl", given)
    read(tmp_path / "data/train-00000-of-00001.jsonl", {"prompt": "q", "chosen": "x"} | given)
    assert [(p.comparison.context, p.subset) for p in read(tmp_path)] == [
        ("0?", "a"),
        ("1?", "b"),
        ("2?", "c"),
    ]
    with pytest.raises(DataError, match="no file for split validation; found splits: test, train"):
        read(tmp_path, splits=("validation",))


def test_several_splits_are_subsets(tmp_path: Path) -> None:
    for split in ("train", "test"):
        read(tmp_path / f"{split}.jsonl", {"prompt": split, "chosen": "x", "rejected": "y"})
    assert [p.subset for p in read(tmp_path, splits=("test", "train"))] == ["test", "train"]
    assert [p.subset for p in read(tmp_path)] == [""]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"input": "q", "output_1": "x", "output_2": "y", "label": 3},
            "line 1, field 'label': expected 1 or 2, got 3",
        ),
        ({"a": 1}, "cannot detect the kind of data from the columns .* LLMBar"),
        ({"input": "q", "targets": {"choices": ["x"], "labels": [1]}}, "one 0 and one 1"),
        (
            {"conversation_a": [], "conversation_b": [], "winner": "nobody"},
            "expected model_a, model_b, tie or both_bad, got 'nobody'",
        ),
        (
            {"conversation_a": [], "conversation_b": [], "winner": "tie"},
            "field 'conversation_a': expected a question and an answer for turn 1",
        ),
        *(
            (
                {"conversation_a": [], "conversation_b": [], "winner": "tie", "turn": turn},
                f"field 'turn': expected an integer of at least 1, got {turn!r}",
            )
            for turn in (0, -1, 1.5, "second")
        ),
        (
            {"conversation_a": "no list", "conversation_b": [], "winner": "tie"},
            "field 'conversation_a': expected a list, or one as JSON, got no list",
        ),
        (
            {"prompt": "[]", "response_a": "[]", "response_b": "[]", "winner_model_a": 1,
             "winner_model_b": 1, "winner_tie": 0},
            "expected one 1 and two 0 in .* got \\[1.0, 1.0, 0.0\\]",
        ),
        (
            {"prompt": '["q", "r"]', "response_a": '["x"]', "response_b": '["y", "z"]',
             "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            "field 'response_a': expected 2 answers, got 1",
        ),
        (
            {"question": "q", "response_A": "x", "response_B": "y", "label": "A"},
            "line 1, field 'label': expected 'A>B' or 'B>A', got 'A'",
        ),
        (
            {"prompt": "q", "chosen": ["x"] * 3, "rejected": ["y"] * 2, "domain": "chat"},
            "field 'rejected': expected three styles, got 2",
        ),
        (
            {"prompt": "q", "chosen": ["x", "z"], "rejected": ["y"], "subset": "Math"},
            "field 'chosen': expected one response, got 2",
        ),
        (
            {"prompt": "q", "chosen": ["x"], "rejected": [], "subset": "Math"},
            "field 'rejected': expected at least one response, got none",
        ),
        (
            {"prompt": "q", "chosen": ["x"], "rejected": ["y", None], "subset": "Math"},
            "field 'rejected\\[1\\]': expected text, got NoneType",
        ),
        (
            {"prompt": "q", "chosen": ["x"], "rejected": ["y"], "subset": "Ties", "id": "7"},
            "field 'id': expected ref:N or tied:N in the subset Ties, got '7'",
        ),
        (
            {"prompt": "q", "chosen": ["x"], "rejected": ["y"], "kind": "Math"},
            "needs a column domain .* or subset .* found \\['chosen', 'kind', 'prompt', 'reject",
        ),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(record: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(file, record)


def test_subsets_of_a_benchmark_have_one_spelling(file: Path) -> None:
    three = {"prompt": "q", "chosen": ["x"] * 3, "rejected": ["y"] * 3}
    domains = ["safety", "Safety", " SAFETY-Refuse", "safety-response", "Chat", "Law"]
    pairs = read(file, *({**three, "domain": domain} for domain in domains))
    assert [p.subset for p in pairs[::9]] == ["safety"] * 4 + ["chat", "Law"]
    one = {"prompt": "q", "chosen": ["x"], "rejected": ["y"], "id": "ref:1"}
    subsets = ["Precise IF", "precise if", "MATH", "ties", "Mathematics"]
    pairs = read(file, *({**one, "subset": subset} for subset in subsets))
    assert [p.subset for p in pairs] == ["Precise IF"] * 2 + ["Math", "Ties", "Mathematics"]
    assert pairs[3].part == "ref:1"
    two = {"question": "q", "response_A": "x", "response_B": "y", "label": "A>B"}
    sources = ["MMLU-Pro-law", "livebench-math", "LiveCodeBench"]
    pairs = read(file, *({**two, "source": source} for source in sources))
    assert [p.subset for p in pairs] == ["mmlu-pro", "livebench-math", "livecodebench"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not beside this checkout")
def test_the_real_benchmarks_are_read_to_the_last_pair() -> None:
    def counted(path: str) -> tuple[Counter[str], Counter[str]]:
        pairs = read(SHARED / "data" / path)
        return Counter(p.subset for p in pairs), Counter(p.label for p in pairs)

    subsets, _ = counted("llmbar/LLMBar")
    assert sum(subsets.values()) == 419
    assert subsets["Adversarial/Neighbor"] == 134
    _, labels = counted("pandalm/testset-v1.json")
    assert labels == {"tie": 105, "a": 422, "b": 472}
    subsets, _ = counted("hhh-alignment/pairs.jsonl")
    assert subsets == {"helpful": 59, "honest": 61, "other": 43}
    assert sum(counted("llmbar/Processed/MT-Bench/dataset.json")[0].values()) == 200
    assert sum(counted("hh-rlhf/base_test_1000.jsonl.gz")[0].values()) > 980
    assert sum(counted("ultrafeedback/binarized_eval_200.jsonl.gz")[0].values()) > 150


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
@pytest.mark.parametrize(
    ("column", "value", "rejected", "benchmark", "pairs"),
    [
        ("domain", "chat", 3, "RM-Bench", 9),
        ("subset", "Focus", 4, "RewardBench 2", 4),
        ("subset", "Focus", 0, "", 1),
        ("note", "chat", 3, "", 1),
    ],
)
def test_responses_in_a_table_are_lists_only_where_a_benchmark_has_lists(
    write: Any, column: str, value: str, rejected: int, benchmark: str, pairs: int, tmp_path: Path
) -> None:
    better = [f'it\'s "good", {i}' for i in range(3 if column != "subset" else 1)]
    worse = write([f"bad, {i}" for i in range(rejected)]) if rejected else "bad"
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "chosen", "rejected", column])
        rows.writerow(["q", write(better), worse, value])
    found = list(read_comparisons(BenchmarkSource(str(table))))
    assert {pair.benchmark for pair in found} == {benchmark}
    assert len(found) == pairs
    shown = [pair.comparison for pair in found]
    texts = {text for pair in shown for text in (pair.response_a, pair.response_b)}
    assert texts == ({*better, *ast.literal_eval(worse)} if benchmark else {write(better), worse})

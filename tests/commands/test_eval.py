"""`self-judge eval`: from a benchmark's file to a table, JSON and a page."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from conftest import TEMPLATES
from report_pages import embedded
from self_judge import Comparison, Verdict
from self_judge.cli import main
from self_judge.commands.eval import JudgeEvaluation, run_eval
from self_judge.data.benchmarks import BenchmarkSource
from self_judge.data.sources import load_preferences
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.voting import aggregate
from self_judge.reporting.collect import collect


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Two subsets, in LLMBar's layout and format."""
    for name, count in (("Natural", 6), ("Adversarial/Manual", 5)):
        folder = tmp_path / "bench" / name
        folder.mkdir(parents=True)
        records = [
            {
                "input": f"what is {i}?",
                "output_1": f"no {name[:i]}",
                "output_2": "the capital",
                "label": 1 + i % 2,
            }
            for i in range(count)
        ]
        (folder / "dataset.json").write_text(json.dumps(records))
    return tmp_path / "bench"


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())


def test_an_evaluation_leaves_numbers_verdicts_and_a_table(
    benchmark: Path, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    command = ["eval", str(benchmark), "--model", str(saved_judge), "--output", str(output)]
    assert main(command) == 0
    told = results(output)
    assert told["overall"]["pairs"] == 11
    assert {name: r["pairs"] for name, r in told["subsets"].items()} == {
        "Adversarial/Manual": 5,
        "Natural": 6,
    }
    rows = [json.loads(line) for line in (output / "verdicts.jsonl").read_text().splitlines()]
    right = sum(
        1.0 if row["verdict"]["preferred"] == row["label"] else 0.0 for row in rows
    ) + 0.5 * sum(row["verdict"]["preferred"] is None for row in rows)
    assert told["overall"]["accuracy"]["value"] == pytest.approx(right / 11)
    assert set(told["overall"]["principles"]) == {"helpful", "honest"}
    assert told["pairs_per_second"] > 0
    printed = capsys.readouterr().out
    for word in ("Natural", "longer", "reliability", "Fleiss", "pairs per second"):
        assert word in printed
    # Once more: nothing is judged again, the same numbers come out.
    before = (output / "verdicts.jsonl").stat().st_mtime_ns
    assert main(command) == 0
    assert (output / "verdicts.jsonl").stat().st_mtime_ns == before
    assert results(output) == told


def test_in_a_narrow_terminal_names_break_between_words_and_no_number_is_cut(
    benchmark: Path,
    saved_judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    names = ("overall", "helpfulness", "honesty", "instruction_following", "truthfulness")
    user = "{context} {response_a} {response_b} "
    judge = {n: {"user": user + n, "assistant": "It is"} for n in names}
    templates = tmp_path / "templates.yaml"
    templates.write_text(json.dumps({"templates": {"judge": judge}}))
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "out"
    command = ["eval", str(benchmark), "--model", str(saved_judge), "--output", str(output)]
    assert main([*command, "--templates", str(templates)]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    words = set(re.findall(r"[a-z]+", printed))
    assert {part for name in names for part in name.split("_")} <= words
    told = results(output)
    for report in (told["overall"], *told["subsets"].values()):
        assert f"{report['calibration']['ece']:.3f}" in printed
    for accuracy in told["overall"]["principles"].values():
        low, high = accuracy["ci95"]
        assert f"{accuracy['value']:.3f}" in printed
        assert f"{low:.3f}–{high:.3f}" in printed
    for pair in told["overall"]["principle_agreement"]["pairwise"]:
        assert f"({pair['kappa']:.2f})" in printed


def test_two_judges_are_compared_pair_by_pair(
    benchmark: Path, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    def command(name: str, other: Path) -> list[str]:
        output = str(tmp_path / name)
        model = ["--model", str(saved_judge), "--compare", str(other)]
        return ["eval", str(benchmark), "--output", output, *model]

    assert main(command("itself", saved_judge)) == 0
    paired = results(tmp_path / "itself")["compared_with"]["paired"]
    assert paired["overall"]["difference"]["value"] == 0
    assert paired["overall"]["mcnemar_p"] == 1
    assert set(paired["subsets"]) == {"Natural", "Adversarial/Manual"}
    # What an earlier evaluation wrote is read, not judged again.
    assert main(command("again", tmp_path / "itself")) == 0
    assert results(tmp_path / "again")["compared_with"]["paired"] == paired
    assert not (tmp_path / "again" / "compared").exists()
    (overall, *_) = collect([tmp_path / "again"]).paired
    assert overall["name"] == f"again · all against {saved_judge}"
    assert overall["difference"] == paired["overall"]["difference"]
    assert "McNemar" in capsys.readouterr().out
    (benchmark / "Natural" / "dataset.json").unlink()
    assert main(command("fewer", tmp_path / "itself")) == 2
    assert "have different pairs: evaluate" in capsys.readouterr().err


def test_judges_are_compared_though_the_data_was_divided_otherwise(
    saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) for i in range(4)]
    parts = {"whole": rows, "first": rows[:2], "second": rows[2:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))

    def command(output: str, *names: str) -> list[str]:
        sources = [str(tmp_path / f"{name}.jsonl") for name in names]
        return ["eval", *sources, "--model", str(saved_judge), "--output", str(tmp_path / output)]

    assert main(command("one", "whole")) == 0
    assert main([*command("two", "first", "second"), "--compare", str(tmp_path / "one")]) == 0
    assert set(results(tmp_path / "two")["compared_with"]["paired"]["subsets"]) == {
        "first.jsonl",
        "second.jsonl",
    }
    assert "McNemar" in capsys.readouterr().out


def test_what_else_lies_in_the_folder_is_no_matter(
    benchmark: Path, saved_judge: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").write_text("no run's\n{}\n")
    (output / "other.jsonl").write_text('{"bracket": [], "responses": []}\n')
    command = ["eval", str(benchmark), "--model", str(saved_judge), "--output", str(output)]
    assert main(command) == 0
    judges = embedded((output / "report.html").read_text(encoding="utf-8"))["judges"]
    assert judges[0]["name"] == f"out ({saved_judge})"


def test_several_sources_and_a_limit(benchmark: Path, saved_judge: Path, tmp_path: Path) -> None:
    other = tmp_path / "rewards.jsonl"
    rows = [
        {"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "subset": "chat"} for i in range(9)
    ]
    other.write_text("\n".join(map(json.dumps, rows)))
    sources = [str(benchmark), str(other)]
    output = tmp_path / "out"
    assert main(["eval", *sources, "--model", str(saved_judge), "--output", str(output),
                 "--max-pairs", "3"]) == 0  # fmt: skip
    told = results(output)["subsets"]
    assert {name: r["pairs"] for name, r in told.items()} == {
        "bench/Adversarial/Manual": 2,
        "bench/Natural": 1,
        "rewards.jsonl/chat": 3,
    }


def test_only_held_out_records_of_training_data_are_evaluated(
    benchmark: Path,
    saved_judge: Path,
    data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind in ("hh", "preference", "ultrafeedback"):
        output = tmp_path / kind
        command = ["eval", str(data[kind]), "--model", str(saved_judge), "--output", str(output)]
        assert main([*command, "--held-out", "0.2"]) == 0
        held_out = load_preferences(str(data[kind]), subset="held_out", held_out=0.2).records
        assert results(output)["overall"]["pairs"] == sum(len(r.pairs) for r in held_out) > 0
        assert results(output)["skipped"]["record: not held out from training"] > 0
    command = ["eval", str(benchmark), "--model", str(saved_judge), "--output", str(tmp_path / "b")]
    assert main([*command, "--held-out", "0.2"]) == 2
    assert "--held-out is only for preference data" in capsys.readouterr().err


def loaded_by(page: str) -> list[str | None]:
    """What the elements of a page load; scripts are not searched."""
    loaded: list[str | None] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            loaded.extend(v for k, v in attrs if k in ("src", "href") and v != "#main")

    Elements().feed(page)
    return loaded


def test_the_page_needs_no_network_and_runs_nothing_from_the_data(
    benchmark: Path, saved_judge: Path, tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    source = tmp_path / "hostile.jsonl"
    source.write_text(
        json.dumps({"prompt": "q", "chosen": "x", "rejected": "yy", "subset": hostile})
    )
    output = tmp_path / "out"
    assert main(["eval", str(source), "--model", str(saved_judge), "--output", str(output)]) == 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<script>alert(1)") == 0
    assert "<img src=x" not in page
    assert not loaded_by(page)
    shown = embedded(page)["judges"]
    assert [judge["name"] for judge in shown] == [f"out ({saved_judge})", f"out · {hostile}"]
    told = results(output)
    for judge, numbers in zip(shown, (told["overall"], told["subsets"][hostile]), strict=True):
        assert judge["undecidable"] == numbers["undecidable"]["share"]
        for key in set(judge) - {"name", "undecidable"}:
            assert judge[key] == numbers[key], key


def test_without_plotly_there_are_numbers_and_a_word_on_what_to_install(
    benchmark: Path,
    saved_judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr("self_judge.reporting.page.plotly_is_there", lambda: False)
    output = tmp_path / "out"
    command = ["eval", str(benchmark), "--model", str(saved_judge), "--output", str(output)]
    assert main(command) == 0
    assert "pip install 'self-judge[report]'" in capsys.readouterr().out
    assert not (output / "report.html").exists()


class Fake:
    """A judge that costs nothing: the longer response wins in one order, the first in the other."""

    thought_tokens = 0

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [
            aggregate([((0.6, 0.3), (0.5, 0.3 + 0.01 * (len(c.response_a) % 7)))] * len(TEMPLATES))
            for c in comparisons
        ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_number_of_pairs(
    saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JudgeChoice, "load", lambda self: Fake())

    def peak(n: int) -> int:
        source = tmp_path / f"{n}.jsonl"
        with source.open("w") as file:
            for i in range(n):
                row = {"prompt": f"{i}?", "chosen": "y" * (i % 50 + 1), "rejected": "no " * 9}
                file.write(json.dumps(row) + "\n")
        tracemalloc.start()
        run_eval(
            JudgeChoice(str(saved_judge)),
            JudgeEvaluation([BenchmarkSource(str(source))]),
            tmp_path / f"out{n}",
        )
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)  # what is imported and cached once
    few, many = peak(1_000), peak(10_000)
    assert many < few + 200_000, f"{few:,} bytes with 1,000 pairs, {many:,} with 10,000"


def test_datasets_in_memory_are_evaluated_and_a_source_counts_once(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(2)]
    sources = [BenchmarkSource(Dataset.from_list(rows)), BenchmarkSource(str(tmp_path / "x.jsonl"))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run_eval(JudgeChoice(str(saved_judge)), JudgeEvaluation(sources), tmp_path / "out")
    assert [source["path"] for source in told["data"]] == ["dataset in memory", sources[1].path]
    assert list(told["subsets"]) == ["dataset in memory", "x.jsonl"]
    twice = [str(sources[1].path)] * 2
    command = ["eval", *twice, "--model", str(saved_judge), "--output", str(tmp_path / "two")]
    assert main(command) == 2
    assert "x.jsonl: the source is given twice" in capsys.readouterr().err


def test_data_without_a_pair_to_judge_is_named_with_the_reasons(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"prompt": "q", "response_a": "x", "response_b": "x", "label": "a"}
    (tmp_path / "x.jsonl").write_text(json.dumps(same))
    model = ["--model", str(saved_judge), "--output", str(tmp_path / "out")]
    assert main(["eval", str(tmp_path / "x.jsonl"), *model]) == 2
    reason = "x.jsonl: no pair can be judged (pair: identical responses: 1)"
    assert reason in capsys.readouterr().err
    assert main(["eval", "", *model]) == 2
    assert "data is empty: give a value" in capsys.readouterr().err

"""`self-judge compare`: two policies, the same prompts, a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from report_pages import embedded
from self_judge.cli import main


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what is {i}?"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def responses(path: Path, texts: list[str], **more: Any) -> Path:
    path.write_text("\n".join(json.dumps({"output": text, **more}) for text in texts))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_models_answer_and_the_pairs_are_written(
    saved_judge: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out"
    model = str(saved_judge)
    command = ["compare", model, model, "--prompts", str(prompts), "--judge", model,
               "--output", str(output), "--max-new-tokens", "6",
               "--sampling-batch-size", "4"]  # fmt: skip
    assert main(command) == 0
    pairs = lines(output / "pairs.jsonl")
    told = json.loads((output / "results.json").read_text())
    assert [pair["index"] for pair in pairs] == list(range(6))
    assert any(pair["response_a"] != pair["response_b"] for pair in pairs)
    wins = [{"a": 1, "b": 0, None: 0.5}[pair["verdict"]["preferred"]] for pair in pairs]
    assert told["win_rate"]["value"] == pytest.approx(sum(wins) / 6)
    assert told["wins"] + told["ties"] + told["losses"] == 6
    assert "length-controlled" in capsys.readouterr().out
    (shown,) = embedded((output / "report.html").read_text(encoding="utf-8"))["comparisons"]
    assert shown["win_rate"] == told["win_rate"]
    # Sampling goes on where it was, and gives the same.
    sampled = output / "responses_b.jsonl"
    whole = sampled.read_bytes()
    sampled.write_bytes(whole[: len(whole) * 3 // 4])
    assert main(command) == 0
    assert sampled.read_bytes() == whole


def test_given_responses_need_no_policy(saved_judge: Path, prompts: Path, tmp_path: Path) -> None:
    a = responses(tmp_path / "a.jsonl", ["no"] * 6)
    b = responses(tmp_path / "b.jsonl", ["no"] * 3 + ["the capital"] * 3)
    output = tmp_path / "out"
    command = ["compare", str(a), str(b), "--prompts", str(prompts), "--judge", str(saved_judge)]
    assert main([*command, "--output", str(output)]) == 0
    told = json.loads((output / "results.json").read_text())
    assert told["ties"] >= 3  # equal responses
    assert told["characters"]["a"]["value"] == 2
    assert told["longer_wins_all"]["value"] == pytest.approx(1.5 / 6)
    assert told["finished"] == {"a": None, "b": None}
    both = told["both_orders"]
    assert both["wins"] + both["ties"] + both["losses"] == 6


def test_responses_that_bring_their_prompts_need_no_prompt_file(
    saved_judge: Path, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    for path, text in ((a, "no"), (b, "the capital")):
        path.write_text(json.dumps([{"instruction": "what is it?", "output": text}]))
    command = ["compare", str(a), str(b), "--judge", str(saved_judge)]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert len(lines(tmp_path / "out" / "pairs.jsonl")) == 1


def test_responses_to_other_or_fewer_prompts_are_refused(
    saved_judge: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    a = responses(tmp_path / "a.jsonl", ["no"] * 6)
    judge = ["--judge", str(saved_judge), "--output", str(tmp_path / "out")]
    few = responses(tmp_path / "few.jsonl", ["no"] * 2)
    assert main(["compare", str(a), str(few), "--prompts", str(prompts), *judge]) == 2
    assert "2 responses for 6 prompts" in capsys.readouterr().err
    other = responses(tmp_path / "other.jsonl", ["no"] * 6, prompt="something else?")
    assert main(["compare", str(a), str(other), "--prompts", str(prompts), *judge]) == 2
    assert "differs from the prompt at the same index" in capsys.readouterr().err
    torn = responses(tmp_path / "torn.jsonl", ["no"] * 6, finished="yes")
    assert main(["compare", str(a), str(torn), "--prompts", str(prompts), *judge]) == 2
    assert "torn.jsonl, line 1, field 'finished': expected true, false" in capsys.readouterr().err
    for option in ("--sampling-batch-size", "--max-prompts", "--batch-size", "--max-length"):
        assert main(["compare", str(a), str(a), *judge, option, "0"]) == 2
        assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
    assert main(["compare", str(saved_judge), str(saved_judge), *judge]) == 2
    assert "--prompts FILE" in capsys.readouterr().err

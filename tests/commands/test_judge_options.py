"""--judge of every command: models, endpoints, servers and panels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TEMPLATES, tiny_llama
from fake_openai import FakeOpenAI, serving
from fake_vllm import FakeVLLM
from fake_vllm import serving as serving_vllm
from judge_pairs import PAIRS
from self_judge import ChatEncoder, Judge
from self_judge.cli import main


@pytest.fixture
def endpoint(encoder: ChatEncoder, saved_judge: Path) -> Iterator[FakeOpenAI]:
    """The saved judge's model, with letters that are among its most likely tokens."""
    model = tiny_llama(len(encoder.tokenizer), initializer_range=0.1)
    judge = Judge(model, encoder, TEMPLATES)
    asked = [p for pair in PAIRS for p in (pair, pair.swapped())]
    chats = [judge.templates.render(name, pair) for name in TEMPLATES for pair in asked]
    prompts = [encoder.encode_open(chat) for chat in chats]
    with torch.no_grad():
        ends = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts]
        usual = torch.stack(ends).mean(0)
        model.lm_head.weight[list(judge.letter_ids)] += 20 * usual / usual.square().sum()
    model.save_pretrained(saved_judge)
    with serving(FakeOpenAI(model, encoder)) as server:
        server.most = 20
        yield server


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [{"context": p.context, "response_a": p.response_a, "response_b": p.response_b}
             for p in PAIRS]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def llmbar(tmp_path: Path) -> Path:
    """Two subsets in LLMBar's layout and format."""
    for name in ("Natural", "Adversarial"):
        folder = tmp_path / "LLMBar" / name
        folder.mkdir(parents=True)
        lines = [
            {"input": p.context, "output_1": p.response_a, "output_2": p.response_b, "label": 1 + i}
            for i, p in enumerate(PAIRS[:2])
        ]
        (folder / "dataset.json").write_text(json.dumps(lines))
    return tmp_path / "LLMBar"


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    path = tmp_path / "templates.yaml"
    path.write_text(json.dumps({"templates": {"judge": TEMPLATES}}))
    return path


def verdicts(path: Path) -> list[Any]:
    return [json.loads(line)["verdict"] for line in path.read_text().splitlines()]


def judged(judge: str, pairs: Path, *options: str) -> list[Any]:
    output = pairs.with_name("judged.jsonl")
    words = ["judge", str(pairs), str(output), "--judge", judge, *options, "--overwrite"]
    assert main(words) == 0
    return verdicts(output)


def test_a_model_and_the_endpoint_that_serves_it_are_judges_of_the_same_mind(
    endpoint: FakeOpenAI, saved_judge: Path, templates: Path, pairs: Path
) -> None:
    given = f"{{endpoint: '{endpoint.url}'}}"
    ours = judged(str(saved_judge), pairs)
    theirs = judged(given, pairs, "--templates", str(templates))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["preferred"] == other["preferred"]
        for name in TEMPLATES:
            expected = torch.tensor(mine["probabilities"][name])
            assert expected.min() > 0
            assert torch.tensor(other["probabilities"][name]).allclose(expected, atol=1e-4)


def test_llmbar_is_evaluated_with_a_model_and_an_endpoint_side_by_side(
    endpoint: FakeOpenAI, saved_judge: Path, templates: Path, llmbar: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = tmp_path / "endpoint.yaml"
    other.write_text(f"endpoint: {endpoint.url}\ntemplates: {templates}\nmodel: served\n")
    words = ["eval", str(llmbar), "--judge", str(saved_judge), "--compare", str(other)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    theirs = results["compared_with"]
    assert theirs["judge"]["endpoint"] == endpoint.url
    assert set(results["subsets"]) == {"Natural", "Adversarial"}
    assert theirs["overall"]["accuracy"]["value"] == results["overall"]["accuracy"]["value"]
    assert theirs["overall"]["letter_mass"] == pytest.approx(
        results["overall"]["letter_mass"], abs=1e-4
    )
    assert results["thought_tokens_per_pair"] is None


def test_an_evaluation_says_what_thoughts_cost_beside_what_they_gain(
    saved_judge: Path, llmbar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinks = f"{{model: {saved_judge}, answer_after_thought: true, thought_tokens: 4}}"
    words = ["eval", str(llmbar), "--judge", thinks, "--compare", str(saved_judge)]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 < results["thought_tokens_per_pair"] <= 2 * 2 * 4
    assert results["compared_with"]["thought_tokens_per_pair"] is None
    assert "tokens per pair" in capsys.readouterr().out


def test_a_panel_is_evaluated_with_its_members_as_votes(
    endpoint: FakeOpenAI, saved_judge: Path, templates: Path, llmbar: Path, tmp_path: Path
) -> None:
    members = f"{{model: {saved_judge}}}, {{endpoint: '{endpoint.url}'}}, {{model: {saved_judge}}}"
    words = ["eval", str(llmbar), "--judge", f"{{panel: [{members}]}}", "--output"]
    assert main([*words, str(tmp_path / "out"), "--templates", str(templates)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    names = {f"{m}/{p}" for m in ("judge", "127.0.0.1", "judge-2") for p in TEMPLATES}
    assert set(results["overall"]["principles"]) == names
    assert results["judge"]["model"] == "panel of judge, 127.0.0.1, judge-2"
    assert results["overall"]["principle_agreement"]


def test_a_tournament_and_a_comparison_take_an_endpoint_as_the_judge(
    endpoint: FakeOpenAI, saved_judge: Path, templates: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judge = ["--judge", f"{{endpoint: '{endpoint.url}'}}", "--templates", str(templates)]
    given = tmp_path / "in.jsonl"
    given.write_text(json.dumps({"context": "Why?", "responses": ["So.", "Because.", "No."]}))
    assert main(["tournament", str(given), str(tmp_path / "out.jsonl"), *judge]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["winner"] in (0, 1, 2)
    given.write_text(json.dumps({"prompt": "Why?"}))
    assert main(["tournament", str(given), str(tmp_path / "no.jsonl"), *judge]) == 2
    assert "pass --policy" in capsys.readouterr().err
    ours, theirs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    ours.write_text(json.dumps({"instruction": "Why?", "output": "So."}))
    theirs.write_text(json.dumps({"instruction": "Why?", "output": "Because."}))
    words = ["compare", str(ours), str(theirs), *judge, "--output", str(tmp_path / "compared")]
    assert main(words) == 0


def test_another_judge_does_not_continue_a_file(
    endpoint: FakeOpenAI, saved_judge: Path, templates: Path, pairs: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    judged(str(saved_judge), pairs)
    output = str(pairs.with_name("judged.jsonl"))
    thinks = f"{{model: {saved_judge}, answer_after_thought: true}}"
    for other in (f"{{endpoint: '{endpoint.url}', templates: {templates}}}", thinks):
        assert main(["judge", str(pairs), output, "--judge", other]) == 2
        assert "different settings (" in capsys.readouterr().err


def test_replicas_judge_under_keys_as_under_the_option(saved_judge: Path, pairs: Path) -> None:
    with serving_vllm(FakeVLLM()) as fake:
        keys = judged(f"{{model: {saved_judge}, server: '{fake.url}'}}", pairs)
        option = judged(str(saved_judge), pairs, "--vllm-server", fake.url)
    assert keys == option


MISTAKES = {
    "{endpoint": "--judge: not valid YAML",
    "{}": "it names no judge",
    "{panel: [{}, {}]}": "names no judge",
    "{endpoint: 'http://127.0.0.1:9/v1'}": "is an endpoint, which has no templates",
    "no.yaml": "no.yaml",
    "{modle: x}": "modle: unknown; did you mean model?",
}


@pytest.mark.parametrize(("judge", "said"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_in_the_judge_is_one_line(
    judge: str, said: str, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", str(pairs), str(pairs.with_name("o.jsonl")), "--judge", judge]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line

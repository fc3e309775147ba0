"""`self-judge tournament`: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TEMPLATES
from self_judge.cli import main
from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import stable_seed
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_comes_back_in_order_with_its_winner(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        {"context": f"what is {i}?", "responses": [f"no {k}" for k in range(i + 1)], "id": i}
        for i in range(5)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, given)) + "\n\n")
    assert main(["tournament", str(source), str(target), "--model", str(saved_judge)]) == 0
    got = lines(target)
    assert [line["id"] for line in got] == list(range(5))
    for line, own in zip(got, given, strict=True):
        assert line["responses"] == own["responses"]
        assert line["response"] == own["responses"][line["winner"]]
    again = tmp_path / "again.jsonl"
    main(["tournament", str(source), str(again), "--model", str(saved_judge)])
    assert again.read_text() == target.read_text()
    longer = sum(
        len(line["response"]) > sum(map(len, line["responses"])) / len(line["responses"])
        for line in got
    )
    assert (
        f"the winner is longer than the mean response in {longer / 5:.0%}"
        in capsys.readouterr().err.split(f"{again}: 5 tournaments with 15 responses")[1]
    )


def test_prompts_without_responses_are_answered_first(saved_judge: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [{"prompt": "what is it?"}, {"prompt": [{"role": "user", "content": "and you?"}]}]
    source.write_text("\n".join(map(json.dumps, given)))
    command = ["tournament", str(source), str(target), "--model", str(saved_judge), "--n", "3"]
    assert main([*command, "--max-new-tokens", "4", "--brackets"]) == 0
    for line in lines(target):
        assert len(line["responses"]) == 3
        matches = [match for played in line["bracket"] for match in played]
        assert sum(match["b"] is not None for match in matches) == 2
        assert line["bracket"][-1][0]["winner"] == line["winner"]
        assert all(
            len(match["probabilities"]) == len(line["principles"])
            for match in matches
            if match["probabilities"]
        )


def test_a_prior_weighs_the_mean_log_probability_of_each_sample(
    saved_judge: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"what is {i}?"}) for i in range(6)))
    command = ["tournament", str(source), "--model", str(saved_judge), "--n", "4", "--brackets"]
    command += ["--max-new-tokens", "6", "--prior"]

    def played(weight: str) -> list[dict[str, Any]]:
        target = tmp_path / f"{weight}.jsonl"
        assert main([command[0], command[1], str(target), *command[2:], weight]) == 0
        return lines(target)

    judge = Judge.from_pretrained(saved_judge)
    settings = SamplingSettings(max_new_tokens=6, top_p=0.9)
    sampler = TransformersSampler(judge.model, judge.encoder, settings)
    prompts = [
        judge.encoder.encode_prompt([{"role": "user", "content": f"what is {i}?"}])
        for i in range(6)
    ]
    sampled = sampler.sample(prompts, 4, [stable_seed(0, "sample", i + 1) for i in range(6)])
    sums = sampler.log_probs(prompts, sampled)
    judged, weighed, ruled = played("0"), played("2"), played("1000")
    for line, own, log_probs in zip(weighed, sampled, sums, strict=True):
        assert line["responses"] == [r.text for r in own]
        means = [p / len(r.ids) for p, r in zip(log_probs, own, strict=True)]
        assert line["prior"] == pytest.approx([2 * mean for mean in means], rel=1e-4)
    assert [line["responses"] for line in judged] == [line["responses"] for line in weighed]
    assert not any("prior" in line for line in judged)
    for line in ruled:  # so large a weight leaves the judge no say
        assert line["prior"][line["winner"]] == max(line["prior"])


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ({"context": "x", "responses": ["a", "b"]}, ["--prior", "5"],
         "line 1, field 'responses': must be absent: with --prior, responses are sampled here"),
        ({"prompt": "x", "prior": 1}, ["--prior", "5"], "line 1, field 'prior': must be absent"),
        ({"prompt": "x"}, ["--prior", "-1"], "--prior must be 0 or a positive number, got -1.0"),
        ({"prompt": "x"}, ["--prior", "nan"], "--prior must be 0 or a positive number, got nan"),
        ({"prompt": "x"}, ["--prior", "5", "--judge", "PANEL", "--policy", "JUDGE"],
         "--prior needs the log probabilities of the judge's model"),
    ],
)  # fmt: skip
def test_a_prior_that_cannot_be_computed_is_refused(
    line: dict[str, Any], options: list[str], message: str, saved_judge: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line))
    panel = f"{{panel: [{{model: {saved_judge}}}, {{model: {saved_judge}}}]}}"
    named = {"PANEL": panel, "JUDGE": str(saved_judge)}
    given = ["--judge", str(saved_judge), *(named.get(option, option) for option in options)]
    assert main(["tournament", str(source), str(target), *given]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_the_first_prompts_are_a_start_of_all(saved_judge: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given = [{"context": f"what is {i}?", "responses": ["no", "yes"]} for i in range(4)]
    source.write_text("\n".join(map(json.dumps, given)))
    command = ["tournament", str(source), str(target), "--model", str(saved_judge)]
    assert main([*command, "--max-prompts", "2"]) == 0
    first = lines(target)
    assert [line["context"] for line in first] == [entry["context"] for entry in given[:2]]
    assert main(command) == 0
    assert len(lines(target)) == 4
    assert lines(target)[:2] == first
    assert main([*command, "--max-prompts", "3"]) == 0  # there are more than enough
    assert len(lines(target)) == 4
    assert main([*command, "--max-prompts", "0"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "x", "responses": []}', "line 1, field 'responses': expected a non-empty"),
        ('{"context": "x", "responses": "y"}', "line 1, field 'responses': expected a list"),
        ('{"responses": ["y"]}', "line 1, field 'context': is missing, and so is 'prompt'"),
        ('{"context": "x"}', "line 1, field 'responses': is missing, and so is a 'prompt'"),
        ('{"context": "x", "responses": ["y"]}\n{oops', "line 2: not JSON"),
        ("[1]", "line 1: expected a JSON object"),
        ('{"prompt": 3}', "line 1, field 'prompt': expected text or a list of messages"),
        ("", "the file has no records"),
        ('{"context": "é"}', "in.jsonl: not UTF-8 text"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_nothing_is_written(
    text: str, message: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text, encoding="latin-1")
    assert main(["tournament", str(source), str(target), "--model", str(saved_judge)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_machine_and_are_known_again(
    end: str, saved_judge: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = '{"context": "x", "responses": ["y", "z"], "score": NaN}' + end
    source.write_bytes(2 * line.encode())
    command = ["tournament", str(source), str(target), "--model", str(saved_judge)]
    for _ in range(2):
        assert main(command) == 0
        assert len(target.read_text().splitlines()) == 2


def test_a_model_without_judge_json_says_what_to_do(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    source = tmp_path / "in.jsonl"
    source.write_text('{"context": "x", "responses": ["y", "z"]}')
    status = main(["tournament", str(source), "out.jsonl", "--model", str(tmp_path / "plain")])
    assert status == 2
    assert "has no judge.json" in (told := capsys.readouterr().err)
    assert "--templates FILE" in told
    templates, target = tmp_path / "templates.yaml", tmp_path / "out.jsonl"
    templates.write_text(yaml.safe_dump({"templates": {"judge": TEMPLATES}}))
    command = ["tournament", str(source), str(target), "--model", str(tmp_path / "plain")]
    assert main([*command, "--templates", str(templates), "--packing", "off"]) == 0
    assert lines(target)[0]["response"] in ("y", "z")
    one = {"templates": {"judge": {"helpful": TEMPLATES["helpful"]}}}
    templates.write_text(yaml.safe_dump(one))
    assert main([*command, "--templates", str(templates)]) == 2
    assert "templates was" in capsys.readouterr().err

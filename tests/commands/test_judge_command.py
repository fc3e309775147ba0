"""`self-judge judge`: every line comes back with its verdict, whatever interrupts the run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import TEMPLATES
from fake_vllm import FakeVLLM, serving
from self_judge import Comparison, Judge, Verdict
from self_judge.adapters import fingerprint
from self_judge.cli import main
from self_judge.commands.compare import ComparisonJob
from self_judge.commands.eval import JudgeEvaluation
from self_judge.commands.judge import run_judge
from self_judge.commands.resumable import RankShards
from self_judge.commands.tournament import TournamentJob
from self_judge.config.arguments import JUDGING, PACKING, command_parser
from self_judge.config.self_training import PackingChoice, SamplingSettings
from self_judge.data.benchmarks import BenchmarkSource
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.voting import aggregate, verdict_from_json, verdict_json


def write(path: Path, *given: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(n: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "context": f"what is {i}?", "response_a": f"no {i}", "response_b": "the capital"}
        for i in range(n)
    ]


def test_every_line_comes_back_in_order_with_the_judges_verdict(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *pairs(5),
        {"prompt": "and you?", "responses": ["yes", "no"]},
        {"prompt": [{"role": "user", "content": "and you?"}], "responses": ["no", "no"]},
    ]
    source, target = write(tmp_path / "in.jsonl", *given), tmp_path / "new" / "out.jsonl"
    assert main(["judge", str(source), str(target), "--model", str(saved_judge)]) == 0
    got = lines(target)
    assert [{k: v for k, v in line.items() if k != "verdict"} for line in got] == given
    judge = Judge.from_pretrained(saved_judge)
    (direct,) = judge.compare([Comparison("what is 0?", "no 0", "the capital")])
    verdict = got[0]["verdict"]
    assert verdict["preferred"] == direct.preferred
    assert verdict["margin"] == pytest.approx(direct.margin, abs=1e-6)
    assert list(verdict["probabilities"]) == list(TEMPLATES)
    assert got[6]["verdict"]["undecidable_because"] == "an exact tie"
    said = capsys.readouterr().err
    preferred = [line["verdict"]["preferred"] for line in got]
    assert f"{target}: 7 pairs" in said
    assert (
        f"a is preferred in {preferred.count('a')}, b in {preferred.count('b')}, neither in "
        in said
    )
    assert "14% of the pairs have no verdict, most because an exact tie" in said
    assert "the model rarely answers with a letter" in said  # it is not trained


def test_killed_at_any_moment_and_started_again_it_writes_what_it_would_have(
    saved_judge: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.jsonl", *pairs(600))
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    options = ["--model", str(saved_judge), "--chunk", "8"]
    assert main(["judge", str(source), str(whole), *options]) == 0
    command = [sys.executable, "-m", "self_judge.cli", "judge", str(source), str(target), *options]
    # Products are summed in another order by another number of threads.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=threads)
    deadline = time.monotonic() + 250
    while not target.exists() or target.stat().st_size < 2000:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = target.read_bytes()
    assert 0 < done.count(b"\n") < 600
    target.write_bytes(done + b'{"id": 999, "verd')  # as if killed within a write
    assert main(["judge", str(source), str(target), *options]) == 0
    assert target.read_bytes() == whole.read_bytes()


def test_a_finished_file_is_left_alone_and_a_longer_input_is_gone_on_with(
    saved_judge: Path, tmp_path: Path
) -> None:
    source, target = write(tmp_path / "in.jsonl", *pairs(3)), tmp_path / "out.jsonl"
    command = ["judge", str(source), str(target), "--model", str(saved_judge)]
    assert main(command) == 0
    first = target.read_bytes()
    assert main(command) == 0
    assert target.read_bytes() == first
    write(source, *pairs(5))
    assert main(command) == 0
    assert [line["id"] for line in lines(target)] == list(range(5))


def test_lines_with_what_is_no_number_are_known_again(saved_judge: Path, tmp_path: Path) -> None:
    broken = {"score": math.nan, "scores": [math.nan, {"deep": -math.inf}]}
    source = write(tmp_path / "in.jsonl", *({**pair, **broken} for pair in pairs(3)))
    target = tmp_path / "out.jsonl"
    command = ["judge", str(source), str(target), "--model", str(saved_judge)]
    assert main(command) == 0
    whole = target.read_bytes()
    target.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    assert main(command) == 0
    assert target.read_bytes() == whole


def test_a_field_that_the_input_gained_makes_it_another_one(
    saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = write(tmp_path / "in.jsonl", *pairs(2)), tmp_path / "out.jsonl"
    command = ["judge", str(source), str(target), "--model", str(saved_judge)]
    assert main(command) == 0
    write(source, *({**pair, "note": None} for pair in pairs(2)))
    assert main(command) == 2
    assert "does not match line 1 of the input" in capsys.readouterr().err


def test_another_model_template_or_input_is_refused(
    saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = write(tmp_path / "in.jsonl", *pairs(3)), tmp_path / "out.jsonl"
    command = ["judge", str(source), str(target), "--model", str(saved_judge)]
    assert main(command) == 0
    written = target.read_bytes()

    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        assert target.read_bytes() == written
        return capsys.readouterr().err

    templates = tmp_path / "templates.yaml"
    templates.write_text(yaml.safe_dump({"templates": {"judge": {"x": TEMPLATES["helpful"]}}}))
    assert "templates was" in refused(*command, "--templates", str(templates))
    weights = saved_judge / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert "weights was" in refused(*command)
    content[-100] ^= 1
    weights.write_bytes(content)
    write(source, *reversed(pairs(3)))
    assert "it does not match line 1 of the input" in refused(*command)
    write(source, *pairs(2))
    assert "has 3 lines, but its input has 2 pairs" in refused(*command)
    assert main([*command, "--overwrite"]) == 0
    assert len(lines(target)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"response_a": "x", "response_b": "y"}, "field 'context': is missing"),
        ({"context": "x", "response_a": "x"}, "field 'response_b': is missing"),
        ({"context": "x", "responses": ["x"]}, "field 'responses': expected two strings, got 1"),
        ({"context": 3, "response_a": "x", "response_b": "y"}, "expected text, got int"),
        ({**pairs(1)[0], "verdict": {}}, "--field NAME"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_before_anything_is_judged(
    line: dict[str, Any], message: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = write(tmp_path / "in.jsonl", pairs(1)[0], line), tmp_path / "out.jsonl"
    assert main(["judge", str(source), str(target), "--model", str(saved_judge)]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error
    assert message in error
    assert not target.exists() or not target.read_bytes()


def test_a_model_without_judge_json_asks_for_templates(
    saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    (saved_judge / "judge.json").unlink()
    source, target = write(tmp_path / "in.jsonl", *pairs(2)), tmp_path / "out.jsonl"
    command = ["judge", str(source), str(target), "--model", str(saved_judge)]
    assert main(command) == 2
    assert "--templates FILE" in capsys.readouterr().err
    templates = tmp_path / "templates.yaml"
    templates.write_text(yaml.safe_dump({"templates": {"judge": TEMPLATES}}))
    assert main([*command, "--templates", str(templates)]) == 0
    assert len(lines(target)) == 2
    templates.write_text("model: x\n")
    assert main([*command, "--templates", str(templates)]) == 2
    assert "templates.judge is missing" in capsys.readouterr().err


def test_verdicts_survive_as_json_whatever_they_hold(saved_judge: Path) -> None:
    judge = Judge.from_pretrained(saved_judge)
    (verdict,) = judge.compare([Comparison("what is it?", "no", "the capital")])
    told = json.loads(json.dumps(verdict_json(verdict, judge.templates.principles)))
    assert verdict_from_json(told) == verdict
    told["probabilities"]["helpful"][0][0] = None
    assert verdict_from_json(told).undecidable_because == "a score is not finite"


def test_a_copy_has_the_same_fingerprint_and_an_adapter_knows_its_base(
    saved_judge: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_judge, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy")) == fingerprint(str(saved_judge))
    assert fingerprint("owner/on-the-hub") is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(saved_judge)})
    )
    before = fingerprint(str(adapter))
    (adapter / "best.jsonl.settings.json").write_text("{}")  # an output beside the weights
    assert fingerprint(str(adapter)) == before
    (saved_judge / "config.json").write_text("{}")
    assert fingerprint(str(adapter)) != before


def test_the_command_offers_every_way_of_packing() -> None:
    assert PackingChoice.__args__ == PACKING  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "taken", "kinds"),
    [
        (
            "tournament x y --model m",
            "input output judge columns",
            (JudgeChoice, TournamentJob, SamplingSettings),
        ),
        ("judge x y --model m", "input output judge field columns", (JudgeChoice,)),
        (
            "eval x --model m --output o",
            "data output judge split data_revision compare",
            (JudgeChoice, JudgeEvaluation, BenchmarkSource),
        ),
        (
            "compare a b --judge m --output o",
            "policy_a policy_b output judge",
            (JudgeChoice, ComparisonJob, SamplingSettings),
        ),
    ],
)
def test_every_value_of_a_command_is_taken_by_what_it_runs(
    command: str, taken: str, kinds: tuple[Any, ...]
) -> None:
    """Values fill the fields of the same name: one without a field would do nothing."""
    values = vars(command_parser().parse_args(command.split()))
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    fields |= {*taken.split(), "command", "debug", "parser", "completion", "chunk", "overwrite"}
    assert set(values) <= fields, set(values) - fields


@pytest.mark.parametrize(
    "command",
    ["tournament x y --model m", "eval x --model m --output o", "compare a b --judge m --output o"],
)
def test_every_command_that_judges_takes_the_same_judge_options(command: str) -> None:
    judge = vars(command_parser().parse_args(["judge", "x", "y", "--model", "m"]))
    wanted = set(JUDGING)
    assert wanted <= judge.keys()
    other = vars(command_parser().parse_args(command.split()))
    assert {name: other[name] for name in wanted} == {name: judge[name] for name in wanted}


def test_a_mistake_in_the_templates_shows_at_once(tmp_path: Path) -> None:
    templates = tmp_path / "templates.yaml"
    templates.write_text("templates: {judge: {x: {user: hello, assistant: It is}}}")
    with pytest.raises(ValueError, match=r"templates.yaml: .*lacks \{context\}"):
        JudgeChoice("anything", templates=str(templates))


# -- several processes, and servers ----------------------------------------------------------------


def judged_by_shares(
    count: int, given: list[dict[str, Any]], target: Path, saved_judge: Path, monkeypatch: Any
) -> list[dict[str, Any]]:
    """What `count` processes write, one after the other here; the first joins last."""
    source = write(target.with_suffix(".in.jsonl"), *given)
    monkeypatch.setattr(RankShards, "join", lambda shards, settings: None)
    for own in reversed(range(count)):
        monkeypatch.setattr(
            RankShards,
            "here",
            classmethod(lambda cls, t, chunk, own=own: cls(t, chunk, count, own)),
        )
        run_judge(source, target, JudgeChoice(str(saved_judge)), chunk=3)
    if count > 1:
        settings = {**JudgeChoice(str(saved_judge)).settings(), "field": "verdict"}
        RankShards(target, 3, count, 0)._join(settings)
    return lines(target)


@pytest.mark.parametrize("total", [1, 8, 9, 20])
def test_lines_shared_out_over_processes_are_joined_in_order(
    total: int, saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = pairs(total)
    alone = judged_by_shares(1, given, tmp_path / "1.jsonl", saved_judge, monkeypatch)
    for count in (2, 3):
        target = tmp_path / f"{count}.jsonl"
        shared = judged_by_shares(count, given, target, saved_judge, monkeypatch)
        assert [line["id"] for line in shared] == [line["id"] for line in alone]
        for one, other in zip(alone, shared, strict=True):
            assert one["verdict"]["margin"] == pytest.approx(other["verdict"]["margin"], abs=1e-6)
        left = sorted(path.name for path in tmp_path.glob(f"{count}.jsonl.*"))
        assert left == [f"{count}.jsonl.settings.json"]


def test_a_share_goes_on_where_it_was_stopped_and_a_joined_file_is_left_alone(
    saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, target = pairs(20), tmp_path / "out.jsonl"
    whole = judged_by_shares(2, given, target, saved_judge, monkeypatch)
    loaded: list[int] = []
    monkeypatch.setattr(JudgeChoice, "load", lambda choice: loaded.append(1))
    source = target.with_suffix(".in.jsonl")
    assert run_judge(source, target, JudgeChoice(str(saved_judge)), chunk=3) == 20
    assert not loaded, "it was finished"
    assert lines(target) == whole


def test_processes_share_every_item_out_once() -> None:
    for count, chunk, total in ((1, 4, 10), (2, 4, 10), (3, 1, 7), (4, 5, 3), (3, 2, 12)):
        shards = [RankShards(Path("x"), chunk, count, own) for own in range(count)]
        owners = [[s.rank for s in shards if s.owns(i)] for i in range(total)]
        assert owners == [[i // chunk % count] for i in range(total)]


def test_servers_judge_in_place_of_this_process(
    saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", *pairs(40))
    monkeypatch.setattr(Judge, "from_pretrained", None)  # no model is loaded here
    outputs = []
    for count in (1, 2):
        target = tmp_path / f"{count}.jsonl"
        with serving(FakeVLLM()) as one, serving(FakeVLLM()) as other:
            asked = (one, other)[:count]
            words = ["--vllm-server", *(server.url for server in asked)]
            command = ["judge", str(source), str(target), "--model", str(saved_judge), *words]
            assert main(command) == 0
            assert all("/v1/completions" in server.paths() for server in asked)
            assert not (other.paths() and count == 1)
        outputs.append(lines(target))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 40
    assert {line["verdict"]["preferred"] for line in outputs[0]} <= {"a", "b", None}


def test_a_tournament_is_sampled_and_judged_by_servers(saved_judge: Path, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": "what is it?"},
        {"context": "who?", "responses": ["he", "she", "they"]},
    )
    target = tmp_path / "out.jsonl"
    with serving(FakeVLLM()) as server:
        command = ["tournament", str(source), str(target), "--model", str(saved_judge), "--n", "4"]
        assert main([*command, "--max-new-tokens", "8", "--vllm-server", server.url]) == 0
        sampled = [body for _, body in server.requests if "seed" in body and "logprobs" not in body]
    first, second = lines(target)
    assert len(first["responses"]) == 4
    assert len(sampled) >= 4
    assert second["response"] == ["he", "she", "they"][second["winner"]]


@pytest.mark.slow
def test_a_hundred_thousand_pairs_need_no_more_memory_than_a_thousand(
    saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quick:
        thought_tokens = 0

        def compare(self, comparisons: list[Comparison]) -> list[Verdict]:
            return [aggregate([((0.6, 0.3), (0.2, 0.7))] * 2) for _ in comparisons]

    monkeypatch.setattr(JudgeChoice, "load", lambda choice: Quick())
    choice = JudgeChoice(str(saved_judge))
    words = "and so on " * 20

    def peak(count: int) -> int:
        source, target = tmp_path / f"{count}.in.jsonl", tmp_path / f"{count}.jsonl"
        with source.open("w") as file:
            for i in range(count):
                line = {"context": f"{i} {words}", "response_a": words, "response_b": f"{i}"}
                file.write(json.dumps(line) + "\n")
        tracemalloc.start()
        assert run_judge(source, target, choice, chunk=500) == count
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    small = peak(1_000)
    assert peak(100_000) < 1.2 * small

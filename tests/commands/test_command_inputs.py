"""What `judge`, `tournament` and `compare` read: any file, resumed, and wrong lines named."""

from __future__ import annotations

import copy
import datetime
import decimal
import gzip
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CHATML, ROOT
from self_judge.cli import main

Refused = Callable[[str, dict[str, Any]], str]
PAIR = {"context": "what is it?", "responses": ["no", "the capital"]}
TURNS = [{"role": "user", "content": "what is it?"}]


def lines(path: Path) -> list[dict[str, Any]]:
    def no_number(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    texts = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [json.loads(text, parse_constant=no_number) for text in texts]


def in_lines(*given: dict[str, Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in given).encode()


def as_parquet(path: Path, *given: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [dict.fromkeys(name for line in given for name in line) | line for line in given]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def commands(saved_judge: Path, source: Path, target: Path) -> dict[str, list[str]]:
    more = [str(source), str(target), "--model", str(saved_judge), "--packing", "off"]
    return {name: [name, *more, "--chunk", "1"] for name in ("judge", "tournament")}


@pytest.fixture(params=["judge", "tournament"])
def command(request: Any) -> str:
    return str(request.param)


@pytest.fixture
def refused(saved_judge: Path, tmp_path: Path, capsys: Any) -> Refused:
    """Runs a command on a good line and another one, and returns its one line of error."""

    def run(command: str, line: dict[str, Any]) -> str:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(in_lines(PAIR) + b"\n" + in_lines(line))
        words = commands(saved_judge, source, target)[command]
        assert main([*words, "--max-new-tokens", "2"] if command == "tournament" else words) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert not target.exists(), "something was written"
        return str(told)

    return run


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("in.jsonl", lambda b: b"\xef\xbb\xbf" + b),
        ("in.jsonl.gz", gzip.compress),
        ("in.json", lambda b: b"[" + b",".join(b.splitlines()) + b"]"),
        ("in.json", lambda b: b),
        ("in.json.gz", lambda b: gzip.compress(b"\xef\xbb\xbf" + b)),
        ("in.parquet", None),
    ],
)
def test_every_format_gives_the_same(
    name: str, form: Any, command: str, saved_judge: Path, tmp_path: Path
) -> None:
    given = [{**PAIR, "id": 0}, {"prompt": "who?", "responses": ["he", "she"], "id": 1}]
    plain, source = tmp_path / "plain.jsonl", tmp_path / name
    plain.write_bytes(in_lines(*given))
    if form is None:
        as_parquet(source, *given)
    else:
        source.write_bytes(form(in_lines(*given)))
    outputs = []
    for number, path in enumerate((plain, source)):
        target = tmp_path / f"{number}.out.jsonl"
        assert main(commands(saved_judge, path, target)[command]) == 0
        outputs.append([{k: v for k, v in line.items() if v is not None} for line in lines(target)])
    assert outputs[0] == outputs[1]


def drawn(seed: int) -> Any:
    """A random value such as Parquet holds, with some that JSON has no form for."""
    lots = random.Random(seed)
    instant = datetime.datetime(2026, 1, 2, 3, 4, 5, 6 + seed, tzinfo=datetime.timezone.utc)
    leaves = [math.nan, -math.inf, 1e300, -0.0, 2**53 + 1, b"\xff\x00", "é\u2028"]
    leaves += [instant, instant.date(), instant.time()]
    leaves += [datetime.timedelta(seconds=seed), decimal.Decimal("1.10")]
    value: Any = lots.choice(leaves)
    for _ in range(lots.randrange(3)):
        value = {"deep": value} if lots.random() < 0.5 else [value, value]
    return value


@pytest.mark.parametrize("seed", range(4))
def test_what_was_accepted_once_is_resumed_and_accepted_again(
    seed: int, command: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    extra = {f"extra {k}": drawn(10 * seed + k) for k in range(4)} | {"score": math.nan}
    as_parquet(source, *({**PAIR, **extra, "id": i} for i in range(3)), {**PAIR, "id": 3})
    words = commands(saved_judge, source, target)[command]
    assert main(words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "no form for" in line]
    assert len(told) == 1
    assert "in.parquet, record 0: " in told[0]
    assert "score" in told[0]
    whole = target.read_bytes()
    assert [line["score"] for line in lines(target)] == [None] * 4
    assert main(words) == 0
    assert target.read_bytes() == whole, "it was finished"
    target.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + b'{"id": 2, "ext')
    assert main(words) == 0
    assert target.read_bytes() == whole


def test_what_json_cannot_hold_is_named_before_work(
    command: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    words = commands(saved_judge, source, target)[command]
    source.write_bytes(in_lines(PAIR) + b'{"x": ' + b"[" * 100_000)
    assert main(words) == 2
    assert "in.jsonl, line 2: not JSON (nested too deeply" in capsys.readouterr().err
    source.write_bytes(in_lines(PAIR) + b'{"x": ' + b"7" * 5_000 + b"}")
    assert main(words) == 2
    assert "in.jsonl, line 2: not JSON (a number has too many digits" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": []}, "field 'prompt': expected non-empty text"),
        ({"prompt": " \n"}, "field 'prompt': expected non-empty text"),
        ({"context": "\t"}, "field 'context': expected non-empty text"),
        ({"context": None}, "field 'context': is missing, and so is 'prompt'"),
        ({"prompt": {"role": "user"}}, "field 'prompt[0].content': is missing"),
        ({"prompt": [*TURNS, {"role": "assistant", "content": "x"}]}, "that end with a user"),
        ({"prompt": [{"role": "human", "content": "x"}]}, "is 'human', expected one of system"),
        ({"prompt": [{"role": None, "content": "x"}]}, "field 'prompt[0].role': expected text"),
        ({"prompt": [{"content": "x"}]}, "field 'prompt[0].role': is missing"),
        ({"prompt": [{"role": "user", "content": None}]}, "field 'prompt[0].content': expected"),
        ({"prompt": "a \ud800"}, "is not valid Unicode"),
        ({"context": "a \ud800"}, "field 'context': is not valid Unicode"),
        ({"responses": ["x", "\udfff"]}, "field 'responses[1]': is not valid Unicode"),
        ({"responses": ["x", None]}, "field 'responses[1]': expected text, got NoneType"),
        ({"responses": {"0": "x"}}, "field 'responses': expected a list, got dict"),
        ({"tools": [{"name": "f"}]}, "has tools"),
        ({"tools": '[{"name": "f"}]'}, "has tools"),
        ({"images": ["x.png"]}, "has images"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "'chat_template_kwargs': is not"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_written(
    line: dict[str, Any], message: str, command: str, refused: Refused
) -> None:
    whole = {k: v for k, v in PAIR.items() if k != "context" or "prompt" not in line}
    told = refused(command, {**whole, **line})
    assert "in.jsonl, line 3" in told
    assert message in told


@pytest.mark.parametrize("empty", [None, [], "[]", {}])
def test_columns_that_hold_nothing_are_no_fault(
    empty: Any, command: str, saved_judge: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    kwargs = {"chat_template_kwargs": {"enable_thinking": None}, "prompt": None, "response_a": None}
    source.write_bytes(in_lines({**PAIR, **kwargs, "tools": empty}))
    assert main(commands(saved_judge, source, target)[command]) == 0
    assert len(lines(target)) == 1


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.csv.xz", "folder", "in.fifo"])
def test_a_file_that_cannot_be_read_is_named(
    name: str, command: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    if name == "folder":
        source.mkdir()
    elif name == "in.fifo":
        os.mkfifo(source)
    else:
        source.write_bytes('{"context": "é"}'.encode("latin-1"))
    assert main(commands(saved_judge, source, target)[command]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert name in told
    assert not target.exists()


@pytest.mark.parametrize(
    "place",
    ["/dev/null", "folder", "file/out.jsonl", "pipe", "link", "note", "lost", "lost/out.jsonl",
     "circle"],
)  # fmt: skip
def test_an_output_that_is_no_file_is_refused_before_work(
    place: str, command: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / place
    source.write_bytes(in_lines(PAIR))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "note.settings.json").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    assert main(commands(saved_judge, source, target)[command]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "choose another output" in told
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("output", ["/dev/null", "file", "file/in", "lost", "pipe"])
def test_an_output_folder_that_is_none_is_refused_before_work(
    output: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    given = tmp_path / "a.jsonl"
    given.write_bytes(in_lines({"prompt": "x", "output": "y"}))
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    model, data = str(saved_judge), ["--data", str(given)]
    config = [str(ROOT / "configs" / "hh_jsft.yaml"), f"model.model_name_or_path={model}"]
    source = f"dataset.sources=[{{path: {given}}}]"
    for words in (
        ["compare", str(given), str(given), "--judge", model, "--output"],
        ["eval", str(given), "--model", model, "--output"],
        ["align", "--model", model, *data, "--output"],
        ["demo", "--output"],
        ["jsft", *config, source, "training_args.output_dir="],
    ):
        out = str(tmp_path / output)
        assert main([*words[:-1], words[-1] + out] if "=" in words[-1] else [*words, out]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "is not a folder: choose another output" in told


def test_a_prompt_that_the_chat_template_rejects_is_named_before_anything_is_sampled(
    tokenizer: Any, saved_judge: Path, refused: Refused, tmp_path: Path, capsys: Any
) -> None:
    strict = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = strict + CHATML
    two = [*TURNS, {"role": "assistant", "content": "x"}, *TURNS]
    policy = tmp_path / "policy"
    policy.mkdir()
    tokenizer.save_pretrained(policy)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(in_lines({"prompt": TURNS}) * 3 + in_lines({"prompt": two}))
    output = tmp_path / "out"
    words = ["--judge", str(saved_judge), "--output", str(output)]
    assert main(["compare", str(policy), str(policy), "--prompts", str(prompts), *words]) == 2
    told = capsys.readouterr().err
    assert "prompts.jsonl, line 4, field 'prompt'" in told
    assert "one turn only" in told
    assert not output.exists()
    target = tmp_path / "out.jsonl"
    words = ["--model", str(saved_judge), "--policy", str(policy), "--n", "2"]
    assert main(["tournament", str(prompts), str(target), *words]) == 2
    assert "prompts.jsonl, line 4, field 'prompt'" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
def test_prompts_of_a_comparison_with_values_that_nothing_uses_are_refused(
    column: str, saved_judge: Path, tmp_path: Path, capsys: Any
) -> None:
    prompts, given = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_bytes(in_lines({"prompt": "x"}, {"prompt": "x", column: {"name": "f"}}))
    given.write_bytes(in_lines({"output": "y"}, {"output": "z"}))
    words = ["compare", str(given), str(given), "--prompts", str(prompts)]
    assert main([*words, "--judge", str(saved_judge), "--output", str(tmp_path / "o")]) == 2
    told = capsys.readouterr().err
    assert "p.jsonl, line 2" in told
    assert column in told

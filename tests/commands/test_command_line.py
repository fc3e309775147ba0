"""The habits of the command line: suggestions, tracebacks, help, and inputs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from self_judge.cli import main
from self_judge.config.arguments import command_parser
from self_judge.storage import repository

RUN = str(ROOT / "configs" / "hh_jsft.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("trian x.yaml", "did you mean train?"),
        ("judge in out --modle x", "did you mean --model instead of --modle?"),
        ("judge in out --model x --chunks 3", "did you mean --chunk instead of --chunks?"),
        ("check x.yaml --exampels=3", "did you mean --examples instead of --exampels?"),
        ("judge in out --model x --packing trie", "did you mean tree?"),
    ],
)
def test_a_misspelled_word_is_told_the_right_one(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--columns chosen=a prompt=b", "--principles a b"])
def test_overrides_may_follow_an_option_with_several_values(option: str) -> None:
    words = f"align --model m --data d --output o {option}"
    plain = command_parser().parse(words.split())
    more = ["training_args.max_steps=1", "peft_config=null"]
    for parsed in (
        command_parser().parse([*words.split(), *more]),
        command_parser().parse([*words.split(), *more[:1], "--yes", *more[1:]]),
    ):
        assert parsed.columns == plain.columns
        assert parsed.principles == plain.principles
        assert sorted(parsed.overrides) == sorted(more)


@pytest.mark.parametrize("words", ["--debug jsft nope.yaml", "jsft nope.yaml --debug"])
def test_debug_is_understood_before_and_after_the_command(words: str) -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(words.split())


@pytest.mark.parametrize("command", ["jsft", "train"])
def test_the_help_of_training_shows_commands_that_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    examples = [
        line.split("  #")[0].split()[1:]
        for line in said.splitlines()
        if line.startswith("  self-judge ")
    ]
    assert {words[0] for words in examples} == {command, "check"}
    for words in examples:
        assert command_parser().parse(words).command == words[0]


def test_mistakes_in_inputs_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("{}")
    (tmp_path / "my.csv").write_text("question,good,bad\na,b,c\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "jsft.yaml").write_text("mine")
    told = {
        "judge nope.jsonl o --model m": "nope.jsonl: no such file",
        "judge . o --model m": ".: is not a regular file",
        "judge in.jsonl o --model ./m": "./m: there is no such folder",
        "judge in.jsonl o --model in.jsonl": "in.jsonl: is a file; give a model's folder",
        "judge in.jsonl o --model m --templates t.yaml": "t.yaml: no such file",
        "tournament in.jsonl o --model m --policy outputs/a/b": "outputs/a/b: there is no such",
        "eval no.jsonl --model m --output o": "no.jsonl: no such file or folder (working folder",
        "compare a.jsonl m --judge m --output o": "a.jsonl: no such file or folder",
        "jsft nope.yaml": "nope.yaml: no such file",
        "judge in.jsonl o --model no/such": "no/such is not a folder here, and not in the Hub's",
        "compare in.jsonl no/such --judge m --output o": "m is not a folder here, and not in the",
        f"jsft {RUN} model.model_name_or_path=no/such": "no/such is not a folder here, and not",
        "init new --model . --data twice.csv": "twice.csv, line 1: two columns are named 'a'",
        "init new --model . --data my.csv --columns prompt=q": "my.csv, record 0, field 'q': is mi",
        "init old --model . --data my.csv": "old/jsft.yaml exists: choose another folder",
        f"jsft {RUN} model.model_name_or_path=./m": "./m: there is no such folder",
        f"check {RUN} dataset.sources.0.path=a.jsonl": "a.jsonl: no such file or folder",
    }
    program = (
        "import json, sys\nfrom self_judge.cli import main\n"
        "statuses = [main(words.split()) for words in json.loads(sys.argv[1])]\n"
        "print(set(statuses), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(told))],
        capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout == "{2} False\n"
    for line, expected in zip(done.stderr.splitlines(), told.values(), strict=True):
        assert line.startswith(f"self-judge: error: {expected}"), line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell_or_names_its_extra(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec("argcomplete") is not None
    assert main(["--completion", shell]) == (0 if there else 2)
    printed = capsys.readouterr()
    if there:
        assert "self-judge" in printed.out
    else:
        assert "pip install 'self-judge[completion]'" in printed.err


def test_a_closed_pipe_is_no_error() -> None:
    program = [sys.executable, "-m", "self_judge", "keys", "training_args"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""


def test_without_a_connection_a_name_is_looked_up_once_and_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class ConnectError(Exception):
        pass

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectError("Name or service not known")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(repository.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(repository, "get_session", Session)
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    repository._connection_problem.cache_clear()
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"context": "a", "response_a": "b", "response_b": "c"}))
    templates = str(ROOT / "configs" / "templates" / "instructions.yaml")
    words = ["judge", str(source), str(tmp_path / "o"), "--model", "no/such"]
    try:
        assert main([*words, "--templates", templates]) == 2
    finally:
        repository._connection_problem.cache_clear()
    assert len(asked) == 1
    assert capfd.readouterr().err == (
        "self-judge: error: no/such is not a folder here, and not in the Hub's cache: the Hub "
        "cannot be reached (Name or service not known)\n"
    )


def test_only_what_is_missing_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["jsft", "--debug"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


@pytest.mark.skipif(os.name == "nt", reason="it closes streams in a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_ends_no_command(
    closed: str, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    words = ["keys"]
    if closed == "<&-":  # which asks whether it may ask
        words = ["init", "my", "--model", str(base), "--data", str(data["hh"])]
    command = shlex.join([sys.executable, "-m", "self_judge", *words]) + f" {closed}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my").is_dir() == (closed == "<&-")


def told_of_output(words: list[str], output: int, stream: str = "stdout") -> tuple[int, list[str]]:
    """The exit status and the errors of a command whose output goes to an open file."""
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    command = [sys.executable, "-m", "self_judge", *words]
    streams: Any = {stream: output, other: subprocess.PIPE}
    done = subprocess.run(command, text=True, **streams)
    return done.returncode, (done.stderr or "").splitlines()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_output_that_cannot_be_written_is_named_and_an_ended_reader_is_none(
    saved_judge: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    reader, ended = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    # A table, which rich prints, of an evaluation that is done already at the second call.
    options = ["--judge", str(saved_judge), "--max-pairs", "4", "--output", str(tmp_path / "out")]
    evaluation = ["eval", str(data["preference"]), *options]
    for words in (["keys"], ["--help"], evaluation):
        assert told_of_output(words, ended)[0] == 141
        status, errors = told_of_output(words, full)
        assert status == 2
        problem = "standard output cannot be written: No space left on device"
        assert errors[-1] == f"self-judge: error: {problem}"
    assert told_of_output([*evaluation, "--overwrite"], ended, "stderr") == (141, [])

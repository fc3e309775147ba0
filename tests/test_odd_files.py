"""Files that are damaged, odd or planted: one line that names them, no traceback, no hang."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from bad_input import JSFT, TRAIN, Place
from self_judge.cli import main
from self_judge.storage.atomic import MANIFEST, latest_complete

DEEP = "[" * 100_000
ODD_JSON = ["{}", "[]", "3", "null", '"x"', DEEP, '{"a": ' * 50_000, "9" * 5000, "\0", "{"]


def told(words: list[Any], capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """Runs a command that is refused, and returns the line that says why."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("self-judge: error: ")
    for part in parts:
        assert part in line
    return line


@pytest.mark.parametrize("kind", ["jsft", "eval", "judge", "tournament"])
@pytest.mark.parametrize("content", [DEEP, '{"a":' * 50_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_data_that_no_parser_can_hold_is_named(
    kind: str, content: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("odd.jsonl", "odd.json"):
        file = place.file(name, content + "\n")
        words = {
            "jsft": place.run(source=file),
            "eval": ["eval", file, "--model", place.saved, "--output", place.folder / "o"],
        }.get(kind, [kind, file, place.folder / "o.jsonl", "--model", place.saved])
        told(words, capsys, name)


@pytest.mark.parametrize("kind", ["check", "judge"])
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_files_of_a_model_that_no_parser_can_hold_name_the_model(
    name: str, kind: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(place.saved, place.folder / "odd"))
    source = place.file("in.jsonl", '{"context": "c", "response_a": "a", "response_b": "b"}\n')
    words = {
        "check": ["check", *place.run()[1:], f"model.model_name_or_path={model}"],
        "judge": ["judge", source, place.folder / "o.jsonl", "--model", model],
    }[kind]
    for content in ('{"a": ' * 50_000 + "1" + "}" * 50_000, '{"model_type": [{}], "peft_type": 3}'):
        (model / name).write_text(content)
        told(words, capsys, str(model))


@pytest.mark.parametrize("digits", [310, 400, 4000])
def test_a_rating_beyond_every_float_is_none(digits: int, place: Place) -> None:
    lines = place.data["preference"].read_text().splitlines()
    rated = [
        {**json.loads(x), "score_chosen": int("9" * digits), "score_rejected": 1} for x in lines
    ]
    file = place.file("p.jsonl", "".join(json.dumps(x) + "\n" for x in rated))
    assert main(place.run(source=file)) == 0


LINE = '{"step": 1, "loss": 0.5}\n'
JUDGED = {"gold": "a", "probabilities": [[[0.5, 0.4], [0.2, 0.3]]], "a": "x", "b": "y"}
BROKEN: list[tuple[str, Any]] = [
    ("metrics.jsonl", '{"loss": 1}\n'),
    ("metrics.jsonl", '{"step": "x", "loss": 1}\n'),
    ("metrics.jsonl", '{"step": 1, "loss": {"a": [1]}}\n' * 2000),
    ("metrics.jsonl", '{"step": 1, "completions/mean_length": [2]}\n'),
    ("metrics.jsonl", LINE + '{"step": 2, "lo' + LINE),
    ("metrics.jsonl", DEEP + "\n"),
    ("brackets.jsonl", '{"bracket": [], "responses": []}\n'),
    ("brackets.jsonl", '{"bracket": [1], "responses": [1], "winner": 9}\n'),
    ("brackets.jsonl", '{"bracket": [], "responses": ["a"], "winner": 0, "prompt": [5]}\n'),
    *(("judged.jsonl", json.dumps(JUDGED) + "\n" + json.dumps({**JUDGED, name: 5}) + "\n")
      for name in ("a", "probabilities")),
    *(("judged.jsonl", json.dumps(JUDGED) + "\n"
       + json.dumps({k: v for k, v in JUDGED.items() if k != name}) + "\n") for name in JUDGED),
    ("results.json", {"overall": {"undecidable": 3}}),
    ("results.json", {"overall": {}, "subsets": {"x": 3}}),
    ("results.json", {"overall": {}, "skipped": [1]}),
    ("results.json", {"overall": {}, "compared_with": {"overall": {}, "paired": [3]}}),
    ("results.json", {"length_controlled_win_rate": {}}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_report_names_the_file_that_lacks_something(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content = BROKEN[number]
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    told(["report", tmp_path], capsys, str(tmp_path / name))


@pytest.mark.parametrize("content", [*ODD_JSON[1:], b"\xff\xfe"], ids=range(len(ODD_JSON)))
def test_a_report_names_a_run_json_that_is_none(
    content: str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINE)
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "run.json").write_bytes(raw)
    told(["report", tmp_path], capsys, str(tmp_path / "run.json"))


@pytest.mark.parametrize(
    "content",
    [
        LINE.encode() + '{"step": 2, "é'.encode()[:-1],  # cut inside a character
        LINE.encode() + b'{"step": 2, "loss": 1e999}\n',
        LINE.encode() + b'{"step": 2, "loss": ' + b"9" * 400 + b"}\n",
        LINE.encode() + b'{"step": 2, "loss": ' + b"9" * 5000 + b"}\n",
        LINE.encode() + b'{"step": 2, "loss": NaN}\n' + b"\0" * 4000,
    ],
    ids=range(5),
)
def test_numbers_beyond_all_bounds_and_torn_lines_leave_the_report_readable(
    content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 0
    assert "Infinity" not in (tmp_path / "report.html").read_text().split("<script")[1][:5000]


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def trained(place: Place) -> Path:
    words = place.run("training_args.save_steps=1")
    assert main(words) == 0
    return place.folder / "run"


def resumed(place: Place, *more: str) -> list[str]:
    return place.run(
        "training_args.max_steps=2", "training_args.resume_from_checkpoint=true", *more
    )


def test_a_manifest_that_is_none_is_no_manifest(
    trained: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoint-1"
    named = f"training_args.resume_from_checkpoint={checkpoint}"
    skipped = f"{checkpoint} is skipped: its {MANIFEST}"
    contents = [*ODD_JSON, '{"files": {}}', '{"files": [1]}']
    random.shuffle(contents)
    for content in contents:
        (checkpoint / MANIFEST).write_text(content)
        told([*place.run(), named], capsys, str(checkpoint), MANIFEST)
        found, said = latest_complete(trained)
        assert found is None
        assert said[0].startswith(skipped)
    assert main(resumed(place)) == 0
    assert skipped in capsys.readouterr().err.replace("\n", " ")


def test_a_checkpoint_of_the_right_sizes_with_the_wrong_content_is_named(
    trained: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoint-1"
    whole = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.is_file()}
    names = ["trainer_state.json", "unlogged_0.json", "optimizer.pt", "scheduler.pt"]
    for name in [*names, "rng_state.pth", "data_fingerprint.json", "reference.json"]:
        content = random.choice([b"{}", b"[1]", b"x", b"[" * 100_000, b"\xff"])
        if name not in whole or (name, content) == ("data_fingerprint.json", b"{}"):
            continue
        for file, own in whole.items():
            (checkpoint / file).write_bytes(own)
        (checkpoint / name).write_bytes(content)
        manifest = json.loads(whole[MANIFEST])
        manifest["files"][name] = len(content)
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
        told(resumed(place), capsys, f"cannot resume from {checkpoint}")


def test_another_optimizer_is_refused_with_both_names(
    trained: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for optimizer in ("sgd", "adafactor", "rmsprop", "adagrad"):
        words = resumed(place, f"training_args.optim={optimizer}")
        line = told(words, capsys, "state of the optimizer AdamW, but this run uses", "optim")
        assert optimizer in line.lower()
    assert main(resumed(place, "training_args.optim=adamw_torch")) == 0


def test_resuming_with_other_settings_and_other_data_says_so(
    trained: Path,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = place.file("hh.jsonl", "".join(sorted(place.data["hh"].open())[3:]))
    changes = ["training_args.seed=7", f"dataset.sources.0.path={other}"]
    assert main(resumed(place, *changes)) == 0
    said = capsys.readouterr().err
    assert "training_args.seed was" in said
    assert "dataset.sources was" in said
    assert "the training data has changed since" in caplog.text


def test_a_run_json_that_is_none_keeps_no_run_from_resuming_and_is_named(
    trained: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = [*ODD_JSON[1:], '{"run_file": [1]}']
    for content in random.sample(contents, 4):
        (trained / "run.json").write_text(content)
        assert main(resumed(place)) == 0
        assert "run.json cannot be read" in capsys.readouterr().err


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["null", "", "''", "~", "3", "[a]", "{a: 1}", "true", "' '"])
@pytest.mark.parametrize("config", ["jsft", "train"])
def test_a_run_without_an_output_folder_writes_nothing(
    value: str,
    config: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place.folder)
    words = place.run(config=TRAIN if config == "train" else JSFT)
    words = [w for w in words if "output_dir" not in w] + [f"training_args.output_dir={value}"]
    told(words, capsys, "training_args.output_dir must be the path of a folder")
    assert not list(place.folder.iterdir())


@pytest.mark.parametrize("dtype", ["nope", "int8", "bool", "cpu", "__class__", "float8_e4m3fn", ""])
def test_a_dtype_that_is_none_is_refused_with_those_that_are(
    dtype: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = place.file("p.jsonl", '{"context": "q", "response_a": "a", "response_b": "b"}\n')
    words = ["judge", pairs, place.folder / "o.jsonl", "--model", place.saved, "--dtype", dtype]
    told(words, capsys, "dtype must be one of auto, bfloat16", repr(dtype))


@pytest.mark.parametrize("option", ["--max-prompts", "--sampling-batch-size"])
@pytest.mark.parametrize("value", [0, -1, -(10**20)])
def test_a_comparison_of_fewer_than_one_is_refused(
    option: str, value: int, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = place.file("p.jsonl", '{"prompt": "q"}\n')
    words = ["compare", place.saved, place.saved, "--prompts", prompts, "--judge", place.saved]
    words += ["--output", place.folder / "o", option, value]
    told(words, capsys, f"{option} must be at least 1, got {value}")


@pytest.mark.parametrize(
    "init", ["pissa", "olora", "pissa_niter_4", "nope", "corda", "loftq", "3", "[1]", "{a: 1}"]
)
def test_a_check_copes_with_every_initialization(
    init: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    words = place.run(f"peft_config.init_lora_weights={init}")
    status = main(["check", *words[1:], "--plain"])
    if init.startswith(("pissa", "olora")):
        assert status == 0
        return
    assert status == 1
    assert "peft_config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "expression",
    ["1/0", "(1/(messages|length - 2))", "2.0**100000", "10**5000", "'x' * 10**13", "messages[9].x",
     "[1]|map('nope')|list", "messages[::0]", "raise_exception('no')"],
)  # fmt: skip
def test_a_chat_template_that_fails_is_one_line(
    expression: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{{ " + expression + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
    told([*place.run(), f"templates.chat={json.dumps(template)}"], capsys, "chat template")


def test_a_chat_template_that_calls_itself_is_one_line(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    told([*place.run(), f"templates.chat={json.dumps(template)}"], capsys, "RecursionError")


# -- links and pipes -------------------------------------------------------------------------------


def test_a_link_in_a_circle_is_no_file(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    loop = place.folder / "loop.yaml"
    loop.symlink_to(loop)
    model = ["--model", place.saved]
    for words in (
        ["jsft", loop], ["check", loop], ["report", loop], place.run(source=loop),
        place.run(f"model.model_name_or_path={loop}"), ["judge", loop, place.folder / "o", *model],
        ["eval", place.data["hh"], "--output", place.folder / "o", *model, "--templates", loop],
        [*place.run(), f"training_args.output_dir={loop}"],
    ):  # fmt: skip
        told(words, capsys, str(loop))


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_named_pipe_is_refused_where_it_would_be_waited_for(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = place.folder / "pipe.jsonl"
    os.mkfifo(pipe)
    pairs = place.file("p.jsonl", '{"context": "q", "response_a": "a", "response_b": "b"}\n')
    model = ["--model", place.saved]
    for words in (
        place.run(source=pipe), ["judge", pipe, place.folder / "o", *model],
        ["tournament", pipe, place.folder / "o", *model], ["judge", pairs, pipe, *model],
        ["eval", pipe, "--output", place.folder / "o", *model],
        ["compare", pipe, pipe, "--judge", place.saved, "--output", place.folder / "o"],
    ):  # fmt: skip
        told(words, capsys, str(pipe))


def test_links_that_someone_planted_are_not_followed(place: Place) -> None:
    run, victim, inside = place.folder / "run", place.folder / "victim", place.folder / "inside"
    run.mkdir()
    inside.mkdir()
    victim.write_text("keep")
    (inside / "kept").write_text("keep")
    for name in ("run.json.part", "data.json.part", "report.html.part", "metrics.jsonl.part"):
        (run / name).symlink_to(victim)
    (run / ".unfinished").symlink_to(inside)
    assert main(place.run()) == 0
    (run / "report.html.part").exists() or (run / "report.html.part").symlink_to(victim)
    assert main(["report", str(run)]) == 0
    assert victim.read_text() == "keep"
    assert [p.name for p in inside.iterdir()] == ["kept"]
    assert not (run / "report.html").is_symlink()
    assert "<html" in (run / "report.html").read_text()
    shutil.rmtree(run)


@pytest.mark.parametrize("lacks", ["verdict", "label", "characters"])
def test_verdicts_that_lack_a_key_are_named(
    lacks: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    output = place.folder / "o"
    words = ["eval", str(place.data["preference"]), "--model", str(place.saved)]
    words += ["--output", str(output), "--max-pairs", "3"]
    assert main(words) == 0
    verdicts = output / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text().replace(f'"{lacks}"', '"other"'))
    told(words, capsys, str(verdicts), "--overwrite")

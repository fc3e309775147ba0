"""`self-judge init` writes run files for a model and data that start as they are."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from self_judge.cli import main
from self_judge.commands import init
from self_judge.config.schema import load_run
from self_judge.data import synthetic
from self_judge.storage.jsonl import read_lines
from self_judge.training.setup import load_data

SMALL = ("training_args.max_steps=1", "training_args.bf16=false", "training_args.save_steps=9")


def table(path: Path, columns: tuple[str, ...], rows: int = 60) -> Path:
    """A CSV file of preferences of the synthetic world, with these columns."""
    pairs = synthetic.records(rows, seed=7)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for record in pairs:
            pair = record.pairs[0]
            writer.writerow([record.prompt[-1]["content"], pair.chosen, pair.rejected])
    return path


def start(folder: Path, model: Path, data: Path, *more: str) -> int:
    return main(["init", str(folder), "--model", str(model), "--data", str(data), *more])


def test_the_printed_commands_run_as_they_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = table(tmp_path / "mine.csv", ("question", "good answer", "bad answer"))
    assert start(Path("my"), base, data) == 0
    said = capsys.readouterr().err
    assert "prompt from 'question', chosen from 'good answer', rejected from 'bad answer'" in said
    commands = [shlex.split(line) for line in said.split("next:\n")[1].splitlines()]
    names = [words[1] for words in commands]
    assert names == ["check", "jsft", "eval", "train", "compare", "tournament", "report"]
    more = {
        "jsft": SMALL,
        "train": (*SMALL, "self_judge_args.max_new_tokens=4"),
        "compare": ("--max-new-tokens", "4"),
        "tournament": ("--max-new-tokens", "4", "--n", "2"),
    }
    for words, following in pairwise([*commands[1:], []]):
        assert main([*words[1:], *more.get(words[1], ())]) == 0, capsys.readouterr().err
        if words[1] in ("jsft", "train"):
            assert capsys.readouterr().err.endswith(f"next: {shlex.join(following)}\n")
    held_out = list(read_lines(Path("my/held_out.jsonl")))
    assert len(list(read_lines(Path("my/best.jsonl")))) == len(held_out) > 0
    assert Path("my/report.html").is_file()


@pytest.mark.parametrize(("rows", "told"), [(60, True), (400, False)])
def test_few_held_out_records_and_lengths_that_tell_the_label_are_named(
    rows: int, told: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine.jsonl"
    with data.open("w") as file:
        for i in range(rows):
            rejected = "no" if told or i % 2 else "no, it is not"
            line = {"prompt": f"why {i}?", "chosen": "it is so", "rejected": rejected}
            file.write(json.dumps(line) + "\n")
    assert start(tmp_path / "my", base, data) == 0
    said = capsys.readouterr().err
    assert ("held out, too few for reliable figures (use more data)" in said) == told
    assert ("so the judge may learn length alone: balance the lengths" in said) == told


def test_held_out_prompts_are_those_that_training_holds_out(base: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"))
    assert start(tmp_path / "my", base, data) == 0
    _, held_out = load_data(load_run(tmp_path / "my/jsft.yaml", [], "jsft"), lambda line: None)
    assert held_out is not None
    written = [line["prompt"] for line in read_lines(tmp_path / "my/held_out.jsonl")]
    assert written == [[dict(m) for m in record.prompt] for record in held_out.records]


def test_principles_come_from_the_shipped_templates_as_text_to_edit(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"))
    given = ("--principles", "helpfulness", "correctness")
    assert start(tmp_path / "my", base, data, *given) == 0
    templates = yaml.safe_load((tmp_path / "my/templates.yaml").read_text())["templates"]["judge"]
    assert list(templates) == ["helpfulness", "correctness"]
    shipped = load_run("hh_jsft", [], "jsft").templates.judge
    assert shipped is not None
    assert templates["helpfulness"] == shipped["helpfulness"]
    assert start(tmp_path / "more", base, data, "--principles", "kindness") == 2
    assert "--principles kindness: unknown; there are templates for " in capsys.readouterr().err


def test_nothing_is_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"))
    own = tmp_path / "my" / "self_judge.yaml"
    own.parent.mkdir()
    own.write_text("mine")
    assert start(tmp_path / "my", base, data) == 2
    assert f"{own} exists: choose another folder, or remove it" in capsys.readouterr().err
    assert [path.name for path in own.parent.iterdir()] == ["self_judge.yaml"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (("x", "y", "z"), "cannot detect the kind of data from the columns ['x', 'y', 'z']"),
        (("question", "good", "better"), "cannot detect the kind of data"),  # two could be chosen
    ],
)
def test_columns_that_cannot_be_guessed_are_asked_for_only_in_a_terminal(
    columns: tuple[str, ...],
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = table(tmp_path / "mine.csv", columns)
    assert start(tmp_path / "my", base, data) == 2
    assert said in capsys.readouterr().err
    asked = iter([c for c in columns if columns[0] == "x" or c != "question"])
    monkeypatch.setattr(init.Prompt, "ask", lambda *args, **kwargs: next(asked))
    init.run_init(init.InitJob(tmp_path / "my", str(base), str(data), ask=True))
    source = load_run(tmp_path / "my/jsft.yaml", [], "jsft").dataset.sources[0]
    assert source.columns == dict(zip(("prompt", "chosen", "rejected"), columns, strict=True))


@pytest.mark.parametrize("wrong", ["unaccepted", "not chosen", "nonPreferred"])
def test_a_negated_name_is_not_that_of_the_better_response(
    wrong: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(tmp_path / "mine.csv", ("question", wrong, "worse"))
    assert start(tmp_path / "my", base, data) == 2
    assert "cannot detect the kind of data" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_at_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"))
    assert start(data / "my", base, data) == 2
    assert f"error: {data}: is not a folder: choose another output\n" in capsys.readouterr().err


def test_data_without_pairs_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    assert start(tmp_path / "my", base, data) == 2
    assert f"{data}: there are no pairs to train a judge on" in capsys.readouterr().err


@pytest.mark.parametrize(("gib", "lora"), [(64, False), (1.105, True)])
def test_lora_is_chosen_where_full_fine_tuning_does_not_fit(
    gib: float, lora: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from self_judge.check.memory import Device, this_cpu

    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"))
    there = Device("a CPU", int(gib * 2**30), this_cpu().resident)
    monkeypatch.setattr(init, "device_for", lambda gpu, machine: there)
    assert start(tmp_path / "my", base, data) == 0
    run = load_run(tmp_path / "my/jsft.yaml", [], "jsft")
    assert (run.peft_config is not None) == lora == run.jsft_args.merge_adapter


def test_a_model_without_a_chat_template_gets_turn_markers_and_unused_columns_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "base"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").unlink()
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"), 12)
    head, *rows = data.read_text().splitlines()
    data.write_text("\n".join([f"{head},aside", *(f"{row},text" for row in rows)]))
    assert start(tmp_path / "my", model, data) == 0
    assert load_run(tmp_path / "my/jsft.yaml", [], "jsft").templates.user
    assert "unused column: aside: 12" in capsys.readouterr().err


def test_what_cannot_become_a_run_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = table(tmp_path / "mine.csv", ("prompt", "chosen", "rejected"), 12)
    short = tmp_path / "short"
    shutil.copytree(base, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    (short / "generation_config.json").unlink()
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 9000, "chosen": "x is", "rejected": "y"}))
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"prompt": "\\ud800", "chosen": "x is", "rejected": "y"}\n')
    cases = [
        (data, base, data, f"{data}: is not a folder: choose another output"),
        (tmp_path / "a", short, data, "its context of 64 tokens is too short for the responses in"),
        (tmp_path / "b", base, long, f"{long}, with {base}: jsft_args.max_length: no training"),
        (tmp_path / "${c}", base, data, "'${' begins a reference in run files: rename it"),
        (tmp_path / "d", base, odd, f"{odd}, line 1, field 'prompt': is not valid Unicode"),
    ]
    for folder, model, records, message in cases:
        assert start(folder, model, records) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (folder / "jsft.yaml").exists()

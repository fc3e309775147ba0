"""Run files at the command line: those of the method's repository, and all problems at once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from run_overrides import given
from self_judge.cli import main
from self_judge.config.schema import load_run
from self_judge.config.trainer_keys import SOURCES, library_fields
from self_judge.data import synthetic

QUESTION = "{context} {response_a} {response_b}"
CHAT = (
    "<|system|>\n{% for m in messages %}{% if loop.first and m['role'] == 'system' %}"
    "{{ m['content'] }}{% elif m['role'] == 'user' %}{{ '\n<|user|>\n' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '\n<|assistant|>\n' + m['content'] + eos_token }}"
    "{% endif %}{% if loop.last and add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
    "{% endfor %}"
)
# A file in the keys of the method's original repository.
ORIGINAL = f"""
training_args:
  output_dir: "experiments/run"
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  gradient_checkpointing: True
  learning_rate: 2e-5
  warmup_ratio: 0.03
  report_to: "none"
  save_strategy: "epoch"
  remove_unused_columns: False
  bf16: True
jsft_args:
  max_length: 2048
peft_config:
  r: 8
model:
  pretrained_model_name_or_path: "meta-llama/Llama-2-7b-hf"
  attn_implementation: "flash_attention_2"
templates:
  skip_first_token: True
  chat: {json.dumps(CHAT)}
  user: "\\n<|user|>\\n"
  assistant: "\\n<|assistant|>\\n"
  judge:
    honesty: {{system: "Be honest.", user: "{QUESTION} Honest?", assistant: "Sure!\\n"}}
    helpfulness: {{user: "{QUESTION} Helpful?", assistant: "Sure!\\n"}}
    instruction_following: {{user: "{QUESTION} Followed?", assistant: "Sure!\\n"}}
    truthfulness: {{user: "{QUESTION} True?", assistant: "Sure!\\n"}}
  decision_rationale:
    decision: "\\nDecision: Response"
    rationale: "\\nEvaluation of Response {{position}}:"
dataset: "openbmb/UltraFeedback"
"""


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL)
    return path


def test_a_run_file_of_the_methods_repository_starts_as_it_is(
    original: Path,
    base: Path,
    data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"training_args.output_dir={tmp_path / 'jsft'}", "training_args.max_steps=1"]
    given = [f"model.pretrained_model_name_or_path={base}", f"dataset={data['ultrafeedback']}"]
    assert main(["jsft", str(original), *more, *given, "dataset.max_records=4"]) == 0
    said = capsys.readouterr().err.splitlines()
    for line in (
        "model.pretrained_model_name_or_path: read as model.model_name_or_path",
        "training_args.warmup_ratio: read as training_args.warmup_steps",
        "model.dtype: not set; bfloat16, as in the method's scripts",
    ):
        assert said.count(line) == 1, line
    saved = json.loads((tmp_path / "jsft" / "judge.json").read_text())
    assert saved["judge"]["honesty"]["assistant"] == "Sure!\n\nDecision: Response"
    adapter = json.loads((tmp_path / "jsft" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "CAUSAL_LM"


def test_it_means_what_the_methods_scripts_do_with_it(original: Path) -> None:
    run = load_run(original, [], "jsft")
    assert run.model.model_name_or_path == "meta-llama/Llama-2-7b-hf"
    assert run.model.dtype == "bfloat16"
    assert run.training_args["warmup_steps"] == 0.03
    assert run.jsft_args.global_batch_size is None  # 2 × 1 × the number of processes
    assert [(s.path, s.kind) for s in run.dataset.sources] == [
        ("openbmb/UltraFeedback", "ultrafeedback")
    ]
    assert (run.dataset.held_out, run.dataset.principles, run.uses_rationales) == (0.0, True, True)
    templates = run.templates.judge_templates()
    assert templates is not None
    assert templates.render_rationale("honesty", "because", "why") == (
        "\n\nEvaluation of Response A: because\nEvaluation of Response B: why"
    )


def test_self_training_starts_from_the_adapter_that_the_method_merges(original: Path) -> None:
    text = ORIGINAL.replace("jsft_args:", "self_judge_args:\n  token_id_a: 319")
    text = text.replace("openbmb/UltraFeedback", "Anthropic/hh-rlhf")
    text = text.replace("model:\n", "model:\n  peft_model_name_or_path: experiments/hh_jsft\n")
    original.write_text(text)
    run = load_run(original, [], "self_judge")
    assert run.model.model_name_or_path == "experiments/hh_jsft"
    assert [(s.data_dir, s.kind) for s in run.dataset.sources] == [("helpful-base", "hh")]
    assert run.self_judge_args.token_id_a == 319


def test_hh_is_read_with_demonstrations_alone_from_its_second_part(original: Path) -> None:
    said: list[str] = []
    run = load_run(original, ["dataset=Anthropic/hh-rlhf"], "jsft", said.append)
    assert any("add them to the dialogues of HH too" in line for line in said)
    assert [(s.data_dir, s.sft, s.pairs) for s in run.dataset.sources] == [
        ("helpful-base", True, True),
        ("helpful-online", True, False),
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("model:\n", "model:\n  model_name_or_path: x\n"), "set only one of them"),
        (("ratio: 0.03", "ratio: 5"), "warmup_ratio must be in [0, 1), got 5"),
        (("decision: ", "decision: 3 #"), "decision and rationale must be text"),
    ],
)
def test_an_older_key_that_cannot_be_kept_is_an_error(
    original: Path, change: tuple[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    original.write_text(ORIGINAL.replace(*change))
    assert main(["jsft", str(original)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("training_args.max_steps=0", "max_steps must be above 0, or -1 for all epochs, got 0"),
        ("training_args.num_train_epochs=0", "num_train_epochs must be above 0, got 0"),
    ],
)
def test_a_run_without_a_step_is_refused(
    wrong: str, told: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = synthetic.write_dataset("preference", tmp_path / "pairs.jsonl", 20, seed=1)
    output = f"training_args.output_dir={tmp_path / 'run'}"
    assert main(["jsft", "hh_jsft", *given(base, data), output, wrong]) == 2
    assert f"error: training_args.{told}" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = synthetic.write_dataset("preference", tmp_path / "pairs.jsonl", 20, seed=1)
    output = f"training_args.output_dir={data}"
    assert main(["jsft", "hh_jsft", *given(base, data), output]) == 2
    assert f"error: training_args.output_dir: {data}: is not a folder" in capsys.readouterr().err


WRONG = """\
extends: base.yaml
model:
  model_name_or_path: 3
  dtyp: bfloat16
dataset:
  sources:
    - {path: a.jsonl, knd: hh}
    - {split: train}
  held_out: 1.5
  max_records: 0
training_args:
  learning_rat: 1.0
  bf16: maybe
  max_length: 3
peft_config: {lora_alfa: 8}
jsft_args: {max_length: 1, packing: trie}
trainin_args: {}
templates:
  judge: {a: {user: hi, assistant: b}}
"""
TOLD = """\
base.yaml:1: training_args.optimm: unknown; did you mean optim?
run.yaml:3: model.model_name_or_path: expected text, got a whole number 3
run.yaml:4: model.dtyp: unknown; did you mean dtype?
run.yaml:7: dataset.sources.0.knd: unknown; did you mean kind?
run.yaml:8: dataset.sources.1.path: missing
run.yaml:9: dataset: held_out must be in [0, 1), got 1.5
run.yaml:10: dataset: max_records must be at least 1, got 0
run.yaml:12: training_args.learning_rat: unknown; did you mean learning_rate?
run.yaml:13: training_args.bf16: expected true or false or null, got text 'maybe'
run.yaml:14: training_args.max_length: set jsft_args.max_length instead
run.yaml:15: peft_config.lora_alfa: unknown; did you mean lora_alpha?
run.yaml:16: jsft_args: max_length must be at least 2, got 1
run.yaml:16: jsft_args.packing: expected one of auto, tree, cache, padding, off, got text 'trie'
run.yaml:17: trainin_args: unknown; did you mean training_args?
run.yaml:19: templates: judge template 'a' lacks {context}, {response_a}, {response_b} in 'user'
run.yaml (with 'dataset.seed=x'): dataset.seed: expected a whole number, got text 'x'
"""


@pytest.mark.parametrize("command", ["jsft", "check"])
def test_all_problems_of_a_file_are_told_at_once_with_their_lines(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("training_args: {optimm: x}\n")
    Path("run.yaml").write_text(WRONG)
    assert main([command, "run.yaml", "dataset.seed=x"]) == 2
    said = capsys.readouterr().err
    expected = [f"self-judge: error: {line}" for line in TOLD.splitlines()]
    assert sorted(said.splitlines()) == sorted(expected)


def test_the_trainers_keys_are_those_of_the_installed_libraries() -> None:
    import dataclasses

    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    classes = {c.__name__: c for c in (SFTConfig, DPOConfig, LoraConfig)}
    assert set(classes) == set(SOURCES)
    for name, own in classes.items():
        assert set(library_fields(name) or ()) == {f.name for f in dataclasses.fields(own)}


# --- keys and schema ------------------------------------------------------------------------------


def test_keys_lists_every_key_with_its_default_in_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["keys"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for line in (
        "model.model_name_or_path (required): text",
        "dataset.sources.0.kind (auto): one of auto, hh, ultrafeedback, preference",
        "jsft_args.max_length (2048): a whole number",
        "    Maximum number of tokens per training example.",
        "self_judge_args.global_batch_size (64): a whole number or null",
    ):
        assert line in said.splitlines(), line
    # Each key has a help text.
    lines = said.splitlines()
    assert not [a for a, b in itertools.pairwise(lines) if a[0] != " " != b[0]]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("jsft_args", "jsft_args.merge_adapter (false): true or false"),
        ("self_judge_args.vllm", "self_judge_args.vllm_mode (colocate): one of colocate, server"),
        ("peft_config", "peft_config.r (8): a whole number"),
        ("training_args", "training_args.learning_rate (2e-05 in jsft, 1e-06 in train): a number"),
    ],
)
def test_keys_of_a_section(section: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", section]) == 0
    said = capsys.readouterr().out.splitlines()
    assert line in said
    assert all(text.startswith((section, " ")) for text in said)
    assert max(map(len, said)) <= 80


def test_keys_finds_a_key_by_its_last_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "max_length"]) == 0
    said = capsys.readouterr().out.splitlines()
    keys = [line.partition(" ")[0] for line in said if not line.startswith(" ")]
    assert keys == ["jsft_args.max_length", "self_judge_args.max_length"]


@pytest.mark.parametrize(
    ("section", "meant"),
    [("trainin_args", "training_args"), ("jsft_args.max_lenght", "jsft_args.max_length")],
)
def test_an_unknown_section_is_told_its_name(
    section: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", section]) == 2
    assert f"{section}: unknown; did you mean {meant}?" in capsys.readouterr().err


def test_the_schema_of_the_shipped_files_is_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    shipped = json.loads((ROOT / "configs" / "schema.json").read_text())
    for schema in (printed, shipped):
        for section in ("training_args", "peft_config"):  # of the installed libraries
            assert schema["properties"][section].pop("properties")
    assert printed == shipped, "run: self-judge schema > configs/schema.json"


SHIPPED = [
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "accelerate" and "accelerate" not in path.name
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_names_the_schema_that_has_its_keys(path: Path) -> None:
    text = path.read_text()
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    schema = json.loads((path.parent / named).read_text())

    def unknown(node: dict[str, Any], schema: dict[str, Any], where: str) -> list[str]:
        found = []
        for key, value in node.items():
            own = schema.get("properties", {}).get(key)
            if own is None:
                found += [f"{where}.{key}"] if schema.get("additionalProperties") is False else []
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and own is not None:
                    found += unknown(item, own.get("items", own), f"{where}.{key}")
        return found

    assert unknown(yaml.safe_load(text), schema, "") == []

"""Run files: what they hold, what can be overridden, and what wrong ones are told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from self_judge.config.schema import (
    JSFTRun,
    SelfJudgeRun,
    load_run,
)
from self_judge.config.self_training import LOSS_TYPES, SelfJudgeArgs
from self_judge.config.trainer_keys import (
    accumulation_steps,
    check_training_args,
    check_training_values,
)
from self_judge.errors import ConfigError
from self_judge.judging.choice import JudgeChoice

CONFIGS = ROOT / "configs"
JSFT_FILES = ("hh_jsft", "uf_jsft", "uf_jsft_pr")
SELF_JUDGE_FILES = ("hh_self_judge", "uf_self_judge", "uf_self_judge_pr")
PRINCIPLES = ("helpfulness", "honesty", "instruction_following", "truthfulness")

QUESTION = "{context} {response_a} {response_b}"
MINIMAL = f"""
model: {{model_name_or_path: tiny}}
templates: {{judge: {{good: {{user: "{QUESTION}", assistant: Response}}}}}}
dataset: {{sources: [{{path: data.jsonl}}]}}
jsft_args: {{}}
"""


def jsft(name: str, *overrides: str) -> JSFTRun:
    return load_run(CONFIGS / f"{name}.yaml", overrides, "jsft")


def self_judge(name: str, *overrides: str) -> SelfJudgeRun:
    return load_run(CONFIGS / f"{name}.yaml", overrides, "self_judge")


def error_of(path: Path, *overrides: str, kind: Any = "jsft") -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides, kind)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


# --- the shipped files ----------------------------------------------------------------------------


def test_there_are_exactly_the_six_run_files_and_two_accelerate_files() -> None:
    expected = {*JSFT_FILES, *SELF_JUDGE_FILES, "jsft_accelerate", "self_judge_accelerate"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == expected


@pytest.mark.parametrize("name", JSFT_FILES)
def test_jsft_files_have_the_papers_hyper_parameters(name: str) -> None:
    run = jsft(name)
    training = run.training_args
    assert training["num_train_epochs"] == 1
    assert training["learning_rate"] == 2e-5
    assert (training["lr_scheduler_type"], training["warmup_steps"]) == ("cosine", 0.03)
    assert (training["adam_beta1"], training["adam_beta2"]) == (0.9, 0.999)
    assert training["max_grad_norm"] == 1.0
    assert (run.jsft_args.global_batch_size, run.jsft_args.max_length) == (128, 2048)
    assert (run.peft_config["r"] if run.peft_config else None) == (8 if name == "hh_jsft" else None)


@pytest.mark.parametrize("name", SELF_JUDGE_FILES)
def test_self_training_files_have_the_papers_hyper_parameters(name: str) -> None:
    run = self_judge(name)
    training, args = run.training_args, run.self_judge_args
    assert training["num_train_epochs"] == 3
    assert training["learning_rate"] == 5e-6
    assert training["lr_scheduler_type"] == "constant_with_warmup"
    assert training["warmup_steps"] == 0.1
    assert (training["adam_beta1"], training["adam_beta2"]) == (0.9, 0.999)
    assert training["max_grad_norm"] == 1.0
    assert (args.global_batch_size, args.max_length, args.max_new_tokens) == (64, 2048, 768)
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 0.9, 0)
    assert (args.loss_type, args.beta) == ("sigmoid", 0.1)
    assert run.peft_config is not None
    lora = {key: run.peft_config[key] for key in ("r", "lora_alpha", "lora_dropout")}
    assert lora == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1}


@pytest.mark.parametrize("name", JSFT_FILES + SELF_JUDGE_FILES)
def test_shipped_files_report_to_nobody_and_download_nothing_gated(name: str) -> None:
    run = jsft(name) if name in JSFT_FILES else self_judge(name)
    assert run.training_args["report_to"] == "none"
    assert not run.model.model_name_or_path.startswith("meta-llama/")


@pytest.mark.parametrize("name", ["hh", "uf", "uf_pr"])
def test_self_training_starts_where_jsft_of_the_same_name_ends(name: str) -> None:
    data, _, principles = name.partition("_")
    suffix = f"_{principles}" if principles else ""
    first, second = jsft(f"{data}_jsft{suffix}"), self_judge(f"{data}_self_judge{suffix}")
    assert second.model.model_name_or_path == first.training_args["output_dir"]
    # The same held-out prompts, or self-training would learn what JSFT is measured on.
    assert (second.dataset.held_out, second.dataset.seed) == (
        first.dataset.held_out,
        first.dataset.seed,
    )
    assert second.dataset.eval == first.dataset.eval
    assert second.templates.judge_templates() is None


def test_hh_learns_pairs_from_helpful_base_alone() -> None:
    sources = jsft("hh_jsft").dataset.sources
    assert [(s.data_dir, s.sft, s.pairs) for s in sources] == [
        ("helpful-base", True, True),
        ("helpful-online", True, False),
    ]
    assert [s.data_dir for s in self_judge("hh_self_judge").dataset.sources] == ["helpful-base"]


@pytest.mark.parametrize(
    ("name", "principles"),
    [("hh_jsft", ("helpfulness",)), ("uf_jsft", ("overall",)), ("uf_jsft_pr", PRINCIPLES)],
)
def test_judge_templates_of_the_shipped_files(name: str, principles: tuple[str, ...]) -> None:
    run = jsft(name)
    templates = run.templates.judge_templates()
    assert templates is not None
    assert templates.principles == principles
    assert all(t.assistant.endswith(" would be Response") for t in templates.values())
    assert len({t.user for t in templates.values()}) == len(principles)
    assert templates.has_rationales == run.uses_rationales == (name == "uf_jsft_pr")
    assert (run.templates.user, run.templates.assistant) == ("\n\nHuman:", "\n\nAssistant:")


def test_rationales_come_in_the_order_of_the_letters() -> None:
    templates = jsft("uf_jsft_pr").templates.judge_templates()
    assert templates is not None
    text = templates.render_rationale("honesty", "first reason", "second reason")
    assert text.startswith(".")
    assert text.index("first reason") < text.index("second reason")


def test_every_training_and_adapter_key_is_a_field_of_its_class() -> None:
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    from self_judge.training.self_training.config import SelfJudgeConfig

    for name in JSFT_FILES + SELF_JUDGE_FILES:
        run = jsft(name) if name in JSFT_FILES else self_judge(name)
        config_class = trl.SFTConfig if name in JSFT_FILES else SelfJudgeConfig
        check_training_values(run.training_args, config_class)
        lora_names = [f.name for f in fields(peft.LoraConfig)]
        check_training_args(run.peft_config or {}, lora_names, "peft_config")


def test_self_judge_args_mean_what_the_trainers_settings_of_the_same_name_mean() -> None:
    pytest.importorskip("trl")
    from self_judge.training.self_training.config import SelfJudgeConfig

    of_the_trainer = {f.name: f.default for f in fields(SelfJudgeConfig)}
    of_the_trainer["loss_type"] = "sigmoid"  # a list there, and the same loss
    of_the_run = {"token_id_a", "token_id_b", "global_batch_size", "judge_accuracy", "judge"}
    for f in fields(SelfJudgeArgs):
        if f.name not in of_the_run:
            assert (f.name, f.default) == (f.name, of_the_trainer[f.name])


def test_loss_types_are_those_of_the_installed_trl() -> None:
    trl = pytest.importorskip("trl")
    described = next(f for f in fields(trl.DPOConfig) if f.name == "loss_type").metadata["help"]
    assert tuple(re.findall(r"`'(\w+)'`", described)) == LOSS_TYPES


# --- accelerate files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsft_accelerate", "self_judge_accelerate"])
def test_the_methods_accelerate_files_start_one_process_without_being_edited(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nprint('started', os.environ.get('WORLD_SIZE'), *sys.argv[1:])\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    arguments = [f"--config_file={CONFIGS / name}.yaml", str(script), "--config=x.yaml", "a.b=c"]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n").count("started None --config=x.yaml a.b=c") == 1


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_other_accelerate_files_are_understood_by_accelerate(path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    loaded = config_args.load_config_from_file(str(path))
    expected = {
        "single": "NO",
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
        "multinode_ddp": "MULTI_GPU",
        "multinode_fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert loaded.distributed_type.value == expected[path.stem]
    machines = 2 if path.stem.startswith("multinode") else 1
    assert loaded.num_machines == machines
    if machines > 1:
        assert loaded.rdzv_backend == "c10d"  # so that no machine needs a file of its own
    else:
        assert loaded.num_processes == (1 if path.stem == "single" else "auto")
    assert loaded.use_cpu is False


# --- overrides and extends ------------------------------------------------------------------------


def test_any_value_is_overridden_by_key_path(minimal: Path) -> None:
    overrides = [
        "training_args.learning_rate=1e-4",
        "training_args.output_dir=a=b",
        "dataset.sources.0.path=other.jsonl",
        "dataset.held_out=0",
        "peft_config.r=4",
        "templates.skip_first_token=true",
        "jsft_args.global_batch_size=null",
        "dataset.eval=[{path: test.jsonl, kind: preference}]",
    ]
    run = load_run(minimal, overrides, "jsft")
    assert run.training_args == {"learning_rate": 1e-4, "output_dir": "a=b"}
    assert run.dataset.sources[0].path == "other.jsonl"
    assert isinstance(run.dataset.held_out, float)
    assert run.peft_config == {"r": 4}
    assert run.templates.skip_first_token is True
    assert run.jsft_args.global_batch_size is None
    assert run.dataset.eval[0].kind == "preference"


def test_later_overrides_win_and_leave_the_file_as_it_was(minimal: Path) -> None:
    run = load_run(minimal, ["jsft_args.max_length=64", "jsft_args.max_length=128"], "jsft")
    assert run.jsft_args.max_length == 128
    assert load_run(minimal, [], "jsft").jsft_args.max_length == 2048


def test_extended_files_lie_under_the_file_and_under_each_other_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("training_args: {seed: 1, run_name: one, save_steps: 1}")
    (tmp_path / "two.yaml").write_text("training_args: {seed: 2, run_name: two}")
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: [one.yaml, two.yaml]\ntraining_args: {{seed: 3}}\n{MINIMAL}")
    loaded = load_run(run, [], "jsft")
    assert loaded.training_args == {"seed": 3, "run_name": "two", "save_steps": 1}


def test_values_may_refer_to_each_other_but_template_text_is_literal(minimal: Path) -> None:
    text = QUESTION + " costs ${5} {x}"
    overrides = [
        f"templates.judge.good.user='{text}'",
        "training_args.output_dir=outputs/${model.model_name_or_path}",
    ]
    run = load_run(minimal, overrides, "jsft")
    assert run.training_args["output_dir"] == "outputs/tiny"
    templates = run.templates.judge_templates()
    assert templates is not None
    assert templates["good"].user == text


# Texts that OmegaConf would read as a reference, as the start of one, or as a resolver's call.
DOLLARS = [
    *("costs ${5} {x}", "${", "${${", "$", "$$", "}", "{{ '${' }}", "\\${a}", "${a b}", "${.x}"),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH,x}", "${model.model_name_or_path}", "${a[0]}", "???x"),
]


@pytest.mark.parametrize("dollars", DOLLARS)
def test_dollars_and_braces_in_templates_are_text(
    minimal: Path, tmp_path: Path, dollars: str
) -> None:
    text = f"{dollars} {QUESTION} {dollars}"
    templates = {"judge": {"good": {"user": text, "assistant": f"{dollars} is"}}, "chat": text}
    written = tmp_path / "written.yaml"
    written.write_text(f"extends: {minimal}\ntemplates: {json.dumps(templates)}")
    overrides = [
        f"templates.judge.good.user={json.dumps(text)}",
        f"templates.judge.good.assistant={json.dumps(f'{dollars} is')}",
        f"templates.chat={json.dumps(text)}",
    ]
    for run in (load_run(written, [], "jsft"), load_run(minimal, overrides, "jsft")):
        judge = run.templates.judge_templates()
        assert judge is not None
        assert (judge["good"].user, judge["good"].assistant) == (text, f"{dollars} is")
        assert run.templates.chat == text
    from_file = JudgeChoice("no/such/model", str(written)).judge_templates()
    assert from_file["good"].user == text


def test_nothing_is_read_from_the_environment(
    minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the machine")
    for text in ("${oc.env:SECRET}", "a/${oc.env:SECRET}/b", "${oc.decode:${oc.env:SECRET}}"):
        run = load_run(minimal, [f"training_args.output_dir={text}"], "jsft")
        assert run.training_args["output_dir"] == text
    refer = ["training_args.output_dir=${oc.env:SECRET}-${model.model_name_or_path}-${"]
    assert load_run(minimal, refer, "jsft").training_args["output_dir"] == (
        "${oc.env:SECRET}-tiny-${"
    )


# --- what wrong files are told --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("jsft_args.max_lenght=3", "jsft_args.max_lenght: unknown; did you mean max_length?"),
        ("trainng_args.seed=3", "trainng_args: unknown; did you mean training_args?"),
        ("dataset.sources.0.pth=x", "dataset.sources.0.pth: unknown; did you mean path?"),
        ("model.zzz=1", "model.zzz: unknown; valid names are model_name_or_path, dtype"),
        (
            "jsft_args.max_length=abc",
            "jsft_args.max_length: expected a whole number, got text 'abc'",
        ),
        (
            "jsft_args.group_by_length=1",
            "jsft_args.group_by_length: expected true or false, got a whole number 1",
        ),
        ("dataset.held_out=true", "dataset.held_out: expected a number, got true or false True"),
        (
            "model.revision=123",
            "model.revision: expected text or null, got a whole number 123",
        ),
        ("model.dtype=int8", "model.dtype: expected one of auto, bfloat16, float16, float32, got"),
        ("peft_config=3", "peft_config: expected a mapping or null, got a whole number 3"),
        ("jsft_args=3", "jsft_args: expected a section with keys, got 3"),
        ("dataset.sources=[]", "dataset: sources is empty"),
        ("dataset.held_out=1.0", "dataset: held_out must be in [0, 1), got 1.0"),
        ("dataset.max_records=0", "dataset: max_records must be at least 1, got 0"),
        (
            "dataset.sources.0={path: x, sft: false, pairs: false}",
            "dataset.sources.0: sft and pairs are both false",
        ),
        ("model=null", "model: missing"),
        ("templates.judge=null", "templates.judge is missing: JSFT requires it"),
        ("templates.judge.good.user=hi", "templates: judge template 'good' lacks {context}, "),
        ("templates.user=Q", "templates: user and assistant are a pair of turn markers"),
        ("dataset.rationales=true", "templates.decision_rationale is not set"),
        (
            "training_args.max_length=9",
            "training_args.max_length: set jsft_args.max_length instead",
        ),
        ("training_args.output_dir=${nowhere}", "Interpolation key 'nowhere' not found"),
        # about the override itself
        ("nonsense", "override 'nonsense': expected key.path=value"),
        ("jsft_args..x=1", "override 'jsft_args..x=1': expected key.path=value"),
        ("jsft_args.max_length=[1", "override 'jsft_args.max_length=[1': the value is not valid"),
        ("dataset.sources.4.path=x", "dataset.sources is a list of length 1, and '4' is not"),
        ("model.model_name_or_path.x=1", "model.model_name_or_path is text 'tiny', which has no"),
        ("extends=x.yaml", "extends is only allowed in a file"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    minimal: Path, override: str, told: str
) -> None:
    message = error_of(minimal, override)
    assert told in message
    assert override in message or str(minimal) in message


def test_only_the_overrides_that_the_message_is_about_are_named(minimal: Path) -> None:
    message = error_of(minimal, "training_args.seed=1", "jsft_args.max_length=x")
    assert "(with 'jsft_args.max_length=x'): jsft_args.max_length: expected" in message
    long = f"dataset.sources=[{{path: {'x' * 90}}}]"
    message = error_of(minimal, long, "dataset.limit=1")  # "sources" is one of the keys it lists
    assert "(with 'dataset.limit=1'): dataset.limit: unknown" in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("max_new_tokens=2048", "max_new_tokens (2048) must be below max_length (2048)"),
        ("temperature=0", "temperature must be above 0, got 0.0"),
        ("top_p=0", "top_p must be in (0, 1], got 0.0"),
        ("top_p=1.1", "top_p must be in (0, 1], got 1.1"),
        ("top_k=-1", "top_k must be at least 0, got -1"),
        ("num_generations=1", "num_generations must be at least 2, got 1"),
        ("judge_batch_size=0", "judge_batch_size must be at least 1, got 0"),
        ("beta=0", "beta must be above 0, got 0.0"),
        ("loss_type=sigmod", "loss_type sigmod: unknown; did you mean sigmoid?"),
        ("ignore_index=0", "ignore_index must be -100, the label that TRL's losses skip, got 0"),
        ("generation_batch_size=0", "generation_batch_size must be at least 1, got 0"),
        ("rollouts_per_update=0", "rollouts_per_update must be at least 1, got 0"),
        ("generation_batch_tokens=0", "generation_batch_tokens must be at least 1, got 0"),
        ("min_p=1", "min_p must be in [0, 1), got 1"),
        ("repetition_penalty=0", "repetition_penalty must be above 0, got 0"),
        ("loss_type=[]", "loss_type is an empty list"),
        ("loss_type=3", "loss_type: expected text or a list, got a whole number 3"),
        ("pair_selection=random", "pair_selection: expected one of best_worst, best_random, got"),
        ("token_id_a=-1", "token_id_a must be at least 0, got -1"),
        ("global_batch_size=0", "global_batch_size must be at least 1, got 0"),
    ],
)
def test_self_training_settings_that_cannot_work_fail_at_once(override: str, told: str) -> None:
    path = CONFIGS / "hh_self_judge.yaml"
    assert told in error_of(path, f"self_judge_args.{override}", kind="self_judge")


def test_the_two_letters_must_be_two_tokens() -> None:
    path = CONFIGS / "hh_self_judge.yaml"
    overrides = ("self_judge_args.token_id_a=7", "self_judge_args.token_id_b=7")
    told = "token_id_a and token_id_b are the same token (7)"
    assert told in error_of(path, *overrides, kind="self_judge")


@pytest.mark.parametrize("loss", ["nca_pair", "[sigmoid, sft]"])
def test_averaged_log_probabilities_are_for_the_methods_three_losses(loss: str) -> None:
    path = CONFIGS / "hh_self_judge.yaml"
    overrides = ("self_judge_args.average_log_prob=true", f"self_judge_args.loss_type={loss}")
    told = "average_log_prob requires sigmoid, hinge or ipo alone"
    assert told in error_of(path, *overrides, kind="self_judge")


def test_several_losses_may_be_combined() -> None:
    run = self_judge("hh_self_judge", "self_judge_args.loss_type=[sigmoid, sft]")
    assert run.self_judge_args.loss_type == ["sigmoid", "sft"]


def test_rationales_are_given_per_principle() -> None:
    told = "dataset.rationales is true but dataset.principles is false"
    assert told in error_of(CONFIGS / "uf_jsft_pr.yaml", "dataset.principles=false")


def test_a_file_for_the_other_run_is_recognised() -> None:
    told = "it has self_judge_args, so it is a file for train_self_judge.py or `self-judge train`"
    assert told in error_of(CONFIGS / "hh_self_judge.yaml")
    told = "it has jsft_args, so it is a file for train_jsft.py or `self-judge jsft`"
    assert told in error_of(CONFIGS / "hh_jsft.yaml", kind="self_judge")


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert error_of(path) == f"{path}: no such file"


def test_a_missing_extended_file_says_who_asked_for_it(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("extends: none.yaml\nmodel: {}")
    told = f"{tmp_path / 'none.yaml'}: no such file (named by extends in {run})"
    assert error_of(run) == told


def test_files_that_extend_each_other_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\nmodel: {}")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nmodel: {}")
    assert "extends itself through" in error_of(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model:\n  a: [1, 2\nb: 3\n", "run.yaml:3: not valid YAML"),
        ("model:\n\tdtype: x\n", "run.yaml:2: not valid YAML"),
        ("model: {}\nmodel: {}\n", "run.yaml:2: not valid YAML: found duplicate key model"),
        ("", "expected sections such as 'model:', found none"),
        ("- a\n- b\n", "expected sections such as 'model:', found none"),
        ("extends: 3\nmodel: {}", "extends must be a file or a list of files, got 3"),
        (
            "x: !!python/object/apply:os.getcwd []",
            "run.yaml:1: not valid YAML: could not",
        ),
    ],
)
def test_a_file_that_is_no_run_file_says_where(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert told in error_of(path)


def test_a_binary_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\x93\xff\x00")
    assert "cannot be read" in error_of(path)


# --- free sections, accumulation ------------------------------------------------------------------


@dataclass
class FakeTrainingConfig:
    learning_rate: float = 0.0
    warmup_steps: float = 0
    bf16: bool | None = None
    eval_strategy: str = "no"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learning_rat": 1}, "training_args.learning_rat: unknown; did you mean learning_rate?"),
        ({"warmup_ratio": 0.1}, "training_args.warmup_ratio: unknown key; it is now warmup_steps"),
        ({"evaluation_strategy": "no"}, "it is now eval_strategy"),
        ({"learning_rate": "2e-5x"}, "training_args.learning_rate: expected a number, got text"),
        ({"bf16": "yes"}, "training_args.bf16: expected true or false or null, got text 'yes'"),
    ],
)
def test_training_args_are_checked_against_their_class(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"training_args\.") as caught:
        check_training_values(values, FakeTrainingConfig)
    assert told in str(caught.value)


def test_whole_numbers_become_floats_where_the_class_wants_floats() -> None:
    checked = check_training_values({"learning_rate": 1, "bf16": None}, FakeTrainingConfig)
    assert checked == {"learning_rate": 1.0, "bf16": None}
    assert isinstance(checked["learning_rate"], float)


@pytest.mark.parametrize(
    ("global_batch", "per_device", "processes", "steps"),
    [(128, 4, 8, 4), (128, 4, 1, 32), (64, 8, 8, 1)],
)
def test_accumulation_follows_from_the_global_batch(
    global_batch: int, per_device: int, processes: int, steps: int
) -> None:
    assert accumulation_steps(global_batch, per_device, processes) == steps


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((64, 3, 8), "one of [1, 2, 4, 8]"),
        ((8, 16, 1), "one of [1, 2, 4, 8]"),
        ((64, 1, 7), "no per-device batch fits 7 processes"),
        ((64, 0, 1), "must be at least 1"),
    ],
)
def test_a_global_batch_that_does_not_divide_says_what_would(
    arguments: tuple[int, int, int], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation_steps(*arguments)
    assert told in str(caught.value)


def test_run_files_are_read_without_torch() -> None:
    program = (
        "import sys\n"
        "from self_judge.config import hardware\n"
        "from self_judge.config.schema import load_run\n"
        f"load_run({str(CONFIGS / 'uf_jsft_pr.yaml')!r}, [], 'jsft')\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate'}\n"
        "sys.exit(str(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packing_off_needs_no_quotes(tmp_path: Path) -> None:
    # YAML reads a bare `off` as false.
    file = tmp_path / "run.yaml"
    file.write_text(f"extends: {CONFIGS / 'hh_jsft.yaml'}\njsft_args: {{packing: off}}\n")
    assert load_run(file, [], "jsft").jsft_args.packing == "off"
    run = load_run(CONFIGS / "hh_self_judge.yaml", ["self_judge_args.packing=off"], "self_judge")
    assert run.self_judge_args.packing == "off"


def test_shipped_files_are_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_run("hh_jsft", [], "jsft") == load_run(CONFIGS / "hh_jsft.yaml", [], "jsft")
    own = tmp_path / "own.yaml"
    own.write_text((CONFIGS / "hh_jsft.yaml").read_text().replace("templates/hh.yaml", "uf"))
    templates = load_run(own, [], "jsft").templates
    assert templates == load_run("uf_jsft", [], "jsft").templates
    assert JudgeChoice("x", templates="instructions").judge_templates().principles == (
        "instruction_following", "correctness", "overall",
    )  # fmt: skip
    (tmp_path / "hh_jsft").write_text(own.read_text())  # a file here comes first
    assert load_run("hh_jsft", [], "jsft").templates == templates


@pytest.mark.parametrize("name", ["hh_jstf", "jsft_accelerate"])
def test_an_unknown_name_lists_the_shipped_files(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: no such file.*hh_jsft.*uf_principles"):
        load_run(name, [], "jsft")

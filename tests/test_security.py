"""What data, models and run files from strangers cannot do: steer a terminal, run code, get out.

Text becoming control tokens: test_encoding.py. Markup on pages: test_report.py, test_judge_eval.py.
What is promised: docs/security.md.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from conftest import ROOT, TEMPLATES, byte_bpe, tiny_llama, wrap
from self_judge import ChatEncoder, Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.check.model_size import empty_model
from self_judge.cli import main
from self_judge.config.yaml import apply_override, read_yaml
from self_judge.console import neutral
from self_judge.data import synthetic
from self_judge.datatypes import Response
from self_judge.errors import ConfigError, EncodingError, ModelError
from self_judge.judging.voting import aggregate
from self_judge.models import load_model
from self_judge.training.self_training.rollout_log import pairs_table
from self_judge.training.self_training.rollouts import Rollout
from self_judge.training.self_training.vllm_sync import save_adapter

PACKAGE = ROOT / "src" / "self_judge"
# Clears the screen, sets the title, colours by a C1 code, turns the reading direction, hides.
STEERING = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\u2066x\u2069\x7f\x08\u200b[red]x[/red][/b]"


def steers(text: str) -> set[str]:
    """The characters of a text that could steer a terminal; progress bars return the carriage."""
    return {
        c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\n\r\t"
    }


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return out + err


# -- terminals -----------------------------------------------------------------------------------


def test_every_character_that_steers_a_terminal_is_written_out() -> None:
    control = [chr(c) for c in (*range(0x20), *range(0x7F, 0xA0))]
    bidi = [chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C)]
    for c in [*control, *bidi, "\u200b", "\ufeff", "\u2028", "\ud800", "\ue000", "\U000e0041"]:
        shown = neutral(f"a{c}b")
        assert shown == (f"a{c}b" if c == "\n" else f"a{shown[1:-1]}b")
        assert shown.replace("\n", "").isascii()
        assert shown.replace("\n", "").isprintable()
    for text in ("", "é 你好 🙂", "two\nlines", "[red]markup[/red]"):
        assert neutral(text) == text


def test_an_evaluation_prints_names_from_the_data_as_text(
    saved_judge: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # wide enough for every name
    source = write(
        tmp_path / "data.jsonl",
        *({"prompt": f"q {i}", "chosen": STEERING, "rejected": "no", "subset": STEERING}
          for i in range(3)),
    )  # fmt: skip
    output = tmp_path / "out"
    assert main(["eval", str(source), "--model", str(saved_judge), "--output", str(output)]) == 0
    text = printed(capsys)
    assert not steers(text)
    text = "".join(text.split())  # where lines are broken is no matter
    assert "\\x1b[2J" in text
    assert "[red]x[/red][/b]" in text


@pytest.mark.parametrize("command", ["judge", "compare", "tournament"])
def test_commands_that_read_and_write_responses_print_none_of_their_codes(
    command: str, saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(saved_judge)
    out = tmp_path / f"out \x1b[2J {command}[b]"
    if command == "compare":
        a = write(tmp_path / "a.jsonl", {"prompt": STEERING, "response": STEERING})
        b = write(tmp_path / "b.jsonl", {"prompt": STEERING, "response": "no"})
        words = [str(a), str(b), "--judge", model, "--output", str(out)]
    else:
        line = {"context": STEERING, "responses": [STEERING, "no"], STEERING: STEERING}
        words = [str(write(tmp_path / "in.jsonl", line)), str(out), "--model", model]
    assert main([command, *words]) == 0
    assert not steers(printed(capsys))
    # In the files the text is as it was.
    file = out / "pairs.jsonl" if command == "compare" else out
    assert STEERING in _strings(json.loads(file.read_text().splitlines()[0]))


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for each in inner for text in _strings(each)]


def test_an_error_line_that_quotes_a_file_cannot_steer_the_terminal(
    saved_judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = {"role": STEERING, "content": "x"}
    broken = [
        ["tournament", str(write(tmp_path / "in.jsonl", {"prompt": [message]})), "out.jsonl"],
        ["judge", str(write(tmp_path / "j.jsonl", {"context": "q", STEERING: 1})), "out.jsonl"],
        ["judge", str(tmp_path / f"no{STEERING.replace('/', '')}"), "out.jsonl"],
    ]
    for words in broken:
        words = [str(tmp_path / w) if w == "out.jsonl" else w for w in words]
        assert main([*words, "--model", str(saved_judge)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("self-judge: error: ")
        assert "\\x1b" in line
        assert not steers(line)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"jsft_args": {}, STEERING: {}}))
    assert main(["jsft", str(run)]) == 2
    assert not steers(printed(capsys))


def test_the_table_of_sampled_pairs_cannot_steer_the_terminal() -> None:
    verdict = aggregate([((0.6, 0.3), (0.3, 0.6))])
    answers = (Response((1,), STEERING, True), Response((2,), "no", True))
    rollout = Rollout(0, (1,), STEERING, *answers, verdict, True)
    console = Console(width=200, color_system=None, file=(shown := io.StringIO()))
    console.print(pairs_table([rollout], 1))
    text = shown.getvalue()
    assert not steers(text)
    assert "\\x1b[2J" in text


def test_nothing_is_written_as_csv(demo: Path) -> None:
    """A formula in a response cannot run in a spreadsheet: no output is one's own format."""
    suffixes = {path.suffix for path in demo.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".html", ".safetensors", ".jinja", ".bin", ".md"}
    for path in PACKAGE.rglob("*.py"):
        names = {
            getattr(node, "attr", None) or getattr(node, "name", None)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Attribute, ast.alias))
        }
        assert not names & {"csv", "to_csv", "to_excel"}, path.name


# -- code in models, templates and run files -----------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    path = tmp_path / "model"
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def converted(message: str) -> None:
    """Does what the message says."""
    words = shlex.split(re.search(r"python -c .*", message)[0])  # type: ignore[index]
    exec(compile(words[2], "the conversion command", "exec"), {})


def test_a_pickled_model_is_refused_with_the_command_that_converts_it(folder: Path) -> None:
    weights = load_model(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\)") as refused:
        load_model(folder)
    with pytest.raises(ModelError, match="only safetensors"):
        Judge.from_pretrained(folder, TEMPLATES)
    with pytest.raises(ModelError, match="only safetensors"):
        SelfJudgeTrainer(str(folder), judge_templates=TEMPLATES)
    with pytest.raises(ModelError, match="only safetensors"):
        empty_model(str(folder))  # what `check` counts on
    converted(str(refused.value))
    again = load_model(folder).state_dict()
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_a_pickle_that_a_models_configuration_names_is_refused(folder: Path) -> None:
    torch.save(load_model(folder).state_dict(), folder / "weights.dat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "weights.dat"})
    )
    with pytest.raises(ModelError, match=r"pickled weights \(weights.dat\)"):
        load_model(folder)


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(
    folder: Path, tmp_path: Path
) -> None:
    adapted = get_peft_model(
        load_model(folder),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(str(adapter))
    safe = adapter / "adapter_model.safetensors"
    weights = load_file(safe)
    safe.unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights \(adapter_model.bin\)") as refused:
        load_model(adapter)
    converted(str(refused.value))
    again = load_file(safe)
    assert weights.keys() == again.keys()
    load_model(adapter)


def test_a_models_own_code_runs_only_when_asked_for_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    own = {**config, "model_type": "own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(ModelError):
        load_model(folder)
    with pytest.raises(ValueError):
        Judge.from_pretrained(folder, TEMPLATES)
    with pytest.raises(ValueError):
        SelfJudgeTrainer(
            str(folder), judge_templates=TEMPLATES, args=SelfJudgeConfig(str(tmp_path))
        )
    assert not ran.exists()
    assert type(load_model(folder, trust_remote_code=True)).__name__ == "OwnModel"
    assert ran.exists()


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.append.__globals__",
        "cycler.__init__.__globals__.os.popen('touch ' ~ path)",
        "raise_exception.__globals__['__builtins__']",
    ],
)
def test_a_chat_template_is_rendered_in_a_sandbox(expression: str, tmp_path: Path) -> None:
    whole = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ran = tmp_path / "ran"
    template = "{% set path = '" + str(ran) + "' %}" + whole + "{{ " + expression + " }}"
    with pytest.raises(EncodingError, match="cannot render"):
        ChatEncoder(wrap(byte_bpe()), template)
    assert not ran.exists()
    assert ChatEncoder(wrap(byte_bpe()), whole)


def test_a_run_file_is_data_and_runs_nothing(tmp_path: Path) -> None:
    ran, run = tmp_path / "ran", tmp_path / "run.yaml"
    call = f"!!python/object/apply:os.system ['touch {ran}']"
    run.write_text(f"model: {call}\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(run)
    with pytest.raises(ConfigError, match="not valid YAML"):
        apply_override({"model": {}}, f"model={call}")
    assert not ran.exists()
    run.write_text("model: {name: '${oc.env:HOME}'}\n")
    assert read_yaml(run) == {"model": {"name": "${oc.env:HOME}"}}


# -- files and networks --------------------------------------------------------------------------

OUTSIDE = "../../outside/x"


def test_names_from_data_lead_no_file_out_of_the_output_folder(
    model: Any, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> None:
    inside = tmp_path / "deep" / "deeper" / "inside"
    templates = {OUTSIDE: TEMPLATES["helpful"], "/" + OUTSIDE: TEMPLATES["honest"]}
    trainer = SelfJudgeTrainer(
        model=model,
        args=SelfJudgeConfig(
            str(inside / "run"), run_name=OUTSIDE, max_steps=1, per_device_train_batch_size=2,
            max_new_tokens=4, max_length=256, gradient_checkpointing=False, disable_tqdm=True,
            use_cpu=True, logging_steps=1,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(queries[:2]),
        judge_templates=templates,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    judge = inside / "run"
    source = write(
        inside / "data.jsonl",
        {"prompt": "q", "chosen": "a", "rejected": "no", "subset": OUTSIDE, "id": OUTSIDE},
    )
    words = ["eval", str(source), "--model", str(judge), "--output", str(inside / "eval")]
    assert main(words) == 0
    assert main(["report", str(inside)]) == 0
    assert json.loads((inside / "eval" / "results.json").read_text())["subsets"].keys() == {OUTSIDE}
    elsewhere = [p for p in tmp_path.rglob("*") if p.is_file() and inside not in p.parents]
    assert not elsewhere


@pytest.mark.skipif(os.name == "nt", reason="permissions are others there")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_permissions_that_the_umask_leaves(
    umask: int, model: Any, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        trainer = SelfJudgeTrainer(
            model=model,
            args=SelfJudgeConfig(
                str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, save_steps=1,
                max_new_tokens=4, max_length=256, gradient_checkpointing=False, disable_tqdm=True,
                use_cpu=True,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(queries[:2]),
            judge_templates=TEMPLATES,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        save_adapter(adapted, "default", {"x": torch.zeros(1)}, tmp_path / "run" / "adapter")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {"model.safetensors", "adapter_model.safetensors", "judge.json"} <= set(modes)
    assert set(modes.values()) == {0o666 & ~umask}, modes


# Runs a command in which every attempt to reach another machine is noted and fails.
ALONE = """
import sys, threading, time
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        if event == "socket.connect" and isinstance(args[1], (str, bytes)):
            return  # a socket of this machine
        open(sys.argv[1], "a").write(f"{event} {args[-1] if args else ''} {args}\\n")
        raise OSError("no network here")
sys.addaudithook(hook)
from self_judge.cli import main
status = 0
base, taught, policy, *said = sys.argv[2:]
for kind, model, output in (("jsft", base, taught), ("train", taught, policy)):
    words = [w for w in said if kind == "jsft" or not w.startswith("jsft_args")]
    words = [w for w in words if kind == "train" or not w.startswith("self_judge_args")]
    config = f"configs/hh_{'jsft' if kind == 'jsft' else 'self_judge'}.yaml"
    status |= main([kind, config, f"model.model_name_or_path={model}",
                    f"training_args.output_dir={output}", *words])
time.sleep(1)  # what is sent, is sent by threads
sys.exit(status)
"""


def test_training_sends_nothing_anywhere(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tokenizer = synthetic.tiny_tokenizer()
    tiny_llama(len(tokenizer), max_position_embeddings=2048).save_pretrained(base)
    tokenizer.save_pretrained(base)
    source = synthetic.write_dataset("hh", tmp_path / "hh.jsonl", 8, seed=3)
    said = [
        "training_args.max_steps=1", "training_args.per_device_train_batch_size=2",
        "training_args.eval_strategy=no", "training_args.save_strategy=no",
        "training_args.bf16=false", "model.dtype=float32", "dataset.eval=[]",
        f"dataset.sources=[{{path: {source}}}]",
        "jsft_args.global_batch_size=2", "self_judge_args.global_batch_size=2",
        "self_judge_args.max_new_tokens=4",
    ]  # fmt: skip
    attempts, taught = tmp_path / "attempts", tmp_path / "jsft"
    # As a user has it: neither offline nor a continuous integration, for both of which TRL is mute.
    mute = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")
    environment = {k: v for k, v in os.environ.items() if k not in mute}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, attempts, base, taught, tmp_path / "policy", *said],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "policy" / "judge.json").is_file()
    assert not attempts.exists(), attempts.read_text()


def test_nothing_is_reported_unless_a_tracker_is_named() -> None:
    assert SelfJudgeConfig("x", use_cpu=True).report_to == []
    for path in (ROOT / "configs").glob("*.yaml"):
        training = yaml.safe_load(path.read_text()).get("training_args") or {}
        assert training.get("report_to", "none") == "none", path.name

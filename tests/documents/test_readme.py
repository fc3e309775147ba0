"""The README: its examples run, its commands are understood, its links and its tree are right.

The Python blocks are run as they are written, one after the other in one namespace, in a folder
that holds what they name: `path/to/model` and `data.jsonl`. The commands of docs/ are checked here
as well.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import demo_table
import method
import self_judge
from conftest import ROOT, tiny_llama
from self_judge.cli import main
from self_judge.config.arguments import command_parser
from self_judge.config.schema import RunKind, kind_of_run, load_run
from self_judge.data import synthetic
from self_judge.serving.vllm_plugin import VARIABLE

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = Path(self_judge.__file__).parent
KIND_OF_SCRIPT: dict[str, RunKind] = {
    "train_jsft.py": "jsft",
    "train_self_judge.py": "self_judge",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell_commands(text: str) -> Iterator[list[str]]:
    """The commands of all bash blocks, continued lines joined, comments left out."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


COMMANDS = [
    pytest.param(words, id=f"{document.name}: {' '.join(words)}")
    for document in DOCUMENTS
    for words in shell_commands(document.read_text(encoding="utf-8"))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the model and the data that the examples name."""
    tokenizer = synthetic.tiny_tokenizer()
    model = tiny_llama(len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "path/to/model")
    tokenizer.save_pretrained(tmp_path / "path/to/model")
    synthetic.write_dataset("preference", tmp_path / "data.jsonl", 8, seed=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_examples_run_one_after_the_other(folder: Path) -> None:
    examples = blocks(README, "python")
    assert len(examples) == 3  # JSFT, self-training, self-rejection
    namespace: dict[str, Any] = {}
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"README.md, python block {number}", "exec"), namespace)
    assert (folder / "outputs/jsft/judge.json").is_file()
    assert (folder / "outputs/self_judge/adapter_model.safetensors").is_file()
    (own,), (best,) = namespace["responses"], namespace["best"]
    assert len(own) == 16
    assert best in own
    python = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for number, example in enumerate(blocks(python, "python"), start=1):
        exec(compile(example, f"docs/python.md, python block {number}", "exec"), namespace)
    assert (folder / "outputs/sft/judge.json").is_file()
    assert (folder / "outputs/by_query/rollouts").is_dir()
    (judging,) = blocks((ROOT / "docs/judging.md").read_text(encoding="utf-8"), "python")
    exec(compile(judging, "docs/judging.md", "exec"), namespace)
    assert len(namespace["verdict"].probabilities) == 1


def test_the_readme_fits_a_screen_or_two_and_its_figures_are_made_by_commands() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) <= 1_300
    table = README.split(demo_table.BEGIN)[1].split(demo_table.END)[0]
    assert re.match(r"\nSeed \d+, \d+ s on .+ cores, PyTorch ", table)
    for theme, colours in method.THEMES.items():
        drawn = (ROOT / "docs" / "images" / f"method-{theme}.svg").read_text(encoding="utf-8")
        assert drawn == method.drawing(colours)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_import_from_the_package_itself(document: Path) -> None:
    for example in blocks(document.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("self_judge"):
                assert node.module == "self_judge"
                assert {alias.name for alias in node.names} <= set(self_judge.__all__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_dotted_names_that_a_document_mentions_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    folders = [PACKAGE, *(ROOT / name for name in ("tests", "benchmarks", "docs", "examples"))]
    there = [f"/{path}" for folder in folders for path in folder.rglob("*.py")]
    there += [f"/{path}" for path in ROOT.glob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert any(path.endswith(f"/{name}") for path in there), name
    packages = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir())
    for dotted in re.findall(rf"`(?:self_judge\.)?((?:{packages})\.\w+[.\w]*)`", text):
        if dotted.rpartition(".")[2] not in ("json", "jsonl", "counts", "counts_by_source"):
            assert pkgutil.resolve_name(f"self_judge.{dotted}"), dotted


@pytest.fixture(scope="module")
def my(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder `my` of the README, as `self-judge init` writes it."""
    folder = tmp_path_factory.mktemp("readme")
    data = synthetic.write_dataset("preference", folder / "data.jsonl", 60, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["init", "my", "--model", str(base), "--data", str(data)]) == 0
    return folder


def run_of(config: str | Path, overrides: list[str], kind: RunKind) -> None:
    """Reads the run file that a command names; the overrides must be understood as well."""
    assert load_run(ROOT / config, overrides, kind).training_args["output_dir"]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_understood(words: list[str], my: Path) -> None:
    program, *arguments = words
    if program == "self-judge":
        arguments = [str(my / word) if word.startswith("my/") else word for word in arguments]
    if program == "self-judge":
        parsed = command_parser().parse_args(arguments)
        if parsed.command in ("jsft", "train"):
            run_of(parsed.config, parsed.overrides, parsed.kind)
        elif parsed.command == "check":
            own = kind_of_run(ROOT / parsed.config, parsed.overrides)
            run_of(parsed.config, parsed.overrides, own)
    elif program == "accelerate":
        assert arguments[0] == "launch"
        launch = launch_command_parser().parse_args(arguments[1:])
        assert (ROOT / launch.config_file).is_file()
        if launch.module:
            assert launch.training_script == "self_judge.cli"
            command_parser().parse_args(launch.training_script_args)
            return
        assert (ROOT / launch.training_script).is_file()
        config, *overrides = launch.training_script_args
        assert config.startswith("--config=")
        kind = KIND_OF_SCRIPT[launch.training_script]
        run_of(config.removeprefix("--config="), overrides, kind)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif words[:2] == ["pip", "install"]:
        # From a checkout, or by the package's name.
        assert arguments[-2] == "-e" or arguments[-1].startswith("self-judge[")
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        known = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
        extras = re.fullmatch(r"(?:\.|self-judge)(?:\[([a-z,-]+)\])?", arguments[-1])
        assert extras is not None
        named = set((extras[1] or "").split(",")) - {""}
        assert named <= set(re.findall(r"^([\w-]+) = \[", known, re.MULTILINE))
    elif "vllm" in words:
        # Its options are vLLM's own, which is not installed here.
        assert words[words.index("vllm") + 1] == "serve"
        if "VLLM_PLUGINS=self_judge" in words:
            options = dict(word.split("=", 1) for word in words[: words.index("vllm")])
            command_parser().parse_args(["serve", "m", *shlex.split(options[VARIABLE])])
            return
        # Adapters need these two.
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words
        assert "--enable-lora" in words
    else:
        pytest.fail(f"no test knows how to check {' '.join(words)!r}: add it above")


def test_all_six_run_files_are_launched_in_the_readme() -> None:
    launched = [words for words in shell_commands(README) if words[0] == "accelerate"]
    configs = {w.removeprefix("--config=") for words in launched for w in words}
    shipped = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert {c for c in shipped if not c.endswith("accelerate.yaml")} <= configs


def test_what_bad_input_is_told_is_what_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (shown,) = blocks(README, "console")
    lines = shown.splitlines()
    assert len(lines) >= 4
    for command, answer in zip(lines[::2], lines[1::2], strict=True):
        program, *arguments = shlex.split(command.removeprefix("$ "))
        assert program == "self-judge"
        assert main(arguments) == 2
        assert capsys.readouterr().err.strip() == answer


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{document.name} links to {target}"

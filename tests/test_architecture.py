"""The house: which module may lean on which, and what stays out of the light floors.

Every module stands on a floor (docs/architecture.md). It may import from its own floor, without
cycles, and from the floors below.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import self_judge

PACKAGE = Path(self_judge.__file__).parent

FLOORS: list[set[str]] = [
    {
        "errors",
        "datatypes",
        "prompting.judge_templates",
        "config.schema",
        "config.hardware",
        "config.yaml",
        "storage.whole_file",
        "storage.run_dir",
        "storage.jsonl",
        "storage.atomic",
        "console",
    },
    {
        "prompting.text_tokenizer",
        "packing.prefix_tree",
        "packing.chunked_prefill",
        "prompting.chat_encoder",
        "data.sources",
        "data.records",
        "data.dialogues",
        "data.ultrafeedback",
        "data.files",
        "data.synthetic",
        "data.toy_world",
        "data.benchmarks",
    },
    {
        "models",
        "prompting.judge_json",
        "packing.exactness",
        "packing.pass_size",
        "packing.segment_attention",
        "packing.flex_attention",
        "training.lora_layers",
        "packing.passes",
        "packing.segment_passes",
        "packing.packing",
        "packing.fused_head",
        "training.self_training.policy_weights",
        "inference.decoding",
        "inference.lockstep",
        "inference.sampling",
        "inference.letter_scoring",
        "check.model_size",
        "out_of_memory",
        "check.cost_model",
        "judging.judge",
        "inference.vllm.protocol",
        "inference.vllm.colocated",
        "inference.vllm.client",
    },
    {
        "training.jsft.examples",
        "training.jsft.trainer",
        "judging.tournament",
        "training.self_training.rollouts",
        "training.self_training.rollouts_ahead",
        "training.phases",
        "training.self_training.logprob_units",
        "training.self_training.prompts",
        "training.self_training.config",
        "training.callbacks",
        "training.checkpointing",
        "training.oom_retry",
        "training.setup",
        "check.examples",
        "check.workload",
        "check.findings",
        "training.self_training.trainer",
        "training.self_training.vllm_sync",
        "evaluation.statistics",
        "evaluation.calibration",
        "evaluation.judge_metrics",
        "evaluation.length_control",
    },
    {
        "reporting.page",
        "reporting.collect",
        "serving",
        "commands.train",
        "check.check",
        "check.view",
        "commands.tournament",
        "commands.demo",
        "training.progress",
        "commands.shares",
        "commands.judge",
        "commands.eval",
        "reporting.evaluation_page",
        "commands.compare",
        "cli",
        "__main__",
    },
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
HEAVY = ("torch", "trl", "peft", "accelerate", "transformers.modeling_utils")


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported(module: str) -> set[str]:
    """Every name that a module imports, wherever in it: `self_judge.models`, `trl.DPOTrainer`, …"""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py: write imports in full, as the others do"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows(module: str) -> set[str]:
    """The modules of this package that a module leans on."""
    own = {name[11:] for name in imported(module) if name.startswith("self_judge.")}
    # `from self_judge import Judge` leans on where Judge lives.
    own = {f"{self_judge._HOME_OF.get(name, name)}." for name in own}
    return {other for other in MODULES if any(name.startswith(f"{other}.") for name in own)}


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """One cycle of a graph as the path around it, or `None`."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for neighbour in sorted(graph.get(node, ())):
            found = visit(neighbour, [*path, node])
            if found:
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := visit(node, []))), None)


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_module_stands_on_a_floor() -> None:
    assert len(FLOOR_OF) == sum(map(len, FLOORS)), "a module stands on two floors"
    homeless = sorted(set(MODULES) - set(FLOOR_OF))
    assert not homeless, f"give these a floor here and in docs/architecture.md: {homeless}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_leans_on_a_floor_above(module: str) -> None:
    floor = FLOOR_OF.get(module, len(FLOORS))
    above = sorted(name for name in arrows(module) if FLOOR_OF.get(name, 0) > floor)
    assert not above, f"{module} (floor {floor}) imports from above: {above}"


def test_no_modules_lean_on_each_other_in_a_circle() -> None:
    assert cycle({module: arrows(module) for module in MODULES}) is None


def test_the_drawing_sees_arrows_and_circles() -> None:
    # Were the reading of imports broken, the tests above would pass on anything.
    assert {"datatypes", "prompting.chat_encoder", "models", "prompting.judge_templates"} <= arrows(
        "judging.judge"
    )
    assert {"judging.judge", "training.self_training.rollouts", "inference.sampling"} <= arrows(
        "training.self_training.trainer"
    )
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_the_light_floors_import_without_the_heavy_libraries() -> None:
    light = sorted((FLOORS[0] | FLOORS[1]) & set(MODULES))
    names = [f"self_judge.{name}" for name in light]
    assert len(names) >= 3
    code = (
        f"import importlib, sys, self_judge; self_judge.__dir__()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert python(code) == "[]"


@pytest.mark.skipif("cli" not in MODULES, reason="there is no command line yet")
def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = f"import sys, self_judge.cli; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert python(code) == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in self_judge.__all__:
        assert getattr(self_judge, name) is not None
    assert set(self_judge.__all__) <= set(dir(self_judge))
    for name in set(self_judge.__all__) - {"__version__"}:
        assert getattr(self_judge, name).__module__ == f"self_judge.{self_judge._HOME_OF[name]}"
    with pytest.raises(AttributeError, match="no attribute 'Jugde'"):
        self_judge.Jugde  # noqa: B018


def test_only_the_trainer_knows_trls_dpo_trainer() -> None:
    knowing = [m for m in MODULES if any("DPOTrainer" in name for name in imported(m))]
    assert knowing == ["training.self_training.trainer"]
    naming = [
        m
        for m in MODULES
        if any(isinstance(n, ast.Name) and n.id == "DPOTrainer" for n in ast.walk(tree(m)))
    ]
    assert naming == ["training.self_training.trainer"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_does(module: str) -> None:
    docstring = ast.get_docstring(tree(module)) or ""
    assert len(docstring) > 80, f"{module}.py: what it does, and what it does not know"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_swallows_every_error_or_prints(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}.py:{node.lineno}: a bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"{module}.py:{node.lineno}: hasattr"
            if module not in {"cli", "commands.train", "reporting.page"}:
                assert node.func.id != "print", f"{module}.py:{node.lineno}: print in the library"

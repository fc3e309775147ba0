"""The house: which package may lean on which, and what stays out of the light ones.

`ORDER` names what stands in the package's folder: modules and packages. A module imports from its
own package and from what stands earlier, and no modules import each other in a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import self_judge

PACKAGE = Path(self_judge.__file__).parent

ORDER = (
    *("datatypes", "errors", "console", "storage", "prompting", "config", "data"),
    *("runtime", "adapters", "models", "packing", "inference", "judging", "training", "evaluation"),
    *("reporting", "check", "commands", "serving", "cli", "__main__"),
)
LIGHT = ORDER[: ORDER.index("data") + 1]  # import without torch
NAMES_AT_THE_ENTRANCE = 23
MODULES_IN_A_FOLDER = 10
LINES_OF_A_MODULE, LINES_OF_A_FUNCTION, PARAMETERS = 450, 110, 12
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
PACKAGES = sorted(
    ".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.glob("*/**/__init__.py")
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


def rank(module: str) -> int:
    """Where a module, or the package that holds it, stands in `ORDER`."""
    return ORDER.index(module.split(".")[0])


def test_everything_at_the_entrance_stands_once_in_the_order() -> None:
    assert sorted(ORDER) == sorted({module.split(".")[0] for module in MODULES})


def test_nothing_at_the_entrance_hides_a_module_of_python() -> None:
    """`python -m self_judge` starts itself again by the path of its file, one process per GPU.

    Python then looks for every module in this folder first.
    """
    assert not set(ORDER) & sys.stdlib_module_names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_package_and_from_earlier_ones(module: str) -> None:
    later = sorted(name for name in arrows(module) if rank(name) > rank(module))
    assert not later, f"{module} imports from what stands later: {later}"


def test_folders_stay_small_enough_to_be_read_at_a_glance() -> None:
    names = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(names) <= NAMES_AT_THE_ENTRANCE, sorted(names)
    for package in PACKAGES:
        modules = [name for name in MODULES if name.rpartition(".")[0] == package]
        assert len(modules) <= MODULES_IN_A_FOLDER, f"{package}: {modules}"


def test_no_modules_lean_on_each_other_in_a_circle() -> None:
    assert cycle({module: arrows(module) for module in MODULES}) is None


def test_the_drawing_sees_arrows_and_circles() -> None:
    # Were the reading of imports broken, the tests above would pass on anything.
    judge, trainer = "judging.judge", "training.self_training.trainer"
    assert {"datatypes", "prompting.chat_encoder", "models"} <= arrows(judge)
    assert {judge, "training.self_training.rollouts", "inference.lockstep"} <= arrows(trainer)
    assert rank(judge) < rank(trainer)
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) is None


def test_the_light_packages_import_without_the_heavy_libraries() -> None:
    light = [module for module in MODULES if module.split(".")[0] in LIGHT]
    assert len(light) >= len(LIGHT)
    names = [f"self_judge.{module}" for module in (*light, "judging.voting")]
    code = (
        f"import importlib, sys, self_judge; self_judge.__dir__()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert python(code) == "[]"


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


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_one_docstring_of_what_it_knows_and_may_import(package: str) -> None:
    init = tree(f"{package}.__init__")
    docstring = ast.get_docstring(init) or ""
    assert len(init.body) == 1, "a name has one place: import it from its module"
    assert all(words in docstring for words in ("not", "import")), package


@pytest.mark.parametrize("module", MODULES)
def test_no_module_swallows_every_error_or_prints(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{module}.py:{node.lineno}: a bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "hasattr", f"{module}.py:{node.lineno}: hasattr"
            if module not in {"cli", "commands.train", "reporting.page"}:
                assert node.func.id != "print", f"{module}.py:{node.lineno}: print in the library"


def defined(module: str) -> set[str]:
    """The names that a module defines at its top, imported ones left out."""
    names: set[str] = set()
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_name_is_imported_from_the_module_that_defines_it(module: str) -> None:
    for other in arrows(module):
        prefix = f"self_judge.{other}."
        names = {name[len(prefix) :] for name in imported(module) if name.startswith(prefix)}
        assert names <= defined(other), f"{module} imports {names - defined(other)} by {other}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_functions_stay_short_enough_to_be_read(module: str) -> None:
    parsed = tree(module)
    assert (parsed.body[-1].end_lineno or 0) <= LINES_OF_A_MODULE
    for node in ast.walk(parsed):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert (node.end_lineno or 0) - node.lineno < LINES_OF_A_FUNCTION, node.name
        given = node.args
        if node.name.startswith("_") and node.name != "__init__":
            count = len([*given.posonlyargs, *given.args, *given.kwonlyargs])
            assert count <= PARAMETERS, f"{node.name} takes {count} parameters"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_in_one_line_what_it_is(module: str) -> None:
    first = (ast.get_docstring(tree(module)) or "").split("\n\n")[0]
    assert first.endswith("."), f"{module}: {first}"
    assert len(first.splitlines()) == 1, f"{module}: {first}"

"""The pages of docs/ agree with the code: every key with its default, every package, every name."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from test_architecture import ORDER, PACKAGES, tree

import compatibility
import self_judge
from conftest import ROOT
from self_judge import Verdict
from self_judge.config import schema, self_training

CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TRL = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
REPORT = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
JUDGING = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")

LISTS: dict[str, type] = {
    "### `model`": schema.ModelArgs,
    "### `dataset`": schema.DatasetArgs,
    "#### One source, under `sources` or `eval`": schema.Source,
    "### `templates`": schema.TemplateArgs,
    "### `jsft_args`": schema.JSFTArgs,
    "### `self_judge_args`": schema.SelfJudgeArgs,
    "#### Who judges, under `judge`": self_training.JudgeArgs,
}


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    start = text.index(f"{heading}\n") + len(heading)
    following = re.search(r"^#+ ", text[start:], re.MULTILINE)
    return text[start : start + following.start()] if following else text[start:]


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, less its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def keys(text: str) -> dict[str, tuple[str, str]]:
    """The keys in a list of docs/configuration.md: the default and the meaning of each."""
    listed = re.findall(r"^- `(\w+)` \((required|`[^`]+`)\): (.+)$", text, re.MULTILINE)
    assert len(listed) == len(re.findall("^- ", text, re.MULTILINE))
    return {name: (default.strip("`"), meaning) for name, default, meaning in listed}


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@pytest.mark.parametrize("heading", LISTS)
def test_every_key_of_a_run_file_is_listed_with_its_default(heading: str) -> None:
    fields = {f.name: default_of(f) for f in dataclasses.fields(LISTS[heading])}
    described = keys(section(CONFIGURATION, heading))
    assert set(described) == set(fields)
    for name, default in fields.items():
        said, meaning = described[name]
        assert meaning, f"{name} has no meaning"
        if default is dataclasses.MISSING:
            assert said == "required", name
        else:
            assert yaml.safe_load(said) == default, name


def test_every_settings_class_and_section_is_described() -> None:
    settings = {
        c
        for name, c in {**vars(schema), **vars(self_training)}.items()
        if name.endswith(("Args", "Source")) and dataclasses.is_dataclass(c)
    }
    assert settings == set(LISTS.values())
    sections = {
        f.name for c in (schema.JSFTRun, schema.SelfJudgeRun) for f in dataclasses.fields(c)
    }
    listed = re.findall(r"^- `(\w+)`", section(CONFIGURATION, "## Sections"), re.MULTILINE)
    assert set(listed) == sections


def test_the_drawing_of_the_house_has_every_package_in_its_order_as_it_describes_itself() -> None:
    drawing = ARCHITECTURE[ARCHITECTURE.index("```text\n") :].split("```")[1]
    drawn = [line.split(maxsplit=1) for line in drawing.splitlines()[1:]]
    inner = {name.split(".")[1]: name for name in PACKAGES if "." in name}
    assert [name for name, _ in drawn if name not in inner] == list(ORDER)
    said = {inner.get(name, name): phrase for name, phrase in drawn}
    for package in PACKAGES:
        docstring = ast.get_docstring(tree(f"{package}.__init__")) or ""
        assert said[package] == docstring.splitlines()[0].rstrip("."), package


def test_every_override_of_the_seam_is_in_the_text() -> None:
    from trl import DPOTrainer

    from self_judge import SelfJudgeTrainer

    replaced = {
        name
        for owner in SelfJudgeTrainer.__mro__[: SelfJudgeTrainer.__mro__.index(DPOTrainer)]
        for name, value in vars(owner).items()
        if callable(value) and callable(getattr(DPOTrainer, name, None)) and name != "__init__"
    }
    table = rows(section(TRL, "## Overrides"))
    # An older TRL has no telemetry to switch off.
    replaced |= {"_send_telemetry"}
    assert {row[0].strip("`") for row in table} == replaced - {"__annotate__", "__annotate_func__"}


def test_every_field_of_a_verdict_is_explained() -> None:
    explained = {
        name.strip("`")
        for row in rows(section(JUDGING, "## Reading a `Verdict`"))
        for name in row[0].split(", ")
    }
    assert explained == {f.name for f in dataclasses.fields(Verdict)}


def test_pictures_are_small() -> None:
    sizes = {p.name: p.stat().st_size for p in (ROOT / "docs" / "images").iterdir()}
    assert sizes
    assert max(sizes.values()) < 300_000, sizes


def test_every_chart_of_the_report_is_explained() -> None:
    from self_judge.reporting.charts import CHARTS

    explained = ", ".join(row[0].lower() for row in rows(section(REPORT, "## Curves")))
    for chart in CHARTS:
        title = chart.title.lower().removeprefix("jsft: ").removesuffix(" per step")
        assert title in explained, chart.title


def test_what_the_logs_are_called_is_what_the_text_calls_them() -> None:
    from self_judge.training.self_training.rollout_log import rollout_metrics, rollout_totals

    said = set(re.findall(r"`((?:judge|completions)/[^`]+)`", REPORT))
    for name in rollout_metrics(rollout_totals([], ["helpfulness"])):
        assert name.replace("helpfulness", "<principle>") in said, name


def test_every_test_that_the_promises_of_security_name_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = (ROOT / "tests").rglob("test_*.py")
    there = "".join(path.read_text(encoding="utf-8") for path in tests)
    assert len(named) >= 15
    assert not {name for name in named if f"def {name}(" not in there}


def test_the_page_of_public_names_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run: make api"
    listed = re.findall(r"^- `(\w+)\(", api.page(), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(self_judge.__all__)


def test_pages_are_short_and_begin_with_their_purpose() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    # docs/evidence.md is generated from the results of the studies.
    assert sum(len(text.split()) for n, text in pages.items() if n != "evidence.md") <= 15_000
    assert len(ARCHITECTURE.split()) <= 2_000
    for name, text in pages.items():
        assert text.splitlines()[2].startswith("This page "), name


def test_a_test_run_replaces_its_own_row_of_the_compatible_versions() -> None:
    junit = (
        '<testsuites><testsuite tests="12" failures="2" errors="1" skipped="4" '
        'timestamp="2026-01-02T03:04:05"/></testsuites>'
    )
    line = compatibility.row("newest", junit)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1:3] + cells[4:7] == ["newest", "2026-01-02", "5", "3", "4"]
    assert f"torch {torch.__version__}, " in cells[7]
    page = compatibility.updated("| oldest | a |\n| newest | b |\nEnd.\n", line)
    assert page == f"| oldest | a |\n{line}\nEnd.\n"
    assert len(rows(compatibility.PAGE.read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_tested_versions_are_within_the_bounds(python: str) -> None:
    def wanted(lines: Iterable[str]) -> list[Requirement]:
        found = [Requirement(line) for line in lines]
        return [r for r in found if not r.marker or r.marker.evaluate({"python_version": python})]

    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = wanted(line for line in text.splitlines() if not line.startswith("#"))
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)  # one per package
    for bound in wanted(chain(project["dependencies"], *project["optional-dependencies"].values())):
        if bound.name in versions:
            assert bound.specifier.contains(versions[bound.name]), bound

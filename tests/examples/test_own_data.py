"""The notebook runs from its first cell to its last one, on less data and without its pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from conftest import ROOT

SIZES = "BASE, ROWS, STEPS, HELD_OUT = 600, 7500, 20, 200"
SMALL = "BASE, ROWS, STEPS, HELD_OUT = 2, 40, 1, 8"


def test_the_notebook_runs_from_a_data_frame_to_a_tournament(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((ROOT / "examples" / "own_data.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = MagicMock()  # matplotlib is no requirement of the tests
    pictures.subplots.return_value = MagicMock(), (MagicMock(), MagicMock())
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock(pyplot=pictures))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pictures)
    monkeypatch.chdir(tmp_path)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert SIZES in source
    names: dict[str, Any] = {}
    exec(compile(source.replace(SIZES, SMALL), "own_data.ipynb", "exec"), names)
    assert Path("outputs/policy/model.safetensors").is_file()
    assert pictures.subplots.call_count == 2
    assert len(names["best"]) == 5
    for best, own in zip(names["best"], names["responses"], strict=True):
        assert best in own


def test_the_notebook_shows_its_tables_and_pictures() -> None:
    text = (ROOT / "examples" / "own_data.ipynb").read_text(encoding="utf-8")
    kinds = [
        kind
        for cell in json.loads(text)["cells"]
        for output in cell.get("outputs", ())
        for kind in output.get("data", ())
    ]
    assert kinds.count("image/png") == 2
    assert kinds.count("text/html") == 2
    assert "Traceback" not in text

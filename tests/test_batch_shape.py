"""How many tokens a pass holds: measured on the device, kept for the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from self_judge.packing import pass_size
from self_judge.packing.pass_size import busy_tokens, settled_tokens


class Model(nn.Module):
    """Two shapes of matrices, one of them twice, and a head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inside = nn.ModuleList([nn.Linear(size, 2 * size), nn.Linear(2 * size, size)] * 2)
        self.head = nn.Linear(size, 1000)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELF_JUDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pass_size, "_MEASURED", {})


def saturating_at(tokens: int):  # type: ignore[no-untyped-def]
    """A device whose rate grows with the tokens up to here."""
    return lambda matrices, asked: float(min(asked, tokens))


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_twice_the_fewest_tokens_that_keep_the_matrices_busy_are_taken(tokens: int) -> None:
    assert busy_tokens(Model(3), saturating_at(tokens)) == 2 * tokens


def test_one_matrix_of_every_shape_is_measured_and_the_head_is_not() -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def measure(matrices: list[torch.Tensor], tokens: int) -> float:
        shapes.append([tuple(m.shape) for m in matrices])
        return 1.0

    model = Model(4)
    assert busy_tokens(model, measure) == 512
    assert busy_tokens(model, measure) == 512
    assert shapes[0] == [(8, 4), (4, 8)]
    assert len(shapes) == len(pass_size._CANDIDATES)  # and only once for the model


def test_a_machine_is_measured_once_and_later_processes_take_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert busy_tokens(Model(6), saturating_at(512)) == 1024
    monkeypatch.setattr(pass_size, "_MEASURED", {})  # another process
    assert busy_tokens(Model(6), saturating_at(4096)) == 1024


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SELF_JUDGE_CACHE", str(tmp_path / "a file"))
    assert busy_tokens(Model(7), saturating_at(1024)) == 2048
    assert "is not kept" in caplog.text


def test_a_pass_holds_no_more_than_was_tried() -> None:
    assert busy_tokens(Model(8), saturating_at(16_384)) == 16_384


def test_this_machine_is_measured() -> None:
    assert busy_tokens(Model(64)) in pass_size._CANDIDATES


def test_a_run_that_goes_on_keeps_its_passes(tmp_path: Path) -> None:
    first = settled_tokens(Model(5), tmp_path)
    assert json.loads((tmp_path / "batch_shape.json").read_text()) == {"tokens": first}
    (tmp_path / "batch_shape.json").write_text('{"tokens": 777}')
    assert settled_tokens(Model(5), tmp_path) == 777


def test_where_nothing_can_be_measured_a_default_is_taken() -> None:
    model = nn.Sequential(nn.Embedding(10, 4))
    assert busy_tokens(model) == 1024

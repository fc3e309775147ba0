"""How many tokens a pass holds: fixed by device and width, kept for the run, measured on demand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from self_judge.packing import pass_size
from self_judge.packing.pass_size import (
    busy_tokens,
    measured_tokens_per_pass,
    pinned_tokens_per_pass,
    tokens_per_pass,
)


class Model(nn.Module):
    """Two shapes of matrices, one of them twice, and a head."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        super().__init__()
        with torch.device(device):
            self.inside = nn.ModuleList([nn.Linear(size, 2 * size), nn.Linear(2 * size, size)] * 2)
            self.head = nn.Linear(size, 1000)
        text = SimpleNamespace(hidden_size=size)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def saturating_at(tokens: int):  # type: ignore[no-untyped-def]
    """A device whose rate grows with the tokens up to here."""
    return lambda matrices, asked: float(min(asked, tokens))


@pytest.mark.parametrize(
    ("width", "device", "tokens", "busy"),
    [
        (64, "cpu", 4096, 0),
        (576, "cpu", 1024, 0),
        (576, "meta", 16_384, 16_384),
        (2048, "meta", 16_384, 4096),
        (4096, "meta", 8192, 2048),
    ],
)
def test_device_and_width_alone_decide_how_many_tokens_a_pass_holds(
    width: int, device: str, tokens: int, busy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock() -> float:
        raise AssertionError("no clock may decide")

    monkeypatch.setattr(pass_size.time, "perf_counter", clock)
    assert tokens_per_pass(Model(width, device)) == tokens
    assert busy_tokens(Model(width, device)) == busy


def test_a_model_that_does_not_say_how_wide_it_is_has_the_common_figure() -> None:
    assert tokens_per_pass(nn.Sequential(nn.Embedding(10, 4))) == 1024


def test_the_environment_gives_another_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pass_size.ASKED, "777")
    assert tokens_per_pass(Model(5)) == 777
    monkeypatch.setenv(pass_size.ASKED, "measure")
    assert tokens_per_pass(Model(64)) in pass_size._CANDIDATES


def test_a_process_measures_models_of_one_kind_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def clocked(matrices: list[torch.Tensor], tokens: int) -> float:
        sizes.append(matrices[0].shape[1])
        return float(min(tokens, 512))

    monkeypatch.setenv(pass_size.ASKED, "measure")
    monkeypatch.setattr(pass_size, "_MEASURED", {})
    monkeypatch.setattr(pass_size, "_tokens_per_second", clocked)
    model = Model(6)
    found = [tokens_per_pass(m) for m in (model, model, Model(6), Model(7))]
    assert found == [1024] * 4
    assert [sizes.count(n) for n in (6, 7)] == [len(pass_size._CANDIDATES)] * 2


@pytest.mark.parametrize("asked", ["0", "-1", "1e3", "fast", "1.5"])
def test_an_environment_that_names_no_number_is_refused(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(pass_size.ASKED, asked)
    with pytest.raises(ValueError, match="must be a number of tokens or 'measure'"):
        tokens_per_pass(Model(5))


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_measuring_takes_twice_the_fewest_tokens_that_keep_the_matrices_busy(tokens: int) -> None:
    assert measured_tokens_per_pass(Model(3), saturating_at(tokens)) == 2 * tokens


def test_one_matrix_of_every_shape_is_measured_and_the_head_is_not() -> None:
    shapes: list[list[tuple[int, ...]]] = []

    def measure(matrices: list[torch.Tensor], tokens: int) -> float:
        shapes.append([tuple(m.shape) for m in matrices])
        return 1.0

    assert measured_tokens_per_pass(Model(4), measure) == 512
    assert shapes == [[(8, 4), (4, 8)]] * len(pass_size._CANDIDATES)


def test_a_pass_holds_no_more_than_was_tried() -> None:
    assert measured_tokens_per_pass(Model(8), saturating_at(16_384)) == 16_384


def test_where_nothing_can_be_measured_a_default_is_taken() -> None:
    assert measured_tokens_per_pass(nn.Sequential(nn.Embedding(10, 4))) == 1024


def test_a_resumed_run_keeps_its_passes(tmp_path: Path) -> None:
    first = pinned_tokens_per_pass(Model(5), tmp_path)
    assert json.loads((tmp_path / "batch_shape.json").read_text()) == {"tokens": first}
    (tmp_path / "batch_shape.json").write_text('{"tokens": 777}')
    assert pinned_tokens_per_pass(Model(5), tmp_path) == 777


@pytest.mark.parametrize("content", ["{}", "[]", "[" * 100_000, '{"tokens": "many"}'])
def test_a_damaged_file_of_the_passes_is_named_with_what_to_do(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "batch_shape.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}: entries .*: delete this file$"):
        pinned_tokens_per_pass(Model(5), tmp_path)

"""The example of GRPO with pairwise rewards runs on a model folder that JSFT saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import grpo_with_self_judge
from conftest import ROOT
from self_judge import ChatEncoder, save_judge_settings
from self_judge.data import synthetic

pytestmark = pytest.mark.cpu


def test_the_example_trains_a_policy_and_logs_the_judge(tmp_path: Path) -> None:
    tokenizer = synthetic.tiny_tokenizer()
    folder = tmp_path / "jsft"
    synthetic.tiny_model(tokenizer, 0, hidden_size=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    templates = synthetic.judge_templates(principles=False, overall=True)
    encoder = ChatEncoder(tokenizer)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    trainer: Any = grpo_with_self_judge.main(str(folder), str(tmp_path / "grpo"), 1, "swiss")
    log = next(line for line in trainer.state.log_history if "loss" in line)
    assert math.isclose(log["rewards/self_judge/swiss/mean"], 0.5, abs_tol=1e-6)
    assert 0 <= log["judge/order_agreement"] <= 1
    assert (tmp_path / "grpo" / "model.safetensors").is_file()


def test_the_example_fits_a_screen() -> None:
    text = (ROOT / "examples" / "grpo_with_self_judge.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60

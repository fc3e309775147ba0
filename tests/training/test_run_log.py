"""The run log: every number once, also over a resume, and the same ones that trackers get."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from conftest import SMALL, TEMPLATES
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import METRICS, RUN, rollout_files
from self_judge.training.self_training.rollout_log import kl_estimate


def trained(
    folder: Path, model: Any, tokenizer: Any, queries: list[dict[str, Any]], **changes: Any
) -> SelfJudgeTrainer:
    resume = changes.pop("resume", None)
    settings = {
        "max_steps": 3,
        **SMALL,
        "top_p": 1.0,
        **changes,
    }
    trainer = SelfJudgeTrainer(
        model=copy.deepcopy(model),  # PEFT changes the model that it is given
        args=SelfJudgeConfig(str(folder), **settings),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(queries),
        judge_templates=TEMPLATES,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_log_is_a_line_and_the_run_says_what_it_is(
    tmp_path: Path, model: Any, tokenizer: Any, queries: list[dict[str, Any]]
) -> None:
    trainer = trained(tmp_path, model, tokenizer, queries)
    lines = list(read_lines(tmp_path / METRICS))
    logged = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    # Transformers' own printer takes this one out before anybody else hears of it.
    history = [{k: v for k, v in h.items() if k != "total_flos"} for h in trainer.state.log_history]
    assert logged == history
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    for key in ("loss", "rewards/margins", "judge/order_agreement", "judge/win_rate/honest"):
        assert all(math.isfinite(line[key]) for line in lines[:3])
    run = json.loads((tmp_path / RUN).read_text())
    assert run["kind"] == "self_judge"
    assert run["max_steps"] == 3
    assert run["changed_arguments"]["max_new_tokens"] == 6
    assert "weight_decay" not in run["changed_arguments"]
    assert run["arguments"]["weight_decay"] == 0.0
    assert run["judge_templates"].keys() == TEMPLATES.keys()
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert 0 < run["parameters"]["trained"] < run["parameters"]["all"]


def test_a_resumed_run_logs_no_step_twice(
    tmp_path: Path, model: Any, tokenizer: Any, queries: list[dict[str, Any]]
) -> None:
    trained(tmp_path, model, tokenizer, queries, save_strategy="steps", save_steps=2)
    before = list(read_lines(tmp_path / METRICS))
    resumed = trained(
        tmp_path, model, tokenizer, queries, max_steps=4, resume=str(tmp_path / "checkpoint-2")
    )
    after = list(read_lines(tmp_path / METRICS))
    assert [line["step"] for line in after] == [1, 2, 3, 4, 4]
    assert after[:2] == before[:2]
    assert [s for s, _ in rollout_files(tmp_path)] == [1, 2, 3, 4]
    assert json.loads((tmp_path / RUN).read_text())["resumed_at_step"] == 2
    assert resumed.state.global_step == 4


def test_pairs_on_disk_are_bounded(
    tmp_path: Path, model: Any, tokenizer: Any, queries: list[dict[str, Any]]
) -> None:
    trained(tmp_path, model, tokenizer, queries, max_steps=6, rollout_files=2, rollout_pairs=1)
    assert [s for s, _ in rollout_files(tmp_path)] == [1, 5, 6]
    pairs = list(read_lines(rollout_files(tmp_path)[-1][1]))
    assert len(pairs) == 1
    assert pairs[0]["principles"] == list(TEMPLATES)
    assert "<|im_start|>" in pairs[0]["prompt"]


def test_trackers_get_the_same_numbers(
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    queries: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard", reason="pip install -e '.[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained(tmp_path, model, tokenizer, queries, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    lines = list(read_lines(tmp_path / METRICS))
    keys = {k for line in lines[:3] for k in line} - {"step", "time"}
    assert {"objective/kl", "judge/margin", "judge/undecidable", "rewards/margins"} <= keys
    for key in keys:
        events = [(e.step, e.value) for e in board.Scalars(f"train/{key}")]
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], key


def test_the_kl_estimate_is_that_of_the_log_probabilities(
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    queries: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against plain forward passes of policy and reference over the sampled responses."""
    expected: list[float] = []
    roll_out = SelfJudgeTrainer._roll_out

    def spy(self: SelfJudgeTrainer, batches: Any) -> Any:
        rollouts = roll_out(self, batches)
        ratios = []
        for r in (r for batch in rollouts for r in batch if r.decided):
            for response in (r.chosen, r.rejected):
                ids = torch.tensor([[*r.prompt_ids, *response.ids]], device=self.model.device)
                with torch.no_grad():
                    policy = self.model(input_ids=ids).logits
                    with self.model.disable_adapter():
                        reference = self.model(input_ids=ids).logits
                answer = ids[0, len(r.prompt_ids) :, None]
                rows = slice(len(r.prompt_ids) - 1, -1)
                own, other = (
                    x[0, rows].log_softmax(-1).gather(1, answer).sum() for x in (policy, reference)
                )
                ratios.append(float(own - other))
        expected.append(sum(ratios) / len(ratios))
        return rollouts

    monkeypatch.setattr(SelfJudgeTrainer, "_roll_out", spy)
    trained(
        tmp_path, model, tokenizer, queries,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    logged = [line["objective/kl"] for line in read_lines(tmp_path / METRICS) if "loss" in line]
    assert logged == pytest.approx(expected, abs=1e-4)
    assert logged[0] == pytest.approx(0.0, abs=1e-4)
    assert abs(logged[-1]) > 1e-3


def test_undecidable_pairs_are_taken_out_of_the_kl_estimate() -> None:
    # β = 0.5; two batches; of four pairs one is undecidable, hence reward 0.
    assert kl_estimate([0.2, 0.4], [0.1, 0.2], [0.25], 0.5) == pytest.approx(0.45 / 0.75)
    assert kl_estimate([0.0], [0.0], [1.0], 0.5) is None
    assert kl_estimate([], [], [], 0.5) is None


def test_an_averaged_loss_has_no_kl_estimate(
    tmp_path: Path, model: Any, tokenizer: Any, queries: list[dict[str, Any]]
) -> None:
    trained(tmp_path, model, tokenizer, queries, max_steps=1, average_log_prob=True)
    assert not any("objective/kl" in line for line in read_lines(tmp_path / METRICS))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_that_keep_runs_of_their_own_get_the_same_numbers(
    tracker: str,
    tmp_path: Path,
    model: Any,
    tokenizer: Any,
    queries: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = pytest.importorskip(tracker, reason="pip install -e '.[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    got: list[dict[str, Any]] = []
    # `wandb.init` puts the run's own `log` in place of the module's.
    logger = own.sdk.wandb_run.Run if tracker == "wandb" else own
    log = logger.log

    def watched(*args: Any, **kwargs: Any) -> Any:
        got.append(dict(next(a for a in args if isinstance(a, dict))))
        return log(*args, **kwargs)

    monkeypatch.setattr(logger, "log", watched)
    trained(tmp_path, model, tokenizer, queries, report_to=[tracker])
    if tracker == "wandb":  # the other is finished with the training
        own.finish()
    lines = list(read_lines(tmp_path / METRICS))
    logged = [m for m in got if "train/loss" in m]
    assert len(logged) == 3
    for line, metrics in zip(lines, logged, strict=False):
        keys = set(line) - {"step", "time", "epoch"}
        assert {"objective/kl", "judge/margin", "judge/undecidable", "rewards/margins"} <= keys
        assert {key: metrics[f"train/{key}"] for key in keys} == {key: line[key] for key in keys}

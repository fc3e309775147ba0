"""Self-training through an engine: the real trainer and client, against a served tiny model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from conftest import SMALL, TEMPLATES, history, last_logits, tiny_llama
from fake_vllm import LORA, FakeVLLM, serving
from self_judge import Comparison, Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.errors import EngineError
from self_judge.training.self_training.rollouts import BatchesAhead

Make = Callable[..., SelfJudgeTrainer]


class ServedModel(FakeVLLM):
    """vLLM's endpoints over a real (tiny) model, its adapters loaded from their files."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = copy.deepcopy(model).eval()
        self.loaded: dict[str, Any] = {}
        self.every_adapter: list[dict[str, torch.Tensor]] = []

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answer = super().answer(path, body)
        if path == "/v1/load_lora_adapter":
            folder = body["lora_path"]
            self.every_adapter.append(load_file(f"{folder}/adapter_model.safetensors"))
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.base), folder)
            self.loaded[body["lora_name"]] = adapted.eval()
        elif path == "/collective_rpc":
            for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
                self.base.load_state_dict(load_file(file), strict=False)
        return answer

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.loaded.get(body["model"], self.base)
        if body.get("logprob_token_ids"):
            choices = []
            for index, prompt in enumerate(body["prompt"]):
                logprobs = last_logits(model, prompt).log_softmax(-1)
                top = {f"token_id:{t}": logprobs[t].item() for t in body["logprob_token_ids"]}
                choices.append({"index": index, "logprobs": {"top_logprobs": [top]}})
            return 200, {"choices": choices}
        generator = torch.Generator().manual_seed(body["seed"])
        ids = list(body["prompt"])
        for _ in range(body["max_tokens"]):
            probabilities = last_logits(model, ids).softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
            if ids[-1] in body["stop_token_ids"]:
                break
        return 200, {"choices": [{"index": 0, "token_ids": ids[len(body["prompt"]) :]}]}


@pytest.fixture
def served(model: Any) -> Iterator[ServedModel]:
    with serving(ServedModel(model)) as server:
        yield server  # type: ignore[misc]


@pytest.fixture
def make(
    tmp_path: Path, tokenizer: Any, model: Any, queries: list[dict[str, Any]], served: ServedModel
) -> Make:
    def build(model: Any = model, peft_config: Any = None, **changes: Any) -> SelfJudgeTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": served.url,
            "vllm_sync_dir": str(tmp_path / "sync"),
            "generation_batch_size": 4,
            "max_steps": 3,
            **SMALL,
        }
        return SelfJudgeTrainer(
            model=model,
            args=SelfJudgeConfig(**{**settings, **changes}),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(queries),
            judge_templates=TEMPLATES,
            peft_config=peft_config,
        )

    return build


def pairs(trainer: SelfJudgeTrainer, step: int) -> list[dict[str, Any]]:
    path = Path(trainer.output_dir) / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_with_lora_every_step_samples_from_the_adapter_of_that_step(
    make: Make, served: ServedModel
) -> None:
    trainer = make(peft_config=LoraConfig(**LORA))
    trainer.train()
    assert len(served.every_adapter) == 3  # one per step
    assert not any(t.any() for n, t in served.every_adapter[0].items() if "lora_B" in n)
    assert all(t.any() for n, t in served.every_adapter[2].items() if "lora_B" in n)
    assert len(served.adapters) == 1  # the old ones are forgotten
    sampled = [body["model"] for path, body in served.requests if body.get("seed") is not None]
    assert len(sampled) == 3 * 4 * 2
    assert len(set(sampled)) == 3
    assert served.model not in sampled


def test_with_lora_the_bare_base_on_the_server_judges_as_the_frozen_model_would(
    make: Make, served: ServedModel, model: Any, tokenizer: Any
) -> None:
    frozen = copy.deepcopy(model)
    trainer = make(peft_config=LoraConfig(**LORA))
    trainer.train()
    asked = [Comparison("what is it?", "Paris", "no"), Comparison("and now?", "x", "yes, Paris")]
    here = Judge(frozen, tokenizer, TEMPLATES).compare(asked)
    there = trainer.judge.compare(asked)
    for left, right in zip(here, there, strict=True):
        assert left.preferred == right.preferred
        assert torch.tensor(left.probabilities).allclose(
            torch.tensor(right.probabilities), atol=1e-6
        )


def test_a_given_adapter_goes_on_against_its_frozen_copy_on_the_server(
    make: Make, served: ServedModel, model: Any, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**LORA))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    frozen = copy.deepcopy(adapted)
    trainer = make(model=adapted)
    trainer.train()
    assert len(served.adapters) == 2  # the policy of the last step, and the judge
    asked = [Comparison("what is it?", "Paris", "no")]
    (here,) = Judge(frozen, tokenizer, TEMPLATES).compare(asked)
    (there,) = trainer.judge.compare(asked)
    assert torch.tensor(here.probabilities).allclose(torch.tensor(there.probabilities), atol=1e-6)


def test_with_full_fine_tuning_the_server_gets_the_weights_and_the_judge_stays(
    make: Make, served: ServedModel, model: Any
) -> None:
    before = copy.deepcopy(model.state_dict())
    trainer = make()
    trainer.train()
    assert served.paths().count("/collective_rpc") == 3
    assert served.paths().count("/reset_prefix_cache") == 3
    moved = served.base.state_dict()
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    judge = trainer.judge.model.state_dict()
    assert all(torch.equal(judge[name], before[name]) for name in before)
    assert not list(Path(trainer.vllm._folder).iterdir())  # type: ignore[union-attr]


def test_training_through_an_engine_learns_and_writes_what_training_without_does(
    make: Make,
) -> None:
    trainer = make(peft_config=LoraConfig(**LORA))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 5 for loss in losses)
    assert len(pairs(trainer, 1)) == 4
    assert any(entry.get("judge/margin") for entry in trainer.state.log_history)


def test_a_run_repeats_itself_through_an_engine(make: Make, model: Any, tmp_path: Path) -> None:
    first = make(model=copy.deepcopy(model), peft_config=LoraConfig(**LORA))
    first.train()
    again = make(
        model=copy.deepcopy(model),
        peft_config=LoraConfig(**LORA),
        output_dir=str(tmp_path / "again"),
    )
    again.train()
    assert [pairs(first, step) for step in (1, 2)] == [pairs(again, step) for step in (1, 2)]


def test_a_server_of_another_model_is_noticed_before_anything_is_sampled(
    make: Make, served: ServedModel, tokenizer: Any
) -> None:
    served.base = tiny_llama(len(tokenizer), seed=5)
    trainer = make(peft_config=LoraConfig(**LORA))
    with pytest.raises(EngineError, match="the judge differs between vLLM and training"):
        trainer.train()
    assert not any("seed" in body for _, body in served.requests)


def test_weights_that_do_not_arrive_are_noticed(
    make: Make, served: ServedModel, monkeypatch: Any
) -> None:
    monkeypatch.setattr(served, "answer", lambda *args: FakeVLLM.answer(served, *args))
    trainer = make(learning_rate=0.5)
    with pytest.raises(EngineError, match="the policy differs between vLLM and training"):
        trainer.train()


def test_a_server_that_holds_too_few_tokens_is_named(make: Make, served: ServedModel) -> None:
    served.max_model_len = 128
    with pytest.raises(EngineError, match="accept 128 tokens, but max_length is 256"):
        make(peft_config=LoraConfig(**LORA))


def test_an_absent_vllm_is_one_line_with_what_to_install(make: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("self_judge.inference.vllm.colocated.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'self-judge\[vllm\]'"):
        make(vllm_mode="colocate", peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_mode": "serve"}, "vllm_mode must be one of colocate, server"),
        ({"vllm_server_base_url": None}, "needs vllm_server_base_url"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization must be in"),
        ({"vllm_max_model_length": 100}, "must be at least max_length"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


# -- samples drawn ahead ---------------------------------------------------------------------------


def sampling_models(served: ServedModel) -> list[str]:
    """Which adapter every response was drawn from, in the order of the requests."""
    return [body["model"] for _, body in served.requests if body.get("seed") is not None]


def test_ahead_every_step_but_the_first_learns_from_the_policy_before_the_last_update(
    make: Make, served: ServedModel
) -> None:
    trainer = make(
        peft_config=LoraConfig(**LORA),
        rollouts_ahead=True,
        max_steps=4,
        per_device_train_batch_size=2,
    )
    trainer.train()
    assert history(trainer, "rollouts/steps_behind") == [0, 1, 1, 1]
    models = list(dict.fromkeys(sampling_models(served)))
    assert len(sampling_models(served)) == 4 * 2 * 2
    # Two of one policy, which was not updated yet, then those after one and after two updates.
    assert len(models) == len(served.every_adapter) == 4
    untaught, again, once, twice = served.every_adapter
    assert all(torch.equal(untaught[n], again[n]) for n in untaught)
    assert any(not torch.equal(again[n], once[n]) for n in once)
    assert any(not torch.equal(once[n], twice[n]) for n in once)
    assert len(served.adapters) == 1


def test_ahead_the_samples_are_those_that_the_earlier_policy_gives_to_that_step(
    make: Make, served: ServedModel, tmp_path: Path
) -> None:
    # With a learning rate of 0 the policy stays what it is, so being ahead changes nothing.
    on_policy = make(peft_config=LoraConfig(**LORA), learning_rate=0.0)
    on_policy.train()
    ahead = make(
        peft_config=LoraConfig(**LORA),
        learning_rate=0.0,
        rollouts_ahead=True,
        output_dir=str(tmp_path / "ahead"),
    )
    ahead.train()
    for step in (1, 2, 3):
        assert pairs(ahead, step) == pairs(on_policy, step)
    assert history(ahead, "loss") == pytest.approx(history(on_policy, "loss"), abs=1e-6)


def test_ahead_servers_sample_while_the_update_goes_on(make: Make, served: ServedModel) -> None:
    class Patient(TrainerCallback):
        """Holds the first update until the next step's samples are asked for."""

        def __init__(self) -> None:
            self.asked: list[int] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            deadline = time.monotonic() + 20
            expected = 2 * 2 * min(state.global_step + 2, state.max_steps)
            while len(sampling_models(served)) < expected and time.monotonic() < deadline:
                time.sleep(0.01)
            self.asked.append(len(sampling_models(served)))

    trainer = make(
        peft_config=LoraConfig(**LORA), rollouts_ahead=True, per_device_train_batch_size=2
    )
    patient = Patient()
    trainer.add_callback(patient)
    trainer.train()
    assert patient.asked == [8, 12, 12]


def test_ahead_over_the_end_of_an_epoch_a_step_samples_for_itself(
    make: Make, served: ServedModel
) -> None:
    trainer = make(peft_config=LoraConfig(**LORA), rollouts_ahead=True, max_steps=5)
    trainer.train()  # 8 prompts, 4 a step
    assert history(trainer, "rollouts/steps_behind") == [0, 1, 0, 1, 0]
    assert len(pairs(trainer, 5)) == 4


def test_ahead_an_error_of_the_servers_ends_the_run(make: Make, served: ServedModel) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            served.broken = True

    trainer = make(peft_config=LoraConfig(**LORA), rollouts_ahead=True)
    trainer.vllm.engine.servers[0].retry_wait = 0.001  # type: ignore[union-attr]
    trainer.add_callback(Breaks())
    with pytest.raises(EngineError, match="all servers have stopped answering"):
        trainer.train()


def test_only_servers_sample_ahead(tmp_path: Path) -> None:
    for changes in ({}, {"use_vllm": True}):
        with pytest.raises(ValueError, match="rollouts_ahead needs use_vllm with vllm_mode=server"):
            SelfJudgeConfig(str(tmp_path), rollouts_ahead=True, **changes)


def test_a_pass_of_data_gives_the_batches_of_a_step_and_of_the_next() -> None:
    ahead = BatchesAhead()
    data = iter(range(7))
    assert ahead.take(data, 2) == ([0, 1], [2, 3])
    assert ahead.take(data, 2) == ([2, 3], [4, 5])
    assert ahead.take(data, 2) == ([4, 5], [6])
    assert ahead.take(data, 1) == ([6], [])
    assert ahead.take(iter(range(3)), 2) == ([0, 1], [2])

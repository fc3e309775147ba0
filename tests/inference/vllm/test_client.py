"""Servers behind URLs: what is sent, how answers are read, and what happens when one fails."""

from __future__ import annotations

import json
import logging
import math
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fake_vllm import STOP, FakeVLLM, serving
from self_judge import Comparison, Judge
from self_judge.config.self_training import SamplingSettings
from self_judge.errors import EngineError
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import SamplingRequest, VLLMSampler, VLLMScorer
from self_judge.training.self_training.vllm_sync import (
    AdapterError,
    adapter_tensors,
    checkpoint_weights,
    lora_config,
    lora_rank,
    save_adapter,
)

SETTINGS = SamplingSettings(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=5)


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with serving(FakeVLLM()) as server:
        yield server


def client(*servers: FakeVLLM, **changes: Any) -> VLLMServers:
    return VLLMServers([s.url for s in servers], timeout=5, retry_wait=0.001, **changes)


def draw(engine: VLLMServers, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> Any:
    requests = [SamplingRequest(tuple(p), seed) for seed, p in enumerate(prompts)]
    return engine.sample(requests, SETTINGS, [STOP], adapter, lambda n: None)


def unused_url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# -- what travels ----------------------------------------------------------------------------------


def test_prompts_and_answers_travel_as_ids_with_every_setting(fake: FakeVLLM) -> None:
    assert draw(client(fake), [[1, 2], [3, 4]]) == [[3, 4, STOP], [3, 4, STOP]]
    bodies = [body for path, body in fake.requests if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in bodies) == [[1, 2], [3, 4]]
    assert {body["seed"] for body in bodies} == {0, 1}
    for body in bodies:
        sent = {key: body[key] for key in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}
        assert sent == {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.0,
            "max_tokens": 4,
        }
        assert body["repetition_penalty"] == 1.0
        assert (body["ignore_eos"], body["stop_token_ids"]) == (True, [STOP])
        assert body["return_token_ids"]


def test_a_response_is_finished_only_where_a_token_ended_it(
    fake: FakeVLLM, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = VLLMSampler(client(fake), encoder, SETTINGS)
    monkeypatch.setattr(encoder, "stop_token_ids", (STOP,))
    (ended,), (also,) = sampler.sample([[1, 2], [3]], 1, [5, 6])
    assert ended.finished
    assert ended.ids[-1] == STOP
    monkeypatch.setattr(encoder, "stop_token_ids", (500,))
    ((cut,),) = sampler.sample([[1, 2]], 1, [5])
    assert not cut.finished
    assert cut.ids == ended.ids
    assert also.finished


def test_a_response_depends_on_its_own_seed_alone(fake: FakeVLLM, encoder: Any) -> None:
    sampler = VLLMSampler(client(fake), encoder, SETTINGS)
    together = sampler.sample([[1, 2], [3], [4, 4]], 2, [5, 6, 7])
    assert together[1:2] == sampler.sample([[3]], 2, [6])


def test_letters_are_read_over_the_whole_vocabulary_in_the_order_asked(fake: FakeVLLM) -> None:
    prompts = [[i, i + 1] for i in range(7)]
    engine = client(fake, prompts_per_request=3)
    seen: list[int] = []
    got = engine.next_token_logprobs(prompts, (3, 1), None, seen.append)
    assert got == [[-(1.0 + (sum(p) + t) % 5) for t in (3, 1)] for p in prompts]
    assert sum(seen) == 7
    bodies = [body for path, body in fake.requests if path == "/v1/completions"]
    assert sorted(len(body["prompt"]) for body in bodies) == [1, 3, 3]
    assert all(body["logprob_token_ids"] == [3, 1] for body in bodies)
    assert not any("allowed_token_ids" in body for body in bodies)  # that would renormalize


def test_a_judge_on_an_engine_gives_verdicts_from_its_probabilities(
    fake: FakeVLLM, encoder: Any, templates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(encoder), "letter_ids", lambda *_: (3, 1))
    judge = Judge(VLLMScorer(client(fake)), encoder, templates)
    (verdict,) = judge.compare([Comparison("Which?", "this one", "that one")])
    (prompts,) = [body["prompt"] for path, body in fake.requests if path == "/v1/completions"]
    wanted = [[math.exp(-(1 + (sum(p) + t) % 5)) for t in (3, 1)] for p in prompts]
    read = [list(letters) for orders in verdict.probabilities for letters in orders]
    assert torch.tensor(read).allclose(torch.tensor(wanted))
    assert len(prompts) == 2 * len(templates)
    assert judge.max_length == 511  # one token less than the engine holds
    with pytest.raises(ValueError, match="uses an engine"):
        _ = judge.model


def test_logits_in_place_of_log_probabilities_are_noticed(fake: FakeVLLM) -> None:
    engine = client(fake)
    engine.next_token_logprobs = lambda *_: [[3.5, -1.0]]  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="raw_logprobs"):
        VLLMScorer(engine).letter_probabilities([[1]], (3, 1), lambda n: None)


# -- several servers, and servers that fail --------------------------------------------------------


def test_several_servers_share_the_work_and_answers_come_back_in_order() -> None:
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as two:
        prompts = [[i] for i in range(40)]
        answers = draw(client(one, two, concurrency=2), prompts)
        assert answers == [[(2 * i) % 5, (2 * i) % 5 + 1, STOP] for i in range(40)]
        assert len(one.requests) + len(two.requests) == 40
        assert one.requests
        assert two.requests


def test_little_work_is_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(server: FakeVLLM, body: Any) -> Any:
        time.sleep(0.2)
        return complete(server, body)

    complete = FakeVLLM.complete
    monkeypatch.setattr(FakeVLLM, "complete", slowly)
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as other:
        draw(client(one, other), [[i] for i in range(6)])
        asked = [server.paths().count("/v1/completions") for server in (one, other)]
    assert asked == [3, 3]


@pytest.mark.parametrize("failure", [503, 0])
def test_a_busy_server_and_a_lost_connection_are_tried_again(fake: FakeVLLM, failure: int) -> None:
    engine = client(fake)
    fake.failures = [failure, failure]
    assert draw(engine, [[1, 2]]) == [[3, 4, STOP]]
    assert len(fake.requests) == 3


def test_a_server_that_goes_down_is_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as two:
        engine = client(one, two, concurrency=2)
        two.broken = True
        with caplog.at_level(logging.WARNING):
            answers = draw(engine, [[i] for i in range(20)])
        assert answers == [[(2 * i) % 5, (2 * i) % 5 + 1, STOP] for i in range(20)]
        assert caplog.text.count(f"{two.url} gets no more requests") == 1
        two.requests.clear()
        draw(engine, [[1], [2]])
        assert not two.requests


def test_without_any_server_left_the_error_names_them_all() -> None:
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as two:
        engine = client(one, two)
        one.broken = two.broken = True
        with pytest.raises(EngineError, match="all servers have stopped answering") as error:
            draw(engine, [[1], [2]])
        assert one.url in str(error.value)
        assert two.url in str(error.value)
        assert "last checkpoint" in str(error.value)


def test_a_server_that_is_not_there_is_one_line_with_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = unused_url()
    with pytest.raises(EngineError, match=r"no vLLM server answers at .*vllm serve") as error:
        VLLMServers([url], timeout=0.2)
    assert f"no vLLM server answers at {url} yet" in caplog.text  # while it waits
    assert url in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(EngineError, match="vllm_server_base_url"):
        VLLMServers([])


def test_servers_of_different_models_are_refused() -> None:
    with serving(FakeVLLM("one")) as one, serving(FakeVLLM("two")) as two:
        with pytest.raises(EngineError, match="different models: one, two"):
            client(one, two)


def test_what_a_server_refuses_is_said_in_its_words_and_not_tried_again(fake: FakeVLLM) -> None:
    engine = client(fake)
    with pytest.raises(EngineError, match="maximum context length"):
        draw(engine, [[1] * 600])
    assert len(fake.requests) == 1


def test_a_prompt_too_long_for_the_engine_is_named(fake: FakeVLLM, encoder: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 has 510 tokens"):
        VLLMSampler(client(fake), encoder, SETTINGS).sample([[1], [1] * 510])


# -- what training hands over ----------------------------------------------------------------------


@pytest.fixture
def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))


def test_an_adapter_is_loaded_on_every_server_samples_and_is_forgotten(
    adapted: Any, tmp_path: Path
) -> None:
    save_adapter(adapted, "default", adapter_tensors(adapted, "default"), tmp_path / "one")
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as two:
        engine = client(one, two)
        engine.load_adapter("a1", tmp_path / "one")
        assert one.adapters == two.adapters == {"a1": str(tmp_path / "one")}
        assert draw(engine, [[1, 2]], "a1") == [[1, 2, STOP]]
        assert draw(engine, [[1, 2]]) == [[3, 4, STOP]]  # the base is still there
        engine.remove_adapter("a1")
        assert one.adapters == two.adapters == {}
        with pytest.raises(EngineError, match="`a1` does not exist"):
            draw(engine, [[1, 2]], "a1")


def test_a_server_without_runtime_adapters_says_how_to_start_it(
    adapted: Any, tmp_path: Path
) -> None:
    with serving(FakeVLLM(lora=False)) as fake:
        with pytest.raises(EngineError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            client(fake).load_adapter("a1", tmp_path)


def test_an_adapters_files_are_those_that_peft_saves(adapted: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    save_adapter(adapted, "default", adapter_tensors(adapted, "default"), tmp_path / "ours")
    adapted.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [
        json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("ours", "peft")
    ]
    for config in configs:
        del config["inference_mode"]  # PEFT's file says that it is not for training
    assert configs[0] == configs[1]


def test_weights_go_under_their_names_in_a_checkpoint_and_leave_no_files(
    fake: FakeVLLM, model: Any, tmp_path: Path
) -> None:
    names = [name for name, _ in model.named_parameters()]
    engine = client(fake, sync_dir=tmp_path)
    engine.load_weights(checkpoint_weights(model))
    assert sorted(fake.weights) == sorted(names)
    assert fake.paths() == ["/collective_rpc", "/reset_prefix_cache"]
    assert not list(tmp_path.iterdir())


def test_an_adapted_models_base_has_the_names_and_values_of_the_plain_one(model: Any) -> None:
    plain = {name: p.clone() for name, p in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))
    base = dict(checkpoint_weights(adapted))
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_vllm_cannot_load_is_refused_with_the_reason(
    model: Any, changes: dict[str, Any], reason: str
) -> None:
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **changes)
    )
    with pytest.raises(AdapterError, match=reason):
        lora_config(adapted, "default")


def test_the_largest_rank_of_an_adapter_counts(model: Any) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 12},
    )
    assert lora_rank(get_peft_model(model, config), "default") == 12

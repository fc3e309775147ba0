"""Letters: each prompt's own probabilities, whatever shares its pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import tiny_llama
from letter_models import gpt2, reference, with_adapter
from self_judge import Comparison, Judge, JudgeTemplates
from self_judge.inference.letter_scoring import next_token_logits


@pytest.fixture
def judge(model: Any, tokenizer: Any, templates: JudgeTemplates) -> Judge:
    return Judge(model, tokenizer, templates)


def random_prompts(vocabulary: int, seed: int, n: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (n,), generator=generator).tolist()
    return [torch.randint(vocabulary, (t,), generator=generator).tolist() for t in lengths]


class WithoutLogitsToKeep(LlamaForCausalLM):
    """A model that always computes the logits of every position."""

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def model_of_kind(kind: str, vocabulary: int) -> Any:
    if kind == "llama":
        return tiny_llama(vocabulary)
    if kind == "padded vocabulary":
        return tiny_llama(vocabulary + 7)
    if kind == "learned positions":
        return gpt2(vocabulary)
    if kind == "adapter":
        return with_adapter(tiny_llama(vocabulary))
    return WithoutLogitsToKeep(tiny_llama(vocabulary).config).eval()


KINDS = ["llama", "padded vocabulary", "learned positions", "adapter", "no logits_to_keep"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_letter_probabilities_are_those_of_each_prompt_alone(
    tokenizer: Any, templates: JudgeTemplates, kind: str, batch_size: int
) -> None:
    model = model_of_kind(kind, len(tokenizer))
    judge = Judge(model, tokenizer, templates, batch_size=batch_size)
    prompts = random_prompts(len(tokenizer), seed=batch_size)
    expected_N2 = reference(model, prompts, judge.letter_ids)
    found_N2 = judge.letter_probabilities(prompts)
    assert found_N2.shape == (len(prompts), 2)
    assert found_N2.dtype == torch.float32
    torch.testing.assert_close(found_N2.double(), expected_N2, rtol=1e-4, atol=1e-7)


def test_next_token_logits_are_of_the_token_after_each_prompt(model: Any) -> None:
    prompts = [[5, 6, 7], [8], [9, 10]]
    with torch.no_grad():
        logits_BV = next_token_logits(model, prompts)
        for row, prompt in zip(logits_BV, prompts, strict=True):
            alone = model(torch.tensor([prompt], device=model.device)).logits[0, -1].cpu()
            torch.testing.assert_close(row.cpu(), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_judge_attends_without_cudnn(
    model: Any, tokenizer: Any, templates: JudgeTemplates, packing: Any
) -> None:
    judge = Judge(model, tokenizer, templates, packing=packing)
    judge.letter_probabilities([[5]])  # tries the model once
    allowed: list[bool] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    judge.letter_probabilities([[5, 6, 7], [5, 6, 8]])
    assert allowed
    assert not any(allowed)


def test_logits_to_keep_is_used_where_the_model_has_it(model: Any) -> None:
    seen: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        next_token_logits(model, [[5] * 40, [6] * 40, [7] * 30])
    assert seen == [(3, 2, 32)]  # two lengths, not forty positions


def test_an_adapter_changes_the_verdict_and_turning_it_off_brings_the_base_back(
    tokenizer: Any, templates: JudgeTemplates
) -> None:
    comparison = Comparison("what is it?", "yes", "no")
    plain = Judge(tiny_llama(len(tokenizer)), tokenizer, templates).compare([comparison])[0]
    adapted = with_adapter(tiny_llama(len(tokenizer)))
    judge = Judge(adapted, tokenizer, templates)
    assert judge.compare([comparison])[0].score_a != pytest.approx(plain.score_a, rel=1e-3)
    with adapted.disable_adapter():
        assert judge.compare([comparison])[0].score_a == pytest.approx(plain.score_a, rel=1e-5)

"""Sampling: exact draws from the model, by seeds of their own and the sampler's settings alone."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
)
from transformers.generation.logits_process import TopPLogitsWarper

from conftest import byte_bpe, on_test_device, tiny_llama, wrap
from self_judge import ChatEncoder
from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Response, stable_seed
from self_judge.inference import sampling
from self_judge.inference.decoding import cache_bytes
from self_judge.inference.logits_processors import TopP, seeded_gumbel
from self_judge.inference.sampling import TransformersSampler, tokens_that_fit

PROMPTS = [[70, 71, 72], [80], [90, 91, 92, 93, 94, 95, 96, 97], [100, 101]]


class EndsOften(LlamaForCausalLM):
    """A model that ends its answers about one time in five."""

    bias = 4.0
    stop = 4

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., self.stop] += self.bias
        return output


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    model = EndsOften(tiny_llama(len(tokenizer)).config).eval()
    model.load_state_dict(tiny_llama(len(tokenizer)).state_dict())
    return on_test_device(model)


def sampler(
    model: Any, encoder: ChatEncoder, batch_size: int = 64, **settings: Any
) -> TransformersSampler:
    return TransformersSampler(
        model, encoder, SamplingSettings(**{"max_new_tokens": 12, **settings}), batch_size
    )


# -- the noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 767])
def test_seeded_noise_is_gumbel_distributed(step: int) -> None:
    noise = seeded_gumbel(torch.arange(8) * 12345, step, 5000).flatten().double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 0.01


def test_the_upper_tail_of_the_noise_reaches_as_far_as_it_should() -> None:
    # The largest of n Gumbel numbers lies about ln n high; a coarse uniform would cut it off.
    highest_B = seeded_gumbel(torch.arange(64), 0, 50_000).max(1).values.double().numpy()
    assert (
        stats.kstest(highest_B, "gumbel_r", args=(torch.tensor(5e4).log().item(), 1)).pvalue > 0.01
    )
    assert torch.isfinite(seeded_gumbel(torch.arange(64), 1, 50_000)).all()


def test_noise_of_other_seeds_steps_and_tokens_is_unrelated() -> None:
    seeds = torch.arange(6)
    rows = torch.cat([seeded_gumbel(seeds, step, 4000) for step in range(3)])
    shifted = torch.cat([rows[:, :-1], rows[:, 1:]])  # and neighbouring tokens
    correlation = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert correlation.abs().max() < 5 / 4000**0.5


def test_noise_is_a_function_of_seed_step_and_token_alone() -> None:
    wide = seeded_gumbel(torch.tensor([3, -7, 2**62]), 5, 300)
    assert torch.equal(seeded_gumbel(torch.tensor([2**62]), 5, 100)[0], wide[2, :100])


def splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_noise_is_splitmix64_as_written_for_unsigned_integers() -> None:
    seed, step, token = -987654321, 41, 17
    row = splitmix64((seed + splitmix64(step)) % 2**64)
    bits = splitmix64((row + token * 0x9E3779B97F4A7C15) % 2**64)
    uniform = ((bits >> 32) + 0.5) / 2**32
    found = seeded_gumbel(torch.tensor([seed]), step, 20)[0, token].item()
    assert found == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-5)


def test_drawing_noise_leaves_the_seeds_as_they_are() -> None:
    seeds = torch.tensor([3, 4])
    seeded_gumbel(seeds, 1, 10)
    assert seeds.tolist() == [3, 4]


def test_seeds_are_the_same_on_every_machine() -> None:
    assert stable_seed(7, "x") == stable_seed(7, "x") == 3342883595432647715
    assert (
        len({stable_seed(1, 23), stable_seed(12, 3), stable_seed(123), stable_seed(1, 2, 3)}) == 4
    )
    assert all(0 <= stable_seed(i) < 2**63 for i in range(100))


# -- samples follow the model ----------------------------------------------------------------------


def exact_next(model: Any, ids: list[int], s: SamplingSettings) -> torch.Tensor:
    """The distribution that should be sampled from, written down anew, in double precision."""
    with torch.no_grad():
        logits_V = (
            model(torch.tensor([ids], device=model.device)).logits[0, -1].cpu().double()
            / s.temperature
        )
    if s.top_k:
        logits_V[logits_V < logits_V.sort(descending=True).values[s.top_k - 1]] = -torch.inf
    p_V = logits_V.softmax(-1)
    sorted_V, order_V = p_V.sort(descending=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    p_V[order_V[before_V >= s.top_p]] = 0
    p_V[p_V < s.min_p * p_V.max()] = 0
    return p_V / p_V.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"top_p": 0.7},
    {"top_k": 9},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_samples_follow_the_models_distribution(
    model: Any, encoder: ChatEncoder, settings: dict[str, Any]
) -> None:
    n = 3000
    one = sampler(model, encoder, batch_size=1000, max_new_tokens=1, **settings)
    drawn = [r.ids[0] for r in one.sample([PROMPTS[0]], n, seeds=11)[0]]
    p_V = exact_next(model, PROMPTS[0], one.settings)
    count_V = torch.bincount(torch.tensor(drawn), minlength=len(p_V)).double()
    assert count_V[p_V == 0].sum() == 0, "a token outside the nucleus was drawn"
    common_V = p_V * n >= 5
    observed = [*count_V[common_V].tolist(), count_V[~common_V].sum().item()]
    expected = [*(p_V * n)[common_V].tolist(), (p_V * n)[~common_V].sum().item()]
    if expected[-1] < 5:  # too rare to count for itself
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(expected) > 5
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_the_second_token_follows_the_model_given_the_first(
    model: Any, encoder: ChatEncoder
) -> None:
    two = sampler(model, encoder, batch_size=1000, max_new_tokens=2, top_k=3)
    drawn = [r.ids for r in two.sample([PROMPTS[0]], 2000, seeds=5)[0]]
    first_V = exact_next(model, PROMPTS[0], two.settings)
    observed, expected = [], []
    for first in first_V.nonzero().flatten().tolist():
        if first in encoder.stop_token_ids:
            observed.append(drawn.count((first,)))
            expected.append(2000 * first_V[first].item())
            continue
        second_V = exact_next(model, [*PROMPTS[0], first], two.settings)
        for second in second_V.nonzero().flatten().tolist():
            observed.append(drawn.count((first, second)))
            expected.append(2000 * (first_V[first] * second_V[second]).item())
    assert sum(observed) == 2000
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_temperature_zero_takes_the_most_likely_tokens(model: Any, encoder: ChatEncoder) -> None:
    greedy = sampler(model, encoder, temperature=0.0)
    for prompt, (first, second) in zip(PROMPTS, greedy.sample(PROMPTS, 2), strict=True):
        assert first == second
        ids = list(prompt)
        for token in first.ids:
            assert token == exact_next(model, ids, SamplingSettings()).argmax()
            ids.append(token)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])  # a nucleus of most tokens, and of few
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(spread: float, top_p: float) -> None:
    drawn = torch.Generator().manual_seed(1)
    scores_BV = spread * torch.randn(6, 2000, generator=drawn)
    scores_BV[0, :1500] = -torch.inf  # as top-k leaves it
    expected_BV = TopPLogitsWarper(top_p)(torch.empty(0), scores_BV)
    assert torch.equal(TopP(top_p)(torch.empty(0), scores_BV), expected_BV)


# -- seeds and batches -----------------------------------------------------------------------------


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["rotary positions", "learned positions"])
@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"repetition_penalty": 3.0}], ids=str)
def test_a_response_does_not_depend_on_what_shares_its_batch(
    model: Any, tokenizer: Any, encoder: ChatEncoder, kind: str, settings: dict[str, Any]
) -> None:
    model = model if kind == "rotary positions" else gpt2(len(tokenizer))
    seeds = [21, 22, 23, 24]
    together = sampler(model, encoder, **settings).sample(PROMPTS, 3, seeds)
    alone = [
        sampler(model, encoder, batch_size=1, **settings).sample([prompt], 3, [seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    reversed_ = sampler(model, encoder, batch_size=5, **settings).sample(
        PROMPTS[::-1], 3, seeds[::-1]
    )
    assert reversed_[::-1] == alone


def test_batches_hold_a_prompts_samples_together_within_their_limits(
    model: Any, encoder: ChatEncoder
) -> None:
    draw = TransformersSampler(
        model, encoder, SamplingSettings(max_new_tokens=10), 8, batch_tokens=120
    )
    batches = draw._batches([30, 2, 3, 40, 5], 3)
    assert batches == [
        [(3, range(2))],  # 40 + 10 tokens: two fit, and a third waits
        [(3, range(2, 3))],
        [(0, range(3))],
        [(4, range(3)), (2, range(3))],
        [(1, range(3))],
    ]
    expected = sampler(model, encoder).sample(PROMPTS, 3, seeds=4)
    narrow = TransformersSampler(
        model, encoder, SamplingSettings(max_new_tokens=12), 64, batch_tokens=30
    )
    assert narrow.sample(PROMPTS, 3, seeds=4) == expected


def test_by_default_a_cache_holds_what_fits_beside_the_weights() -> None:
    gib = 2**30
    llama_2_7b, llama_3_8b = 2**19, 2**17  # bytes a token in half precision: 32 heads, and 8
    assert tokens_that_fit(llama_2_7b, 13 * gib, 79 * gib) == 33 * 2048
    assert tokens_that_fit(llama_3_8b, 15 * gib, 79 * gib) == 32 * 8192
    assert tokens_that_fit(llama_2_7b, 13 * gib, 23 * gib) == 5 * 2048
    assert tokens_that_fit(2 * llama_2_7b, 26 * gib, None) == 4 * 1024  # on a CPU, in float32
    assert tokens_that_fit(llama_2_7b, 79 * gib, 79 * gib) == 1


@pytest.mark.cpu
def test_batches_go_by_the_bytes_of_the_cache_unless_tokens_are_given(
    model: Any, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = sampler(model, encoder, max_new_tokens=10)
    expected = draw.sample(PROMPTS, 3, seeds=4)
    assert draw._batches([30, 10], 4) == [[(0, range(4)), (1, range(4))]]
    per_token = cache_bytes(model)
    monkeypatch.setattr(sampling, "_CPU_CACHE", 80 * per_token)
    assert draw._batches([30, 10], 4) == [
        [(0, range(2))],
        [(0, range(2, 4))],
        [(1, range(4))],
    ]
    assert draw.sample(PROMPTS, 3, seeds=4) == expected


def test_a_model_that_cannot_share_prompts_samples_through_its_own_generate(
    encoder: ChatEncoder, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8,
            num_heads=8, head_dim=8, n_groups=1, chunk_size=8,
        )
    ).eval()  # fmt: skip
    draw = sampler(model, encoder, batch_size=3)
    responses = draw.sample(PROMPTS, 2, seeds=3)
    alone = sampler(model, encoder, batch_size=1)
    assert responses == [
        alone.sample([p], 2, [stable_seed(3, i)])[0] for i, p in enumerate(PROMPTS)
    ]
    assert len({r.ids for own in responses for r in own}) > 4


@pytest.mark.parametrize("shared", [True, False])
def test_sampling_keeps_attention_from_cudnn(
    model: Any, encoder: ChatEncoder, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "why_not_shared", lambda _: None if shared else "for this test")
    allowed: list[bool] = []
    model.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    sampler(model, encoder).sample(PROMPTS)
    assert len(allowed) > 1
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_log_probs_are_those_of_each_response_alone_in_float64(
    model: Any, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = random.Random(0)
    prompts = [[g.randrange(1, 40) for _ in range(g.randrange(1, 9))] for _ in range(5)]
    own = sampler(model, encoder, max_new_tokens=7)
    responses = own.sample(prompts, 3, seeds=4)
    monkeypatch.setattr(sampling, "_LOGITS", 40 * own._vocabulary)  # several batches
    found = own.log_probs(prompts, responses)
    exact = copy.deepcopy(model).double()
    for prompt, texts, sums in zip(prompts, responses, found, strict=True):
        for response, log_prob in zip(texts, sums, strict=True):
            ids = torch.tensor([[*prompt, *response.ids]])
            log_p_TV = exact(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_p_TV.gather(-1, ids[0, len(prompt) :, None]).sum().item()
            assert log_prob == pytest.approx(expected, abs=1e-4)


def test_more_samples_begin_with_the_same_ones(model: Any, encoder: ChatEncoder) -> None:
    draw = sampler(model, encoder)
    few, many = draw.sample(PROMPTS, 2, seeds=3), draw.sample(PROMPTS, 5, seeds=3)
    assert [own[:2] for own in many] == few


def test_samples_differ_between_draws_prompts_and_seeds(model: Any, encoder: ChatEncoder) -> None:
    draw = sampler(model, encoder)
    own = draw.sample([PROMPTS[0]] * 2, 8, seeds=0)
    drawn = {r.ids for responses in [*own, *draw.sample([PROMPTS[0]], 8, [5])] for r in responses}
    assert len(drawn) > 18  # short answers may well meet
    assert draw.sample([PROMPTS[0]] * 2, 8, seeds=0) == own


def test_torchs_own_random_state_is_neither_used_nor_changed(
    model: Any, encoder: ChatEncoder
) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sampler(model, encoder).sample(PROMPTS, 2, seeds=9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert sampler(model, encoder).sample(PROMPTS, 2, seeds=9) == first


# -- the end of a response -------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["<pad>", "<|im_end|>"])
def test_the_end_of_turn_stands_only_where_the_model_emitted_it(model: Any, padding: str) -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.pad_token = padding  # also where padding looks like an end
    draw = sampler(model, ChatEncoder(tokenizer), max_new_tokens=6)
    responses = [r for own in draw.sample(PROMPTS, 12, seeds=1) for r in own]
    assert {r.finished for r in responses} == {True, False}
    for r in responses:
        assert r.ids.count(EndsOften.stop) == int(r.finished)
        assert (r.ids[-1] == EndsOften.stop) == r.finished
        assert 1 <= len(r.ids) <= 6
        assert r.finished or len(r.ids) == 6
        assert "<|im_end|>" not in r.text
        assert r.text == r.text.strip()


def test_an_end_as_the_very_last_token_counts_as_finished(model: Any, encoder: ChatEncoder) -> None:
    model.bias = 100.0
    response = sampler(model, encoder, max_new_tokens=1).sample([PROMPTS[0]])[0][0]
    assert response == Response((EndsOften.stop,), "", finished=True)


def test_padding_is_not_penalized_as_a_repetition(model: Any) -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.pad_token = tokenizer.eos_token
    model.bias = 14.0
    draw = sampler(model, ChatEncoder(tokenizer), temperature=0.0, repetition_penalty=9.0)
    alone = draw.sample([PROMPTS[1]])
    assert alone[0][0].finished
    assert draw.sample([PROMPTS[1], PROMPTS[2]])[0] == alone[0]


def test_the_repetition_penalty_keeps_tokens_from_coming_again(
    model: Any, encoder: ChatEncoder
) -> None:
    model.bias = -100.0  # never ends
    own = sampler(model, encoder, repetition_penalty=1e6).sample(PROMPTS, 2)
    for prompt, responses in zip(PROMPTS, own, strict=True):
        for response in responses:
            assert len({*prompt, *response.ids}) == len(prompt) + len(response.ids)


# -- the model is left as it was -------------------------------------------------------------------


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return get_peft_model(model, config)


OWN = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "repetition_penalty": 5.0,
    "max_new_tokens": 2,
    "suppress_tokens": [80, 81, 82],
    "eos_token_id": 7,
}


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_the_models_own_generation_settings_are_neither_used_nor_changed(
    model: Any, encoder: ChatEncoder, kind: str
) -> None:
    base, model = model, adapted(model) if kind == "adapter" else model
    expected = sampler(model, encoder).sample(PROMPTS, 2)
    base.generation_config.update(**OWN)
    config, content = base.generation_config, base.generation_config.to_dict()
    attributes = set(vars(model))
    assert sampler(model, encoder).sample(PROMPTS, 2) == expected
    assert base.generation_config is config
    assert config.to_dict() == content
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("kind", ["plain", "adapter"])
def test_settings_and_modes_come_back_when_sampling_fails(
    model: Any, encoder: ChatEncoder, kind: str
) -> None:
    base, model = model, adapted(model) if kind == "adapter" else model
    model.train()
    base.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config, attributes = base.generation_config, set(vars(model))
    base.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler(model, encoder).sample(PROMPTS)
    assert base.generation_config is config
    assert set(vars(model)) == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_sampling_is_without_dropout_and_the_mode_comes_back(
    tokenizer: Any, encoder: ChatEncoder
) -> None:
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)
    expected = sampler(model, encoder).sample(PROMPTS)
    model.train()
    assert sampler(model, encoder).sample(PROMPTS) == expected
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_prompts_of_the_caller_stay_as_they_are(model: Any, encoder: ChatEncoder) -> None:
    prompts = [list(p) for p in PROMPTS]
    sampler(model, encoder).sample(prompts, 2)
    assert prompts == PROMPTS


# -- settings and input that cannot work -----------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


def test_input_that_cannot_work_is_named(model: Any, encoder: ChatEncoder) -> None:
    draw = sampler(model, encoder)
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        sampler(model, encoder, batch_size=0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        draw.sample(PROMPTS, 0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        draw.sample([[5], []])
    with pytest.raises(ValueError, match="4 prompts and 2 seeds"):
        draw.sample(PROMPTS, 1, [1, 2])


def test_no_prompts_give_no_responses(model: Any, encoder: ChatEncoder) -> None:
    assert sampler(model, encoder).sample([]) == []


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(model: Any) -> None:
    tokenizer = wrap(byte_bpe(), "{% for m in messages %}\n{{ m['content'] }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"there is no stop token.*eos_token"):
        sampler(model, ChatEncoder(tokenizer))


# -- the model's context ---------------------------------------------------------------------------


def test_sampling_beyond_the_models_context_is_told_once(
    model: Any, encoder: ChatEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    context = model.config.max_position_embeddings = 32
    within = sampler(model, encoder, max_new_tokens=context - 8)
    within.sample(PROMPTS)
    assert not caplog.messages
    beyond = sampler(model, encoder, max_new_tokens=context - 7)
    for _ in range(2):
        beyond.sample(PROMPTS)
    assert caplog.messages == [
        "a prompt of 8 tokens and max_new_tokens 25 exceed the model's context of 32 tokens: lower "
        "max_new_tokens, or leave out long prompts"
    ]

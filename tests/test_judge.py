"""The judge: the vote, the probabilities it rests on, and what it leaves as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from conftest import TEMPLATES, tiny_llama
from self_judge import ChatEncoder, Comparison, Judge, JudgeTemplates, Verdict
from self_judge.inference.letter_scoring import TransformersScorer, next_token_logits
from self_judge.judging.voting import aggregate, swap_averaged
from self_judge.prompting.judge_json import save_judge_settings

A_WINS = ((0.6, 0.2), (0.3, 0.5))  # s(a) = 0.55, s(b) = 0.25; both orders say a
B_WINS = ((0.1, 0.7), (0.4, 0.2))  # s(a) = 0.15, s(b) = 0.55; both orders say b
TIE = ((0.5, 0.25), (0.5, 0.25))  # the letter A, whatever it names: pure position bias


# -- the vote --------------------------------------------------------------------------------------


def test_a_score_is_the_mean_likelihood_of_a_response_over_both_orders() -> None:
    assert swap_averaged(A_WINS) == pytest.approx((0.55, 0.25))
    assert swap_averaged(B_WINS) == pytest.approx((0.15, 0.55))


def test_one_principle_decides_alone() -> None:
    verdict = aggregate([A_WINS])
    assert verdict.preferred == "a"
    assert (verdict.score_a, verdict.score_b) == pytest.approx((0.55, 0.25))
    assert verdict.margin == pytest.approx(0.30)
    assert verdict.win_rate == 1.0
    assert verdict.orders_agree
    assert verdict.undecidable_because is None
    assert verdict.probabilities == (A_WINS,)


def test_the_majority_of_principles_wins_against_a_larger_mean_score() -> None:
    narrowly_a = ((0.30, 0.29), (0.29, 0.30))
    verdict = aggregate([narrowly_a, narrowly_a, B_WINS])
    assert verdict.score_b > verdict.score_a
    assert verdict.preferred == "a"
    assert verdict.win_rate == pytest.approx(2 / 3)
    assert verdict.margin < 0


def test_three_of_four_principles_are_a_majority() -> None:
    verdict = aggregate([B_WINS, B_WINS, A_WINS, B_WINS])
    assert verdict.preferred == "b"
    assert verdict.win_rate == pytest.approx(0.25)


def test_an_even_split_goes_to_the_larger_mean_score() -> None:
    verdict = aggregate([A_WINS, B_WINS, A_WINS, B_WINS])  # means 0.35 and 0.40
    assert verdict.win_rate == 0.5
    assert verdict.preferred == "b"
    assert verdict.margin == pytest.approx(-0.05)


def test_a_tied_principle_votes_for_neither() -> None:
    verdict = aggregate([TIE, A_WINS, TIE])
    assert verdict.preferred == "a"
    assert verdict.win_rate == pytest.approx(2 / 3)


def test_an_exact_tie_is_undecidable_and_says_so() -> None:
    mirrored = ((0.6, 0.2), (0.2, 0.6)), ((0.2, 0.6), (0.6, 0.2))
    for probabilities in ([TIE], [TIE] * 4, mirrored):
        verdict = aggregate(probabilities)
        assert verdict.preferred is None
        assert verdict.undecidable_because == "an exact tie"
        assert verdict.win_rate == 0.5
        assert verdict.margin == 0.0
        assert math.isfinite(verdict.score_a)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_undecidable_even_if_the_others_agree(broken: float) -> None:
    verdict = aggregate([A_WINS, A_WINS, A_WINS, ((0.1, 0.1), (broken, 0.1))])
    assert verdict.preferred is None
    assert "not finite" in str(verdict.undecidable_because)
    assert verdict.orders_agree is False
    assert verdict.win_rate == 0.5
    assert all(map(math.isnan, (verdict.margin, verdict.score_a, verdict.score_b)))


def test_orders_agree_only_if_each_alone_prefers_the_same_response() -> None:
    assert aggregate([B_WINS]).orders_agree
    assert not aggregate([TIE]).orders_agree  # position bias
    assert not aggregate([((0.9, 0.1), (0.5, 0.4))]).orders_agree
    assert not aggregate([((0.9, 0.1), (0.4, 0.4))]).orders_agree  # the second has no opinion


def test_an_order_prefers_by_its_own_two_letters() -> None:
    assert aggregate([((0.6, 0.5), (0.3, 0.7))]).orders_agree
    assert not aggregate([((0.4, 0.5), (0.1, 0.45))]).orders_agree


def test_a_vote_without_principles_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one principle"):
        aggregate([])


probability = st.floats(0, 1, allow_nan=False, width=32)
order = st.tuples(probability, probability)


@given(st.lists(st.tuples(order, order), min_size=1, max_size=5))
def test_swapping_the_comparison_swaps_the_verdict(probabilities: list[Any]) -> None:
    verdict = aggregate(probabilities)
    of_swapped = aggregate([(second, first) for first, second in probabilities])
    swapped = verdict.swapped()
    assert swapped.preferred == of_swapped.preferred
    assert swapped.probabilities == of_swapped.probabilities
    assert swapped.orders_agree == of_swapped.orders_agree
    assert swapped.win_rate == pytest.approx(of_swapped.win_rate)
    assert (swapped.score_a, swapped.score_b, swapped.margin) == (
        of_swapped.score_a,
        of_swapped.score_b,
        of_swapped.margin,
    )
    assert swapped.swapped().preferred == verdict.preferred
    assert (verdict.preferred is None) == (verdict.undecidable_because is not None)


def test_a_comparison_swapped_names_the_responses_the_other_way_round() -> None:
    assert Comparison("c", "x", "y").swapped() == Comparison("c", "y", "x")


# -- the probabilities -----------------------------------------------------------------------------


def random_prompts(vocabulary: int, seed: int, n: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (n,), generator=generator).tolist()
    return [torch.randint(vocabulary, (t,), generator=generator).tolist() for t in lengths]


def reference(model: torch.nn.Module, prompts: list[list[int]], letters: Any) -> torch.Tensor:
    """One prompt at a time, no padding, all logits, double precision."""
    exact = tiny_copy(model).double()
    with torch.no_grad():
        ids = [torch.tensor([p], device=exact.device) for p in prompts]
        rows = [exact(own).logits[0, -1].softmax(-1).cpu() for own in ids]
    return torch.stack(rows)[:, list(letters)]


def tiny_copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).eval()


class WithoutLogitsToKeep(LlamaForCausalLM):
    """A model that always computes the logits of every position."""

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def gpt2(vocabulary: int, positions: int = 256) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=positions,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def with_adapter(model: torch.nn.Module, **changes: Any) -> Any:
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "v_proj"], **changes}
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    )
    return adapted.eval()


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
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


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


# -- comparisons to verdicts -----------------------------------------------------------------------

COMPARISONS = [
    Comparison("what is the capital?", "Paris", "London, I think, or " * i + "no") for i in range(9)
]


@pytest.fixture
def judge(model: Any, tokenizer: Any, templates: JudgeTemplates) -> Judge:
    return Judge(model, tokenizer, templates)


def same(first: list[Verdict], second: list[Verdict], tolerance: float = 1e-6) -> None:
    assert [v.preferred for v in first] == [v.preferred for v in second]
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.probabilities),
            torch.tensor(other.probabilities),
            rtol=1e-4,
            atol=tolerance,
        )


def test_a_verdict_rests_on_both_orders_under_every_principle(
    judge: Judge, encoder: ChatEncoder, templates: JudgeTemplates, model: Any
) -> None:
    comparison = COMPARISONS[2]
    verdict = judge.compare([comparison])[0]
    assert torch.tensor(verdict.probabilities).shape == (2, 2, 2)
    for p, principle in enumerate(templates):
        for o, shown in enumerate((comparison, comparison.swapped())):
            ids = encoder.encode_open(templates.render(principle, shown))
            expected = reference(model, [ids], judge.letter_ids)[0]
            assert verdict.probabilities[p][o] == pytest.approx(expected.tolist(), rel=1e-4)


def test_verdicts_come_in_the_order_of_the_comparisons_whatever_their_length(judge: Judge) -> None:
    together = judge.compare(iter(COMPARISONS))
    alone = [judge.compare([c])[0] for c in COMPARISONS]
    same(together, alone)
    assert len({v.margin for v in together}) == len(COMPARISONS)
    same(judge.compare(COMPARISONS[::-1]), alone[::-1])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_verdicts_do_not_depend_on_the_batch_size(
    model: Any, tokenizer: Any, templates: JudgeTemplates, judge: Judge, batch_size: int
) -> None:
    other = Judge(model, tokenizer, templates, batch_size=batch_size)
    same(other.compare(COMPARISONS), judge.compare(COMPARISONS))


def test_a_bar_is_shown_where_asked_for_and_only_there(
    judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.compare(COMPARISONS[:2])
    assert "judging" not in capsys.readouterr().err
    judge.compare(COMPARISONS[:2], progress=True)
    assert "judging" in capsys.readouterr().err


def test_the_tokens_of_a_pass_can_be_set(
    model: Any, tokenizer: Any, templates: JudgeTemplates, judge: Judge
) -> None:
    small = Judge(model, tokenizer, templates, batch_tokens=100)
    assert small.packing.shape.batch_tokens == 100
    same(small.compare(COMPARISONS), judge.compare(COMPARISONS))


def test_nothing_to_judge_gives_no_verdicts(judge: Judge) -> None:
    assert judge.compare([]) == []


def test_two_equal_responses_are_an_exact_tie_in_any_batch(
    model: Any, tokenizer: Any, templates: JudgeTemplates
) -> None:
    # Rounding differs with the batch: were each order computed for itself, it would decide.
    judge = Judge(model, tokenizer, templates, batch_size=3)
    equal = [Comparison("who? " * i, f"the same {i}", f"the same {i}") for i in range(8)]
    for verdict in judge.compare(equal):
        assert (verdict.preferred, verdict.margin) == (None, 0.0)


def test_a_comparison_and_its_swap_get_mirrored_verdicts(judge: Judge) -> None:
    forth = judge.compare([*COMPARISONS, *(c.swapped() for c in COMPARISONS)])
    for one, other in zip(forth[:9], forth[9:], strict=True):
        assert other.preferred == one.swapped().preferred
        assert other.margin == -one.margin


def test_equal_prompts_are_computed_once(judge: Judge, model: Any) -> None:
    seen: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    judge.compare([COMPARISONS[0]])  # tries the model once
    seen.clear()
    judge.compare([COMPARISONS[0], COMPARISONS[0].swapped(), COMPARISONS[0]])
    hook.remove()
    assert sum(seen) == 4  # two principles in two orders


def test_a_pair_that_does_not_fit_is_undecidable_and_the_others_are_judged(
    model: Any, tokenizer: Any, templates: JudgeTemplates, judge: Judge
) -> None:
    short = Judge(model, tokenizer, templates, max_length=200)
    pairs = [COMPARISONS[0], Comparison("what?", "long " * 300, "no"), COMPARISONS[1]]
    verdicts = short.compare(pairs)
    assert verdicts[1].preferred is None
    assert "does not fit" in str(verdicts[1].undecidable_because)
    assert verdicts[1].probabilities == ()
    assert verdicts[1].swapped().preferred is None
    same([verdicts[0], verdicts[2]], judge.compare([COMPARISONS[0], COMPARISONS[1]]))


def test_a_context_too_long_loses_its_oldest_turns_only(
    model: Any, tokenizer: Any, templates: JudgeTemplates, judge: Judge
) -> None:
    old = "Human: " + "old talk " * 60 + "\n\nAssistant: yes"
    short = Judge(model, tokenizer, templates, max_length=200)
    cut = short.compare([Comparison(f"{old}\n\nHuman: and now?", "this", "that")])
    same(cut, judge.compare([Comparison("Assistant: yes\n\nHuman: and now?", "this", "that")]))


def test_a_pair_longer_than_the_models_context_is_undecidable_rather_than_a_crash(
    tokenizer: Any, templates: JudgeTemplates
) -> None:
    judge = Judge(gpt2(len(tokenizer), positions=150), tokenizer, templates, max_length=100_000)
    assert judge.max_length == 150
    fits, does_not = judge.compare(
        [Comparison("what?", "a", "b"), Comparison("what?", "long " * 200, "b")]
    )
    assert fits.preferred is not None
    assert does_not.preferred is None


def test_a_model_whose_weights_are_broken_decides_nothing(
    tokenizer: Any, templates: JudgeTemplates
) -> None:
    model = tiny_llama(len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    verdict = Judge(model, tokenizer, templates).compare([COMPARISONS[0]])[0]
    assert verdict.preferred is None
    assert "not finite" in str(verdict.undecidable_because)


# -- what judging leaves alone ---------------------------------------------------------------------


def test_judging_is_without_dropout_and_every_module_gets_its_mode_back(
    tokenizer: Any, templates: JudgeTemplates
) -> None:
    model = tiny_llama(len(tokenizer), attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a frozen part inside a model in training
    modes = {name: module.training for name, module in model.named_modules()}
    judge = Judge(model, tokenizer, templates)
    same(judge.compare(COMPARISONS), judge.compare(COMPARISONS), tolerance=0)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_mode_comes_back_when_judging_fails(judge: Judge, model: Any) -> None:
    model.train()
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge.compare(COMPARISONS[:1])
    handle.remove()
    assert all(module.training for module in model.modules())


def test_judging_leaves_no_gradient_and_the_weights_as_they_are(judge: Judge, model: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    judge.compare(COMPARISONS)
    assert torch.is_grad_enabled()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_sampling_settings_of_the_model_do_not_touch_judging(judge: Judge, model: Any) -> None:
    before = judge.compare(COMPARISONS)
    model.generation_config.update(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        suppress_tokens=list(judge.letter_ids),
    )
    assert judge.compare(COMPARISONS) == before


# -- settings that cannot work ---------------------------------------------------------------------


def test_a_batch_size_or_length_below_one_is_refused(
    model: Any, tokenizer: Any, templates: JudgeTemplates
) -> None:
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        Judge(model, tokenizer, templates, batch_size=0)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Judge(model, tokenizer, templates, max_length=0)
    with pytest.raises(ValueError, match="max_length 1 leaves no room for responses"):
        Judge(model, tokenizer, templates, max_length=1)


def test_a_length_must_leave_room_behind_the_longest_template(
    model: Any, encoder: ChatEncoder, templates: JudgeTemplates
) -> None:
    nothing = Comparison("", "", "")
    longest = max(len(encoder.encode_open(templates.render(p, nothing))) for p in templates)
    assert Judge(model, encoder, templates, max_length=longest + 1).max_length == longest + 1
    with pytest.raises(ValueError, match=f"max_length {longest} .* alone has {longest} tokens"):
        Judge(model, encoder, templates, max_length=longest)


def test_a_tokenizer_larger_than_the_model_is_refused(
    tokenizer: Any, templates: JudgeTemplates
) -> None:
    small = tiny_llama(len(tokenizer) - 1)
    with pytest.raises(ValueError, match=f"up to {len(tokenizer) - 1}, .* {len(tokenizer) - 1}"):
        Judge(small, tokenizer, templates)


@pytest.mark.parametrize(
    "on_embeddings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=["lora", "saved whole", "some tokens"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_the_embeddings_can_judge(
    tokenizer: Any, templates: JudgeTemplates, on_embeddings: dict[str, Any]
) -> None:
    model = with_adapter(tiny_llama(len(tokenizer)), **on_embeddings)
    assert Judge(model, tokenizer, templates).compare(COMPARISONS[:1])[0].preferred is not None


def test_given_letter_ids_are_checked(model: Any, tokenizer: Any, judge: Judge) -> None:
    a, b = judge.letter_ids
    assert tokenizer.convert_ids_to_tokens([a, b]) == ["ĠA", "ĠB"]
    Judge(model, tokenizer, TEMPLATES, token_id_a=a, token_id_b=b)
    with pytest.raises(ValueError, match="token_id_a"):
        Judge(model, tokenizer, TEMPLATES, token_id_a=b)


# -- from a folder ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Any, model: Any, encoder: ChatEncoder, templates: JudgeTemplates) -> Any:
    model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    save_judge_settings(tmp_path, encoder, templates, encoder.letter_ids(templates))
    return tmp_path


def test_a_judge_is_loaded_with_the_templates_saved_beside_the_model(
    folder: Any, judge: Judge
) -> None:
    loaded = Judge.from_pretrained(folder, device="cpu")
    assert loaded.templates.principles == judge.templates.principles
    same(loaded.compare(COMPARISONS), judge.compare(COMPARISONS))


def test_a_judge_judges_on_the_device_of_its_process(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("self_judge.models.own_device", lambda: torch.device("meta"))
    judge = Judge.from_pretrained(folder)
    assert {p.device.type for p in judge.model.parameters()} == {"meta"}


def test_a_judge_is_loaded_with_the_chat_template_that_it_was_taught_under(
    folder: Any, templates: JudgeTemplates, tokenizer: Any
) -> None:
    taught = "{% for m in messages %}{{ '<s>' ~ m.role ~ ': ' ~ m.content }}{% endfor %}"
    encoder = ChatEncoder(tokenizer, taught)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    assert Judge.from_pretrained(folder, device="cpu").encoder.chat_template == taught


def test_what_is_asked_of_a_loaded_judge_is_what_it_does(
    folder: Any, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: dict[str, Any] = {}

    def load(name: Any, **kwargs: Any) -> Any:
        named.update(kwargs)
        return judge.encoder.tokenizer

    monkeypatch.setattr("self_judge.judging.judge.load_tokenizer", load)
    a, b = judge.letter_ids
    loaded = Judge.from_pretrained(
        folder,
        token_id_a=a,
        token_id_b=b,
        batch_size=3,
        max_length=77,
        packing="off",
        device="cpu",
        dtype=torch.bfloat16,
        revision="main",
    )
    assert named == {"revision": "main"}
    assert loaded.max_length == 77
    assert loaded.packing.decision.route == "off"
    assert loaded.model.dtype == torch.bfloat16
    assert isinstance(loaded.scorer, TransformersScorer)
    assert loaded.scorer.batch_size == 3
    with pytest.raises(ValueError, match=f"token_id_b={a}"):
        Judge.from_pretrained(folder, token_id_b=a, device="cpu")


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        Judge.from_pretrained(tmp_path / "gone")


def test_templates_given_win_over_the_saved_ones(folder: Any) -> None:
    one = {"helpful": TEMPLATES["helpful"]}
    assert Judge.from_pretrained(folder, one, device="cpu").templates.principles == ("helpful",)


def test_a_folder_whose_saved_letters_are_not_the_tokenizers_is_refused(
    folder: Any, encoder: ChatEncoder, templates: JudgeTemplates, judge: Judge
) -> None:
    a, b = judge.letter_ids
    save_judge_settings(folder, encoder, templates, (b, a))
    with pytest.raises(ValueError, match=f"token_id_a={b}"):
        Judge.from_pretrained(folder, device="cpu")
    save_judge_settings(folder, encoder, templates, (a, a))
    with pytest.raises(ValueError, match=f"token_id_b={a}"):
        Judge.from_pretrained(folder, device="cpu")


def test_a_folder_without_templates_says_what_to_do(folder: Any) -> None:
    (folder / "judge.json").unlink()
    with pytest.raises(ValueError, match=r"no judge\.json beside it.*pass the judge"):
        Judge.from_pretrained(folder, device="cpu")
    assert len(Judge.from_pretrained(folder, TEMPLATES, device="cpu").templates) == 2

"""The judge: the vote, the probabilities it rests on, and what it leaves as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conftest import TEMPLATES, tiny_llama
from letter_models import gpt2, reference, with_adapter
from self_judge import ChatEncoder, Comparison, Judge, JudgeTemplates, Verdict
from self_judge.inference.letter_scoring import TransformersScorer
from self_judge.prompting.judge_json import save_judge_settings

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
    with pytest.raises(ValueError, match=r"no judge\.json \(JSFT.*pass the judge"):
        Judge.from_pretrained(folder, device="cpu")
    assert len(Judge.from_pretrained(folder, TEMPLATES, device="cpu").templates) == 2

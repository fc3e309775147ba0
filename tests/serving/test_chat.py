"""`/v1/chat/completions`, by the real client of OpenAI with strict validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from self_judge import (
    Judge,
    SamplingSettings,
    TransformersSampler,
    tournament_rejection_sampling,
)
from self_judge.data import synthetic
from self_judge.data.toy_world import gold_score
from self_judge.models import load_model
from self_judge.prompting.judge_templates import dialogue_text
from served import MESSAGES, served, streamed


def library(folder: Path, seed: int, n: int, **settings: Any) -> tuple[list[str], str]:
    """The responses and the winner that the library gives."""
    judge: Any = Judge.from_pretrained(folder)
    sampler = TransformersSampler(judge.model, judge.encoder, SamplingSettings(**settings))
    (sampled,) = sampler.sample([judge.encoder.encode_prompt(MESSAGES)], n, seed)
    texts = [response.judged for response in sampled]
    (best,) = tournament_rejection_sampling(
        judge=judge, contexts=[dialogue_text(MESSAGES)], responses=[texts], seed=seed
    )
    return texts, best


def test_the_winner_is_that_of_the_library_with_the_same_seed(saved_judge: Path) -> None:
    with served(saved_judge) as here:
        create = here.client.chat.completions.create
        for seed, n in ((0, 4), (1, 8), (5, 5)):
            given: Any = {"messages": MESSAGES, "seed": seed, "max_tokens": 9, "top_p": 0.9}
            texts, best = library(saved_judge, seed, n, max_new_tokens=9, top_p=0.9)
            answer = create(model=f"{here.name}:best-of-{n}", **given)
            assert answer.choices[0].message.content == best
            assert answer.self_judge["judged"]["comparisons"] == n - 1
            brackets = {"self_judge": {"n": n, "brackets": True}}
            other = create(model=here.name, **given, extra_body=brackets)
            assert other.choices[0].message.content == best
            assert other.self_judge["responses"] == texts
            assert texts[other.self_judge["winner"]] == best
            assert len(other.self_judge["bracket"]) == (n - 1).bit_length()


def test_the_demo_has_the_same_gold_score_over_http_as_in_the_library(demo: Path) -> None:
    judge: Any = Judge.from_pretrained(demo / "jsft")
    policy: Any = load_model(demo / "self_judge")
    sampler = TransformersSampler(policy, judge.encoder, SamplingSettings(max_new_tokens=6))
    with served(demo / "jsft", policy=str(demo / "self_judge")) as here:
        for seed, asked in enumerate(synthetic.instructions(5, 3)):
            messages: Any = [{"role": "user", "content": asked}]
            (sampled,) = sampler.sample([judge.encoder.encode_prompt(messages)], 4, seed)
            texts = [[response.judged for response in sampled]]
            (best,) = tournament_rejection_sampling(
                judge=judge, contexts=[asked], responses=texts, seed=seed
            )
            answer = here.client.chat.completions.create(
                model=f"{here.name}:best-of-4", messages=messages, seed=seed, max_tokens=6
            )
            text = answer.choices[0].message.content
            assert gold_score(asked, text) == gold_score(asked, best)
            assert text == best


def test_the_plain_name_gives_samples_without_a_tournament(saved_judge: Path) -> None:
    texts, _ = library(saved_judge, 3, 3, max_new_tokens=9)
    with served(saved_judge) as here:
        create = here.client.chat.completions.create
        given: Any = {"model": here.name, "messages": MESSAGES, "seed": 3, "max_tokens": 9}
        one, three = create(**given), create(**given, n=3)
        assert one.choices[0].message.content == texts[0]
        assert [choice.message.content for choice in three.choices] == texts
        assert "judged" not in three.self_judge
        assert one.usage.completion_tokens == 9
        assert one.usage.total_tokens == one.usage.prompt_tokens + 9
        assert three.usage.completion_tokens == three.self_judge["sampled_tokens"]


def test_several_choices_of_a_tournament_come_best_first(saved_judge: Path) -> None:
    with served(saved_judge) as here:
        create = here.client.chat.completions.create
        given: Any = {"model": f"{here.name}:best-of-8", "messages": MESSAGES, "seed": 2}
        given |= {"max_tokens": 8, "extra_body": {"self_judge": {"brackets": True}}}
        answer = create(**given, n=8)
        beside = answer.self_judge
        texts = [choice.message.content for choice in answer.choices]
        assert sorted(texts) == sorted(beside["responses"])
        final = beside["bracket"][-1][0]
        finalists = {beside["responses"][final["a"]], beside["responses"][final["b"]]}
        assert texts[0] == beside["responses"][beside["winner"]]
        assert set(texts[:2]) == finalists
        assert create(**given).choices[0].message.content == texts[0]
        # The usage counts what is returned; all that was sampled stands beside it.
        assert create(**given).usage.completion_tokens < beside["sampled_tokens"]
        assert answer.usage.completion_tokens == beside["sampled_tokens"]


def test_a_stream_joins_to_the_unstreamed_answer(saved_judge: Path) -> None:
    with served(saved_judge) as here:
        create = here.client.chat.completions.create
        given: Any = {"messages": MESSAGES, "seed": 4, "max_tokens": 12, "logprobs": True}
        for model, n in ((here.name, 1), (here.name, 2), (f"{here.name}:best-of-4", 2)):
            whole = create(model=model, n=n, **given)
            usage = {"include_usage": True}
            texts, chunks = streamed(
                create(model=model, n=n, **given, stream=True, stream_options=usage)
            )
            assert texts == {c.index: c.message.content for c in whole.choices}
            assert [chunk.choices[0].delta.role for chunk in chunks[:n]] == ["assistant"] * n
            assert chunks[-1].usage == whole.usage
            assert not chunks[-1].choices
            (beside,) = [c.self_judge for c in chunks if getattr(c, "self_judge", None)]
            assert beside == whole.self_judge
            ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices}
            assert ends == {c.index: c.finish_reason for c in whole.choices}
            scored = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
            assert [s.content for s in scored] == [c.logprobs.content for c in whole.choices]
            without = streamed(create(model=model, n=n, **given, stream=True))[1]
            assert all(chunk.choices for chunk in without)


def test_stop_texts_end_a_response_and_are_not_part_of_it(saved_judge: Path) -> None:
    with served(saved_judge) as here:
        create = here.client.chat.completions.create
        given: Any = {"model": here.name, "messages": MESSAGES, "seed": 3}
        whole = create(**given, max_tokens=24)
        text = whole.choices[0].message.content
        stop = text[len(text) // 2 :][:2]
        cut = create(**given, max_tokens=24, stop=["never there", stop])
        assert cut.choices[0].message.content == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"
        assert cut.usage.completion_tokens < whole.usage.completion_tokens


def test_logprobs_are_those_of_the_model(saved_judge: Path) -> None:
    import torch

    judge: Any = Judge.from_pretrained(saved_judge)
    with served(saved_judge) as here:
        answer = here.client.chat.completions.create(
            model=here.name, messages=MESSAGES, seed=3, max_tokens=4, logprobs=True, top_logprobs=3
        )
    content = answer.choices[0].logprobs.content
    prompt = torch.tensor([judge.encoder.encode_prompt(MESSAGES)], device=judge.model.device)
    logprobs_V = judge.model(prompt).logits[0, -1].float().log_softmax(-1)
    top = logprobs_V.topk(3)
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(top.values.tolist(), 1e-4)
    assert content[0].logprob in [pytest.approx(x, 1e-4) for x in logprobs_V.tolist()]
    assert len(content) == 4


@pytest.mark.parametrize(
    ("changes", "status", "param", "message"),
    [
        ({"temperature": -1}, 400, "temperature", "must be 0 or a positive number"),
        ({"temperature": "warm"}, 400, "temperature", "expected a number, got text"),
        ({"top_p": 0}, 400, "top_p", "must be in"),
        ({"n": 17}, 400, "n", "above the maximum of 16"),
        ({"n": True}, 400, "n", "expected a whole number, got true or false"),
        ({"stop": [""]}, 400, "stop", "non-empty"),
        ({"model": "gpt-4"}, 404, "model", "does not exist"),
        ({"model": "NAME:best-of-99"}, 400, "model", "from 1 to 16"),
        ({"messages": []}, 400, "messages", "at least one message"),
        ({"messages": [{"role": "x", "content": ""}]}, 400, "messages[0].role", "expected system"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "expected text"),
        ({"max_tokens": 5000}, 400, "max_tokens", "context is 512 tokens"),
        ({"messages": [{"role": "user", "content": "no " * 999}]}, 400, "messages", "512 tokens"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "does not support"),
        ({"extra_body": {"self_judge": {"m": 1}}}, 400, "self_judge.m", "unknown field"),
        ({"extra_body": {"self_judge": {"n": 2}}, "n": 3}, 400, "n", "has no 3 responses"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature", "unknown field"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_names_the_field(
    changes: Any, status: int, param: str, message: str, stream: bool, here: Any
) -> None:
    given: Any = {"model": here.name, "messages": MESSAGES, "max_tokens": 4, "stream": stream}
    given |= changes
    given["model"] = given["model"].replace("NAME", here.name)
    with pytest.raises(openai.APIStatusError, match=message) as error:
        here.client.chat.completions.create(**given)
    assert (error.value.status_code, error.value.param) == (status, param)
    assert error.value.type == "invalid_request_error"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from conftest import saved_as_judge

    with served(saved_as_judge(tmp_path_factory.mktemp("judge"))) as here:
        yield here


def test_fields_that_ask_for_nothing_are_taken(here: Any) -> None:
    """Clients send their defaults."""
    answer = here.client.chat.completions.create(
        model=here.name,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what is it?"}], "name": "x"},
        ],
        max_completion_tokens=3,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        tools=[],
        response_format={"type": "text"},
        user="someone",
    )
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_models_are_listed_and_found(here: Any) -> None:
    listed = [model.id for model in here.client.models.list()]
    assert listed == [here.name, *(f"{here.name}:best-of-{n}" for n in (2, 4, 8, 16))]
    assert [here.client.models.retrieve(model).id for model in listed] == listed
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        here.client.models.retrieve("another")


def test_an_unknown_path_has_openais_error_body(here: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings") as error:
        here.client.embeddings.create(model="x", input="y")
    assert error.value.code == "unknown_url"

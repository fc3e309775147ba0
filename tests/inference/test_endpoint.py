"""OpenAI-compatible endpoints as judges: what is sent, how letters are found, what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from fake_openai import FakeOpenAI, serving
from judge_pairs import ASKED, PAIRS, distance
from self_judge import ChatEncoder, Judge
from self_judge.errors import EngineError
from self_judge.inference.remote.endpoint import EndpointScorer

Change = Callable[[Any], Any]


@pytest.fixture
def fake(encoder: ChatEncoder) -> Iterator[FakeOpenAI]:
    model = tiny_llama(len(encoder.tokenizer))
    # Letters are among the 20 most likely tokens, as those of a chat model are.
    bias = torch.zeros(len(encoder.tokenizer))
    bias[list(Judge(model, encoder, ASKED).letter_ids)] = 6
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    with serving(FakeOpenAI(model, encoder)) as server:
        yield server


def scorer(fake: FakeOpenAI, **settings: Any) -> EndpointScorer:
    return EndpointScorer(fake.url, **{"timeout": 5, "retry_wait": 0.001, **settings})


def judge(fake: FakeOpenAI, thought_tokens: int | None = None, **settings: Any) -> Judge:
    return Judge(scorer(fake, **settings), None, ASKED, thought_tokens=thought_tokens)


# -- verdicts --------------------------------------------------------------------------------------


def test_an_endpoint_gives_the_verdicts_of_its_model_in_this_process(fake: FakeOpenAI) -> None:
    here, there = Judge(fake.model, fake.encoder, ASKED), judge(fake)
    ours, theirs = here.compare(PAIRS), there.compare(PAIRS)
    masses = [sum(letters) for v in ours for orders in v.probabilities for letters in orders]
    assert min(masses) > 0.02  # else there would be nothing to compare
    assert distance(ours, theirs) < 1e-5
    assert [v.preferred for v in ours] == [v.preferred for v in theirs]


def test_an_endpoint_thinks_before_it_continues_the_lead_in(fake: FakeOpenAI) -> None:
    asked = judge(fake, thought_tokens=6, concurrency=1)
    assert asked.compare(PAIRS[:1])[0].probabilities
    thinking, letter = fake.requests[-2:]
    assert thinking["max_tokens"] == 6
    assert [m["role"] for m in thinking["messages"]] == ["user"]
    assert letter["messages"][:1] == thinking["messages"]
    thought = letter["messages"][1]["content"].removesuffix("The more honest is Response")
    assert thought.strip()
    assert asked.thought_tokens == 4 * 6  # both orders of two principles


def test_an_endpoint_that_continues_nothing_is_asked_to_complete_the_lead_in(
    fake: FakeOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    fake.continues = False
    judge(fake).compare(PAIRS[:1])
    asked = fake.requests[-1]["messages"]
    assert [message["role"] for message in asked] == ["user"]
    assert asked[0]["content"].endswith(f"this sentence: {ASKED['honest']['assistant']}")
    assert "does not continue an unfinished answer" in caplog.text


def test_an_endpoint_of_five_tokens_is_asked_for_five(fake: FakeOpenAI) -> None:
    fake.most = 5
    assert judge(fake).compare(PAIRS[:1])[0].probabilities
    assert fake.requests[-1]["top_logprobs"] == 5


TOPS = {
    "with a space": ([(" A", 0.5), ("A", 0.2), ("B", 0.2)], (0.5, 0)),
    "with a space in SentencePiece": ([("▁B", 0.5), ("▁A", 0.25), ("A", 0.1)], (0.25, 0.5)),
    "with a space in byte-level BPE": ([("ĠA", 0.5), ("Ġa", 0.2)], (0.5, 0)),
    "without any space": ([("B", 0.5), ("A", 0.25), ("C", 0.1)], (0.25, 0.5)),
    "the start of a word": ([("Ab", 0.5), (" B", 0.25)], (0, 0.25)),
}


@pytest.mark.parametrize(("tops", "expected"), TOPS.values(), ids=TOPS)
def test_letters_are_looked_for_among_the_most_likely_tokens(
    fake: FakeOpenAI, tops: Any, expected: tuple[float, float]
) -> None:
    listed = [{"token": t, "logprob": math.log(p)} for t, p in tops]
    fake.change = lambda answer: with_tops(answer, listed)
    verdict = judge(fake).compare(PAIRS[:1])[0]
    for orders in verdict.probabilities:
        for letters in orders:
            assert letters == pytest.approx(expected)


def with_tops(answer: Any, tops: Any) -> Any:
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = tops
    return answer


def test_a_model_that_names_no_letter_is_refused_in_one_line(fake: FakeOpenAI) -> None:
    fake.spell = lambda text: text.lower()
    asked = judge(fake)
    with pytest.raises(EngineError, match="neither A nor B is among the 20") as error:
        asked.compare(PAIRS)
    assert fake.url in str(error.value)


# -- who is asked ----------------------------------------------------------------------------------


def test_the_only_model_of_an_endpoint_needs_no_name(fake: FakeOpenAI) -> None:
    assert scorer(fake).model == "served"
    fake.names = ["one", "two"]
    with pytest.raises(EngineError, match="lists 2 models: one, two: set model"):
        scorer(fake)
    assert scorer(fake, model="two").model == "two"


def test_the_key_comes_from_the_environment_and_is_masked(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="JUDGES_WORD has no key"):
        scorer(fake, api_key_env="JUDGES_WORD")
    assert "Authorization" not in scorer(fake).server._session.headers
    for odd in ("first line\nsecond line", "sesam\u00e9", "\u2603"):
        monkeypatch.setenv("JUDGES_WORD", odd)
        with pytest.raises(EngineError, match="JUDGES_WORD has a key with characters") as error:
            scorer(fake, api_key_env="JUDGES_WORD", model="served")
        assert odd[:5] not in str(error.value)
    word = "open sesame of the day"  # neither its variable nor its form looks like a secret
    monkeypatch.setenv("JUDGES_WORD", word)
    asked = scorer(fake, api_key_env="JUDGES_WORD", model="served")
    assert fake.headers[-1]["Authorization"] == f"Bearer {word}"
    fake.change = lambda answer: {"error": word}
    with pytest.raises(EngineError) as error:
        Judge(asked, None, ASKED).compare(PAIRS)
    assert word not in str(error.value)
    fake.failures = [(401, {})]
    with pytest.raises(EngineError, match="set api_key_env"):
        scorer(fake, model="served")


def test_a_url_without_its_path_is_named_with_what_to_do(fake: FakeOpenAI) -> None:
    for url, name in ((fake.url[:-3], None), (fake.url[:-3], "served")):
        with pytest.raises(EngineError, match=r"usually (ends )?in /v1"):
            EndpointScorer(url, name, timeout=5, retry_wait=0.001)


# -- rate limits -----------------------------------------------------------------------------------


def test_a_rate_limit_is_waited_for_as_long_as_the_endpoint_says(fake: FakeOpenAI) -> None:
    asked = judge(fake, concurrency=1)
    fake.failures = [(429, {"Retry-After": "0"})] * 2 + [(429, {"Retry-After": "1"})] + [(503, {})]
    started = time.monotonic()
    assert asked.compare(PAIRS[:1])[0].probabilities
    assert time.monotonic() - started >= 1


def test_a_rate_limit_beyond_the_deadline_ends_at_once(fake: FakeOpenAI) -> None:
    asked = judge(fake, concurrency=1)
    fake.failures = [(429, {"Retry-After": "3600"})] * 9
    started = time.monotonic()
    with pytest.raises(EngineError, match="within 5 s; last error: HTTP 429") as error:
        asked.compare(PAIRS[:1])
    assert time.monotonic() - started < 5
    assert fake.url in str(error.value)


# -- endpoints that answer wrongly (row D5 of the list of faults) ----------------------------------


def tops_of(value: Any) -> Change:
    return lambda answer: with_tops(answer, [{"token": " A", "logprob": value}])


def logprobs_of(value: Any) -> Change:
    return lambda answer: {"choices": [{**answer["choices"][0], "logprobs": value}]}


WRONG: dict[str, Change] = {
    "no choices": lambda answer: {"id": "x"},
    "null": lambda answer: None,
    "a list": lambda answer: [answer],
    "no choice": lambda answer: {"choices": []},
    "two choices": lambda answer: {"choices": answer["choices"] * 2},
    "a choice that is text": lambda answer: {"choices": ["x"]},
    "a choice without an index": lambda answer: {"choices": [{}]},
    **{f"a logprob of {value!r}": tops_of(value)
       for value in (float("nan"), float("inf"), float("-inf"), 0.5, None, "x", [1.0], True)},
    "tops of a number": lambda answer: with_tops(answer, 3),
    "tops of texts": lambda answer: with_tops(answer, ["A"]),
    "a token that is a number": lambda answer: with_tops(answer, [{"token": 1, "logprob": -1.0}]),
    "tops above one": lambda answer: with_tops(answer, [{"token": " A", "logprob": -0.1}] * 2),
    "logprobs of a number": logprobs_of(3),
    "no position": logprobs_of({"content": []}),
    "a position that is null": logprobs_of({"content": [None]}),
}  # fmt: skip
NO_LOGPROBS: dict[str, Change] = {
    "null": logprobs_of(None),
    "an empty section": logprobs_of({}),
    "no tops": lambda answer: with_tops(answer, []),
    "tops that are null": lambda answer: with_tops(answer, None),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_answer_that_cannot_be_used_is_asked_for_again_and_then_one_line(
    fake: FakeOpenAI, change: Change
) -> None:
    asked = judge(fake, concurrency=1)
    fake.requests.clear()
    fake.change = change
    with pytest.raises(EngineError) as error:
        asked.compare(PAIRS[:1])
    assert fake.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(fake.requests) == 4


@pytest.mark.parametrize("change", NO_LOGPROBS.values(), ids=NO_LOGPROBS)
def test_an_endpoint_without_top_logprobs_is_refused_before_anything_is_judged(
    fake: FakeOpenAI, change: Change
) -> None:
    fake.change = change
    with pytest.raises(EngineError, match="returns no top_logprobs for served") as error:
        scorer(fake)
    assert fake.url in str(error.value)
    assert "\n" not in str(error.value)


def test_an_endpoint_that_rejects_logprobs_is_refused_with_its_own_words(fake: FakeOpenAI) -> None:
    fake.most = 0
    with pytest.raises(EngineError, match=r"must be at most 0.*letters need logprobs"):
        scorer(fake)


def test_an_endpoint_that_hangs_ends_with_the_deadline(fake: FakeOpenAI) -> None:
    asked = judge(fake, timeout=0.3)
    fake.pause = 1.0
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"within 0\.3 s") as error:
        asked.compare(PAIRS)
    assert time.monotonic() - started < 5
    assert fake.url in str(error.value)


def test_a_redirect_is_not_followed_and_gets_no_key(
    fake: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "key-of-the-judge")
    with serving(FakeOpenAI(fake.model, fake.encoder)) as target:
        asked = judge(fake, api_key_env="JUDGE_KEY", model="served")
        fake.failures = [(307, {"Location": target.url})] * 99
        with pytest.raises(EngineError, match="redirects to") as error:
            asked.compare(PAIRS)
        assert fake.url in str(error.value)
        assert target.url in str(error.value)
        assert not target.requests


def test_a_thought_that_is_no_text_is_not_used(fake: FakeOpenAI) -> None:
    asked = judge(fake, thought_tokens=4)

    def change(answer: Any) -> Any:
        return json.loads(json.dumps(answer).replace('"content": "', '"content": 3, "x": "'))

    fake.change = change
    with pytest.raises(EngineError, match="a thought of type int"):
        asked.compare(PAIRS[:1])

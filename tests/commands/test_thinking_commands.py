"""Thinking policies in `tournament`, `compare`, `judge` and `eval`, and sampled by vLLM."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TEMPLATES, tiny_llama
from self_judge import ChatEncoder, Comparison, Judge, JudgeTemplates
from self_judge.cli import main
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.vllm.protocol import VLLMSampler
from self_judge.judging.tournament import tournament_rejection_sampling
from self_judge.prompting.judge_json import save_judge_settings
from thinking import QWEN_3, R1, thinking_tokenizer

KINDS = {"qwen-3": (QWEN_3, "<think>\n"), "r1": (R1, "")}
NO_ANSWER = "no answer after a thought"
ENDLESS = "<think>\nsecret, and so on"
WITH = "<think>\nsecret\n</think>\n\n"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *given: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    return str(path)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The judge prompts, as text."""
    seen: list[str] = []
    score = Judge.letter_probabilities

    def scored(judge: Judge, prompts: Any, **arguments: Any) -> Any:
        seen.extend(map(judge.encoder.tokenizer.decode, prompts))
        return score(judge, prompts, **arguments)

    monkeypatch.setattr(Judge, "letter_probabilities", scored)
    return seen


@pytest.fixture(params=KINDS)
def thinker(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge and policy that thinks, as a folder; every third of its thoughts never ends."""
    template, opening = KINDS[request.param]
    tokenizer = thinking_tokenizer(template)
    folder = tmp_path / "thinker"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder = ChatEncoder(tokenizer, chat_template_kwargs={"enable_thinking": True})
    templates = JudgeTemplates(TEMPLATES)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    numbers = itertools.count()

    def drawn(self: Any, rows: Any) -> Iterator[list[int]]:
        for _ in (seed for _, seeds in rows for seed in seeds):
            k = next(numbers)
            text = f"{opening}secret {k}" + ("" if k % 3 == 0 else f"\n</think>\n\nanswer {k}")
            yield [*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] * (k % 3 > 0))]

    monkeypatch.setattr(TransformersSampler, "_sampled", drawn)
    return str(folder)


def test_a_tournament_is_among_the_answers_of_what_was_sampled(
    thinker: str, tmp_path: Path, asked: list[str]
) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": f"what is {i}?"} for i in range(4)))
    target = tmp_path / "out.jsonl"
    command = ["tournament", source, str(target), "--model", thinker, "--n", "6", "--brackets"]
    assert main(command) == 0
    for line in lines(target):
        assert len(line["unanswered"]) == 2
        assert line["response"].startswith("answer")
        assert line["winner"] not in line["unanswered"]
        for k, response in enumerate(line["responses"]):
            assert response.startswith("<think>\nsecret" if k in line["unanswered"] else "answer")
    assert asked
    assert not any("secret" in prompt for prompt in asked)
    assert main(command) == 0, "a finished file is known again"


def test_a_tournament_is_among_the_answers_of_what_is_given(
    saved_judge: Path, tmp_path: Path, asked: list[str]
) -> None:
    given = [ENDLESS, f"{WITH}one", ENDLESS + "!", "so\n</think>\n\ntwo", "three"]
    source = write(tmp_path / "in.jsonl", *({"context": f"{i}?", "responses": given}
                                            for i in range(6)))  # fmt: skip
    target = tmp_path / "out.jsonl"
    for seed in range(4):
        command = ["tournament", source, str(target), "--model", str(saved_judge), "--overwrite"]
        assert main([*command, "--seed", str(seed)]) == 0
        for line in lines(target):
            assert line["winner"] in (1, 3, 4)
            assert line["response"] == given[line["winner"]]
            assert line["unanswered"] == [0, 2]
    assert not any("secret" in prompt or "so\n" in prompt for prompt in asked)
    winners, brackets = tournament_rejection_sampling(
        model=saved_judge, contexts=["x"], responses=[[ENDLESS, ENDLESS + "!"]],
        return_brackets=True,
    )  # fmt: skip
    assert winners[0].startswith(ENDLESS)
    assert brackets[0].rounds[0][0].by_lot


def test_two_policies_are_compared_by_their_answers(
    thinker: str, tmp_path: Path, asked: list[str], capsys: Any
) -> None:
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"what is {i}?"} for i in range(6)))
    given = [f"{WITH}one", f"{WITH}two", ENDLESS, "three", ENDLESS, "four"]
    other = write(tmp_path / "b.jsonl", *({"output": text} for text in given))
    output = tmp_path / "out"
    command = ["compare", thinker, other, "--prompts", prompts, "--judge", thinker]
    assert main([*command, "--output", str(output)]) == 0
    told = json.loads((output / "results.json").read_text())
    # a has no answer to 0 and 3, b none to 2 and 4.
    because = [line["verdict"]["undecidable_because"] for line in lines(output / "pairs.jsonl")]
    assert [i for i, why in enumerate(because) if why == NO_ANSWER] == [0, 2, 3, 4]
    assert told["undecidable_because"][NO_ANSWER] == 4
    assert told["characters"]["a"]["value"] == pytest.approx(4 * len("answer 1") / 6)
    assert told["characters"]["b"]["value"] == pytest.approx((3 + 3 + 5 + 4) / 6)
    assert told["finished"]["a"]["value"] == pytest.approx(4 / 6)
    assert NO_ANSWER in " ".join(capsys.readouterr().out.split())
    assert not any("secret" in prompt for prompt in asked)


def test_given_pairs_are_judged_by_their_answers(
    saved_judge: Path, tmp_path: Path, asked: list[str]
) -> None:
    source = write(
        tmp_path / "in.jsonl",
        {"context": "x?", "response_a": f"{WITH}one", "response_b": "two"},
        {"context": "x?", "response_a": "one", "response_b": "two"},
        {"context": "x?", "response_a": "one", "response_b": ENDLESS},
    )
    target = tmp_path / "out.jsonl"
    assert main(["judge", source, str(target), "--model", str(saved_judge)]) == 0
    thought, plain, endless = (line["verdict"] for line in lines(target))
    assert thought == plain
    assert (endless["preferred"], endless["undecidable_because"]) == (
        None,
        NO_ANSWER,
    )
    assert not any("secret" in prompt for prompt in asked)


def test_an_evaluation_sees_answers_and_counts_those_without(
    saved_judge: Path, tmp_path: Path, asked: list[str]
) -> None:
    rows = [
        {"prompt": "x?", "chosen": f"{WITH}one", "rejected": f"{WITH}three"},
        {"prompt": "x?", "chosen": f"{WITH}one", "rejected": ENDLESS},
        {"prompt": "x?", "chosen": ENDLESS, "rejected": "one"},
        {"prompt": "x?", "chosen": f"{WITH}one", "rejected": "one"},
    ]
    output = tmp_path / "out"
    source = write(tmp_path / "in.jsonl", *rows)
    assert main(["eval", source, "--model", str(saved_judge), "--output", str(output)]) == 0
    told = json.loads((output / "results.json").read_text())
    assert told["overall"]["pairs"] == 1
    assert told["skipped"] == {
        "pair: no answer after a thought": 1,
        "record: no answer after a thought": 1,
        "pair: identical responses": 1,
    }
    (line,) = lines(output / "verdicts.jsonl")
    assert sorted(line["characters"]) == [3, 5]
    assert not any("secret" in prompt for prompt in asked)


class Engine:
    """An engine that answers every request with the same ids."""

    max_model_length = 512

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def sample(self, requests: Any, *_: Any) -> list[list[int]]:
        return [self.ids for _ in requests]


@pytest.mark.parametrize("markers", ["added", "special", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_vllm_samples_is_split_as_well(kind: str, markers: str) -> None:
    template, opening = KINDS[kind]
    tokenizer = thinking_tokenizer(template, markers)
    encoder = ChatEncoder(tokenizer, chat_template_kwargs={"enable_thinking": True})
    prompt = encoder.encode_prompt([{"role": "user", "content": "what is it?"}])
    ids = tokenizer(f"{opening}secret\n</think>\n\none<|im_end|>")["input_ids"]
    engine: Any = Engine(ids)
    ((first, _),) = VLLMSampler(engine, encoder, SamplingSettings(max_new_tokens=9)).sample(
        [prompt], 2
    )
    assert (first.ids, first.text, first.thought) == (tuple(ids), "one", "secret")
    endless: Any = Engine(tokenizer(f"{opening}secret")["input_ids"])
    ((first,),) = VLLMSampler(endless, encoder, SamplingSettings(max_new_tokens=9)).sample([prompt])
    assert (first.text, first.answered, first.finished) == ("", False, False)


def test_a_judge_in_python_sees_the_answers(saved_judge: Path, asked: list[str]) -> None:
    judge = Judge.from_pretrained(saved_judge)
    verdicts = judge.compare(
        [Comparison("x?", f"{WITH}one", "two"), Comparison("x?", ENDLESS, ENDLESS)]
    )
    assert verdicts[0].preferred
    assert verdicts[1].undecidable_because == NO_ANSWER
    assert not any("secret" in prompt for prompt in asked)


@pytest.mark.parametrize(
    "empty", ["<think>\nsecret\n</think>", f"{WITH} \n", "[THINK]secret[/THINK]"]
)
def test_a_thought_with_nothing_behind_it_never_wins(
    empty: str, saved_judge: Path, tmp_path: Path, asked: list[str]
) -> None:
    for given in ([empty, "one"], ["one", empty]):
        source = write(tmp_path / "in.jsonl", {"context": "x?", "responses": given})
        judged, best = tmp_path / "judged.jsonl", tmp_path / "best.jsonl"
        more = ["--model", str(saved_judge), "--packing", "off", "--overwrite"]
        assert main(["judge", source, str(judged), *more]) == 0
        assert lines(judged)[0]["verdict"]["undecidable_because"] == NO_ANSWER
        assert main(["tournament", source, str(best), *more]) == 0
        assert lines(best)[0]["response"] == "one"
        assert lines(best)[0]["unanswered"] == [given.index(empty)]
    assert not asked


@pytest.mark.parametrize("column", ["context", "prompt"])
@pytest.mark.parametrize("command", ["judge", "tournament"])
def test_thoughts_of_earlier_turns_do_not_reach_the_judge(
    command: str, column: str, saved_judge: Path, tmp_path: Path, asked: list[str]
) -> None:
    asked_before = f"Human: a?\n\nAssistant: {WITH}shown\n\nHuman: b?"
    source = write(tmp_path / "in.jsonl", {column: asked_before, "responses": ["one", "two"]})
    more = ["--model", str(saved_judge), "--packing", "off"]
    assert main([command, source, str(tmp_path / "out.jsonl"), *more]) == 0
    assert asked
    assert all("shown" in prompt and "secret" not in prompt for prompt in asked)
    assert lines(tmp_path / "out.jsonl")[0][column] == asked_before

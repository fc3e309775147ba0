"""Thoughts: what of a response is its answer, in texts and in sampled ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_bpe, wrap
from self_judge import ChatEncoder, Comparison
from self_judge.datatypes import Response
from self_judge.inference.sampling import sampled_response
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.thoughts import answer_of, answers_of, split_thought
from thinking import QWEN_3, R1, thinking_tokenizer

USER = [{"role": "user", "content": "what is the capital of France?"}]


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Paris.", None, "Paris."),
        ("", None, ""),
        (" Paris. \n", None, " Paris. \n"),
        ("<think>\nHm.\n</think>\n\nParis.", "Hm.", "Paris."),
        ("\n <think>Hm.</think>Paris.", "Hm.", "Paris."),
        ("<think>\n\n</think>\n\nParis.", "", "Paris."),
        ("<think>\nHm. Wait,", "Hm. Wait,", None),
        ("<think>", "", None),
        ("Hm.\n</think>\n\nParis.", "Hm.", "Paris."),  # the prompt had opened it
        ("</think>Paris.", "", "Paris."),
        ("<think>a</think>\n<think>b</think>\nParis.", "a\n\nb", "Paris."),
        ("<think>a</think>\n<think>b", "a\n\nb", None),
        ("[THINK]Hm.[/THINK]Paris.", "Hm.", "Paris."),
        ("◁think▷Hm.◁/think▷Paris.", "Hm.", "Paris."),
        ("<seed:think>Hm.</seed:think>Paris.", "Hm.", "Paris."),
        ("<|channel>thought\nHm.<channel|>Paris.", "Hm.", "Paris."),
        ("<|channel>thought\nHm.", "Hm.", None),
        ("<thinking>\nHm.\n</thinking>\n\nParis.", "Hm.", "Paris."),
        ("<|begin_of_thought|>\nHm.\n<|end_of_thought|>\n\nParis.", "Hm.", "Paris."),
        ("<reasoning>\nHm.\n</reasoning>\nParis.", "Hm.", "Paris."),
        ("<longcat_think>Hm.</longcat_think>Paris.", "Hm.", "Paris."),
        ("<|inner_prefix|>Hm.<|inner_suffix|>Paris.", "Hm.", "Paris."),
        ("Hm. So.</think>\n\nParis.", "Hm. So.", "Paris."),  # the end of a paragraph
        ("Hm. So.</think> \n \n\nParis.\n\nYes.", "Hm. So.", "Paris.\n\nYes."),
        # Answers that speak of thoughts, and do not open with one.
        ("The tag <think> opens, </think> closes.", None, None),
        ("Write\n<think>\nso\n</think>\nand go on.", None, None),
        ("It ends with `</think>`.", None, None),
        ("It ends with `</think>`\n\nand goes on.", None, None),
        ("It ends with </think>\nand goes on.", None, None),
        ("First <think> opens, then comes </think>\n\nand so on.", None, None),
    ],
)
def test_a_response_that_opens_with_a_thought_is_split(
    text: str, thought: str | None, answer: str | None
) -> None:
    unchanged = thought is None and answer is None
    assert split_thought(text) == (thought, text if unchanged else answer)


@pytest.mark.parametrize(
    "text",
    ["<think>Hm.</think>", "<think>\n\n</think>\n\n", "Hm.\n</think>\n \n", "</think>",
     "<think>a</think>\n[THINK]b[/THINK]", "<thinking>Hm.</thinking>\t", "<think>Hm. Wait,"],
)  # fmt: skip
def test_nothing_behind_a_thought_is_no_answer(text: str) -> None:
    assert answer_of(text) is None


@pytest.mark.parametrize("text", ["", " \n", "Paris.", "<think>\n</think>Paris."])
def test_an_empty_response_without_a_thought_is_as_it_is(text: str) -> None:
    assert answer_of(text) == text.removeprefix("<think>\n</think>")


@pytest.mark.parametrize("markers", ["added", "special", "text"])
@pytest.mark.parametrize("behind", ["", "\n\n", " \n"])
def test_a_sampled_thought_with_nothing_behind_it_has_no_answer(markers: str, behind: str) -> None:
    got = sample(thinking_tokenizer(R1, markers), f"Hm.\n</think>{behind}")
    assert (got.text, got.thought, got.answered, got.finished) == ("", "Hm.", False, False)
    assert answer_of(got.judged) is None


@pytest.mark.parametrize(
    ("context", "shown"),
    [
        ("Human: a\n\nAssistant: <think>secret</think>b\n\nHuman: c",
         "Human: a\n\nAssistant: b\n\nHuman: c"),
        ("Human: a\nAssistant: secret\n</think>\n\nb\n\nc\nHuman: d",
         "Human: a\nAssistant: b\n\nc\nHuman: d"),
        ("Assistant:\n[THINK]secret[/THINK] b", "Assistant:b"),
        ("Human: a\n\nAssistant: <think>secret, and so on\n\nHuman: c",
         "Human: a\n\nAssistant: \n\nHuman: c"),
        ("Human: is <think> a tag?\n\nAssistant: yes, <think> is.", None),
        ("what does <think>a</think> mean?", None),
        ("Human: <think>mine</think>b", None),
        ("Human: a\n\nAssistant: <thinking>", "Human: a\n\nAssistant: "),
        ("", None),
    ],
)  # fmt: skip
def test_a_context_in_text_loses_the_thoughts_of_the_assistant_alone(
    context: str, shown: str | None
) -> None:
    got = answers_of(Comparison(context, "a", "b"))
    assert got is not None
    assert got.context == (context if shown is None else shown)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n", "[THINK]", " ", "[/THINK]"])))
def test_an_answer_is_its_own_answer(pieces: list[str]) -> None:
    answer = answer_of("".join(pieces))
    assert answer is None or answer_of(answer) == answer


def test_earlier_turns_are_shown_to_the_judge_without_their_thoughts() -> None:
    answer = {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nParis."}
    assert dialogue_text([*USER, answer, {"role": "user", "content": "is <think> a tag?"}]) == (
        "Human: what is the capital of France?\n\nAssistant: Paris.\n\nHuman: is <think> a tag?"
    )


# -- sampled ids -----------------------------------------------------------------------------------


def sample(tokenizer: Any, text: str, end: bool = True, **kwargs: Any) -> Response:
    """The response to `USER` that reads `text`."""
    encoder = ChatEncoder(tokenizer, chat_template_kwargs=kwargs)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] * 2 if end else []
    return sampled_response(ids, encoder, encoder.encode_prompt(USER))


@pytest.mark.parametrize("markers", ["added", "special", "text"])
@pytest.mark.parametrize(
    ("template", "opening"), [(QWEN_3, "<think>\n"), (R1, "")], ids=["qwen-3", "r1"]
)
def test_the_answer_of_sampled_ids_stands_behind_the_thought(
    markers: str, template: str, opening: str
) -> None:
    tokenizer = thinking_tokenizer(template, markers)
    for between in ("", "\n", "\n\n", " "):
        thought = f"{opening}Hm, is it the capital?\n</think>"
        got = sample(tokenizer, f"{thought}{between}Paris, I think.", enable_thinking=True)
        assert (got.text, got.thought) == ("Paris, I think.", "Hm, is it the capital?")
        assert got.answered
        assert got.finished
        assert got.ids[-1] == tokenizer.eos_token_id
        # Every id is of the thought or of the answer, cut where the closing marker ends.
        head = got.ids[: got.thought_length]
        assert tokenizer.decode(head).startswith(f"{opening}Hm")
        assert "</think>" in tokenizer.decode(head)
        assert "</think>" not in tokenizer.decode(head[:-1])
        assert got.answer_length == len(got.ids) - len(head)
    cut = sample(tokenizer, f"{opening}Hm\n</think>\n\nPar", end=False, enable_thinking=True)
    assert (cut.text, cut.finished, cut.answered) == ("Par", False, True)


@pytest.mark.parametrize("markers", ["added", "special", "text"])
@pytest.mark.parametrize(
    ("template", "opening"), [(QWEN_3, "<think>\n"), (R1, "")], ids=["qwen-3", "r1"]
)
@pytest.mark.parametrize("end", [True, False])
def test_a_thought_that_never_ends_has_no_answer(
    markers: str, template: str, opening: str, end: bool
) -> None:
    tokenizer = thinking_tokenizer(template, markers)
    got = sample(tokenizer, f"{opening}Hm, is it", end, enable_thinking=True)
    assert (got.text, got.thought, got.answered, got.finished) == ("", "Hm, is it", False, False)
    assert got.answer_length == 0
    assert answer_of(got.judged) is None


def test_with_thinking_off_the_prompt_has_closed_the_thought() -> None:
    got = sample(thinking_tokenizer(QWEN_3), "Paris.")
    assert (got.text, got.thought, got.finished) == ("Paris.", None, True)
    assert got.answer_length == len(got.ids)


def test_gpt_oss_marks_its_thought_by_channels() -> None:
    channel, message, start = "<|channel|>", "<|message|>", "<|start|>"
    tokenizer = wrap(byte_bpe())
    tokenizer.add_special_tokens({"additional_special_tokens": [channel, message, start]})
    text = f"{channel}analysis{message}Hm.{start}assistant{channel}final{message}Paris."
    got = sample(tokenizer, text)
    assert got.text == "Paris."
    assert tokenizer.decode(got.ids[: got.thought_length]).endswith(f"{channel}final{message}")
    assert not sample(tokenizer, f"{channel}analysis{message}Hm.").answered
    preamble = f"{channel}commentary{message}Hm.<|end|>{start}assistant"
    assert sample(tokenizer, preamble + text).text == "Paris."


@pytest.mark.parametrize("mention", ["</think>", "a\n</think>\n\nParis.", "</think></think>"])
def test_an_endless_thought_may_mention_the_marker_of_another_model(mention: str) -> None:
    got = sample(wrap(byte_bpe()), f"[THINK]Hm, {mention} and so on")
    assert not got.answered
    assert answer_of(got.judged) is None


@given(st.data())
def test_any_text_behind_a_thought_is_the_answer(data: st.DataObject) -> None:
    words = st.text(st.sampled_from("ab .é東\n🦦"), max_size=12)
    thought, answer = data.draw(words), data.draw(words)
    markers = data.draw(st.sampled_from(["added", "special", "text"]))
    got = sample(_TOKENIZERS[markers], f"{thought}</think>{answer}")
    assert got.text == answer.strip()
    assert got.thought == thought.strip()


_TOKENIZERS = {markers: thinking_tokenizer(R1, markers) for markers in ("added", "special", "text")}

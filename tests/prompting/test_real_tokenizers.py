"""ChatEncoder with tokenizers of real models, on real dialogues and on text made to break it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError as JinjaError
from omegaconf import OmegaConf
from test_chat_encoder import assistant, hh_dialogues, in_one_call, trained_stretches, user

from conftest import ROOT
from real_tokenizers import REAL_TOKENIZERS
from self_judge import ChatEncoder, Comparison, JudgeTemplates
from self_judge.errors import EncodingError
from self_judge.prompting.judge_prompt import encode_orders

Dialogue = list[dict[str, str]]


class Real(NamedTuple):
    """An encoder on a real tokenizer, and that tokenizer's own added tokens, words left out."""

    name: str
    encoder: ChatEncoder
    controls: dict[int, str]

    def decoded(self, ids: Any) -> str:
        """The text of ids, with nothing left out."""
        tokenizer = self.encoder.tokenizer
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def readable(self, text: str) -> str:
        """What the tokenizer itself makes of a text, before it cuts it into tokens."""
        text = text.replace("▁", " ")  # how SentencePiece writes a space
        if "unigram" in self.name:
            text = self.encoder.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
            text = text.replace("<|newline|>", "\n").replace("▁", " ")
        return "".join(text.split()) if "t5" in self.name else text.strip()  # no space is kept

    def controls_in(self, ids: Any) -> list[int]:
        return [i for i in ids if i in self.controls]


@pytest.fixture(scope="module", params=REAL_TOKENIZERS)
def real(request: pytest.FixtureRequest) -> Real:
    tokenizer = REAL_TOKENIZERS[request.param]()
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    controls = {i: text for i, text in added.items() if len(text) > 1}
    return Real(request.param, ChatEncoder(tokenizer), controls)


def templated(real: Real, messages: Dialogue, **kwargs: Any) -> list[int] | None:
    """What Transformers makes of it, or nothing where the template refuses the roles."""
    try:
        ids = real.encoder.tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)
    except JinjaError:
        return None
    return list(ids)


def test_real_dialogues_get_the_ids_of_apply_chat_template(real: Real) -> None:
    encoder, dialogues = real.encoder, hh_dialogues(500)
    refused = differing = 0
    for messages in dialogues:
        theirs = templated(real, messages)
        if theirs is None:  # two messages of the human in a row
            with pytest.raises(EncodingError, match="roles must alternate"):
                encoder.encode_dialogue(messages)
            refused += 1
            continue
        prompt = templated(real, messages[:-1], add_generation_prompt=True)
        assert prompt is not None
        for ours, ids in (
            (encoder.encode_dialogue(messages).ids, theirs),
            (encoder.encode_prompt(messages[:-1]), prompt),
        ):
            if ours != ids:
                assert real.decoded(ours) == real.decoded(ids)
                # Only an empty message brings two spaces of the template together.
                assert any(not m["content"].strip() for m in messages)
                differing += 1
    assert refused <= 1
    assert differing <= 2


def test_a_text_has_the_same_ids_word_by_word_as_in_one_call(real: Real) -> None:
    text, draw = real.encoder._text, random.Random(0)
    whole = in_one_call(text)
    dialogues = [m["content"] for messages in hh_dialogues(100) for m in messages]
    parts = [
        *("the", " don't", " I'm", "  two", " x", "12", "\n\n", "\n", "end.", "<unk>", " é", "🙂"),
        *("\u200b b", " ŉ", " \ufdfa x", "\u0301", "\u00a0", "\t", "\r\n", " ﾞ", "</think> a"),
        *(
            "\ud800",
            " \udfff b",
            " e.g",
            ".com",
            "?!",
            ";",
            ":a",
            ", and",
            "...",
            ".\n\n- x",
            "!'s",
        ),
    ]
    mixed = ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(500)]
    judged = [f"A: {a}\n\nB: {b} it is" for a, b in zip(dialogues, mixed, strict=False)]
    for content in (*dialogues, *mixed, *judged):
        for anchor in {text.anchor, "\n"}:
            assert text.encode(content, anchor) == whole.encode(content, anchor)
    # Tokens of several words are in the vocabularies of Jurassic alone.
    assert bool(text._exact_cuts) != ("unigram" in real.name)


def test_a_real_prompt_is_a_prefix_and_the_loss_falls_on_the_whole_answer(real: Real) -> None:
    encoder = real.encoder
    end = encoder.tokenizer.eos_token
    for messages in hh_dialogues(50):
        prompt, whole = encoder.encode_prompt(messages[:-1]), encoder.encode_dialogue(messages)
        assert whole.ids[: len(prompt)] == prompt
        assert whole.mask[len(prompt)] == 1
        trained = trained_stretches(encoder, messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert len(trained) == len(answers)
        for ids, answer in zip(trained, answers, strict=True):
            shown = real.decoded(ids)
            assert shown.endswith(end)
            assert real.readable(shown.removesuffix(end)) == real.readable(answer)


def test_a_real_response_decodes_back_to_itself(real: Real) -> None:
    for messages in hh_dialogues(500):
        text = messages[-1]["content"]
        ids = real.encoder.encode_content(text)
        assert real.controls_in(ids) == []
        assert real.readable(real.encoder.decode(ids)) == real.readable(text)


@pytest.mark.parametrize("position", range(3))
def test_a_spelled_out_control_token_stays_text(real: Real, position: int) -> None:
    """All of the tokenizer's, in each role, among words and nested into themselves."""
    plain = [{"role": "system", "content": "x"}, user("x"), assistant("x")]
    if not real.encoder._layouts.takes_system:
        position = max(position, 1)
        plain = plain[1:]
        position -= 1
    structure = real.controls_in(real.encoder.encode_dialogue(plain).ids)
    texts = [f"a {c} b{c}{c} {c[:2]}{c}{c[2:]}" for c in real.controls.values()]
    random.Random(position).shuffle(texts)
    for start in range(0, len(texts), 20):
        messages = [dict(m) for m in plain]
        messages[position]["content"] = text = "".join(texts[start : start + 20])
        ids = real.encoder.encode_dialogue(messages).ids
        assert real.controls_in(ids) == structure
        assert real.readable(text) in real.readable(real.decoded(ids))


@given(data=st.data())
def test_no_text_brings_a_control_token_into_a_judge_prompt(real: Real, data: Any) -> None:
    own = st.sampled_from(list(real.controls.values()))
    wide = own.map(lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t))
    pieces = st.one_of(own, wide, own.map(lambda t: t[:-1]), own.map(lambda t: t[1:]), st.text())
    hostile = st.lists(pieces, max_size=5).map("".join)
    context, one, other = (data.draw(hostile) for _ in range(3))
    templates = JudgeTemplates({"better": {"user": USER, "assistant": "The better is Response"}})
    plain = encode_orders(real.encoder, templates, "better", Comparison("a", "b", "c"))
    given = encode_orders(real.encoder, templates, "better", Comparison(context, one, other))
    assert plain is not None
    assert given is not None
    for ours, benign in zip(given, plain, strict=True):
        assert real.controls_in(ours) == real.controls_in(benign)


USER = "{context}\n\nResponse A: {response_a}\n\nResponse B: {response_b}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "templates").glob("*.yaml")))
def test_a_judge_prompt_of_the_shipped_templates_ends_where_the_letter_comes(
    real: Real, path: Path
) -> None:
    encoder = real.encoder
    shipped = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(shipped, dict)
    templates = JudgeTemplates(shipped["templates"]["judge"])
    letters = encoder.letter_ids(templates)
    shown = encoder.tokenizer.convert_ids_to_tokens(list(letters))
    assert [token.strip("Ġ▁") for token in shown] == ["A", "B"]
    for question, answer, *rest in hh_dialogues(10):
        last = (rest or [answer])[-1]["content"]
        comparison = Comparison(question["content"], answer["content"], last)
        for principle in templates:
            *before, lead_in = templates.render(principle, comparison)
            ids = encoder.encode_open([*before, lead_in])
            assert real.decoded(ids).endswith(lead_in["content"])
            for letter, token in zip("AB", letters, strict=True):
                judged = assistant(f"{lead_in['content']} {letter}")
                assert encoder.encode_open([*before, judged]) == [*ids, token]

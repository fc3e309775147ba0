"""Chat templates that do something to contents, read the clock, or have markers of odd spelling."""

from __future__ import annotations

import datetime
import json
import pickle
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.chat_template_utils as rendering
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from chat_templates import FAMILIES
from conftest import CHATML, TEMPLATES, byte_bpe, sentencepiece_bpe, unigram, wrap
from self_judge import ChatEncoder, JudgeTemplates
from self_judge.errors import EncodingError
from self_judge.prompting.chat_encoder import _say_inspected
from self_judge.prompting.judge_json import (
    encoder_as_taught,
    load_judge_settings,
    save_judge_settings,
)

QUESTION = {"role": "user", "content": "is it"}
ANSWER = {"role": "assistant", "content": "yes it was"}
SYSTEM = {"role": "system", "content": "be kind"}


def writing(content: str) -> str:
    """ChatML that writes contents through an expression."""
    return CHATML.replace("m['content']", content)


# -- what a template does to contents --------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "m.content | tojson",
        "m.content | e",
        "m.content | replace('a', 'b')",
        "m.content | replace('\n\n', '\n')",
        "m.content | replace('\\r\\n', '\n')",
        "m.content | truncate(40)",
        "m.content | wordwrap(79)",
        "m.content | indent",
        "m.content | urlize",
        "m.content | striptags",
        "m.content | capitalize",
        "m.content.lower()",
        "m.content[:2000]",
        "m.content.strip(' ')",
        "m.content.strip(' \n\t')",
        "m.content.expandtabs()",
        "m.content ~ (m.content | length)",
        "m.content | e if m.content | length > 1000 else m.content",
        "m.content ~ ('!' if m.content.startswith('{') else '?')",
        "m.content | float(m.content)",
        "m.content | center(3)",
        "m.content[:20000]",
        "m.content ~ ('!' if m.content | length > 9000)",
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_template_that_changes_contents_is_refused_with_what_it_does(
    content: str, role: str
) -> None:
    template = writing(f"({content}) if m.role == '{role}' else m.content")
    with pytest.raises(EncodingError, match=f"changes the content of a '{role}' message") as caught:
        ChatEncoder(wrap(byte_bpe()), template)
    assert "is written as" in str(caught.value)
    assert "Set templates.chat" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_message_shows_a_content_and_what_became_of_it() -> None:
    with pytest.raises(EncodingError) as caught:
        ChatEncoder(wrap(byte_bpe()), writing("m.content | replace('&', '+')"))
    assert r"\e\\n &amp; <f> {{" in str(caught.value)
    assert r"\e\\n +amp; <f> {{" in str(caught.value)


def test_a_role_whose_contents_change_is_refused_when_a_dialogue_has_it() -> None:
    """Llama 3.1 quotes the results of tools; its other turns are as written."""
    template = writing("m.content | tojson if m.role == 'tool' else m.content")
    encoder = ChatEncoder(wrap(byte_bpe()), template)
    assert encoder.encode_dialogue([QUESTION, ANSWER])
    with pytest.raises(EncodingError, match="changes the content of a 'tool' message"):
        encoder.encode_prompt([QUESTION, ANSWER, {"role": "tool", "content": "7"}])


@pytest.mark.parametrize(
    "content",
    [
        "m.content",
        "m.content | trim",
        "m.content.strip('\n')",
        "m.content.rstrip()",
        "m.content.lstrip('\n')",
        "m.content.split('</think>')[-1]",
        "m.content | string",
    ],
)
def test_a_template_that_writes_or_trims_contents_serves(content: str) -> None:
    assert ChatEncoder(wrap(byte_bpe()), writing(content)).encode_prompt([QUESTION])


# What a template does to some contents alone, and a content of this kind.
INSPECTING = {
    "m.content | replace('\u201c', '\"')": "a \u201cb\u201d",
    "m.content.removeprefix('Answer: ')": "Answer: 7",
    "m.content.rstrip('.!')": "yes.!",
    "m.content.split('</think>')[-1]": "so</think>yes",
    "m.content if '```' not in m.content else 'code'": "see ```x```",
    "m.content ~ ('<think></think>' if m.content.endswith('/no_think'))": "why /no_think",
    "m.content or 'nothing'": "",
    "m.content | replace('\\x41B', 'C')": "xABx",
}


@pytest.mark.parametrize("expression", INSPECTING)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_content_that_a_template_treats_in_its_own_way_is_warned_of(
    expression: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    _say_inspected.cache_clear()
    encoder = ChatEncoder(
        wrap(byte_bpe()), writing(f"({expression}) if m.role == '{role}' else m.content")
    )
    plain = [SYSTEM, QUESTION, ANSWER, QUESTION]
    odd = [{**m, "content": INSPECTING[expression]} if m["role"] == role else m for m in plain]
    encoder.encode_dialogue(plain)
    assert not caplog.records
    for _ in range(2):
        for messages in (odd, [*odd, ANSWER]):
            encoder.encode_prompt(messages)
            encoder.encode_dialogue(messages)
    [said] = [record.getMessage() for record in caplog.records]
    assert "the chat template treats a message with " in said
    # The same text is nothing to the other roles.
    _say_inspected.cache_clear()
    caplog.clear()
    other = "user" if role == "assistant" else "assistant"
    encoder.encode_dialogue(
        [{**m, "content": f"{INSPECTING[expression]}x"} if m["role"] == other else m for m in plain]
    )
    assert not caplog.records


@pytest.mark.parametrize(
    "wrong", ["1 / 0", "m.content.x.y", "(m.content + 1)", "[][3].a", "m | abs"]
)
def test_a_template_that_fails_is_refused_in_one_line(wrong: str) -> None:
    with pytest.raises(EncodingError, match="cannot render the roles user: ") as caught:
        ChatEncoder(wrap(byte_bpe()), writing(f"{wrong} ~ m.content"))
    assert "\n" not in str(caught.value)


SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
FOR_TEXT = [p for p in SHIPPED if not p.stem.startswith(("idefics", "llava", "smolvlm"))]


@cache
def shipped(path: Path) -> ChatEncoder:
    return ChatEncoder(wrap(byte_bpe()), path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FOR_TEXT, ids=lambda p: p.stem)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_ids_decode_to_what_a_published_template_writes(path: Path, data: st.DataObject) -> None:
    text = st.text(st.characters(exclude_categories=["C"], exclude_characters="<"), min_size=1)
    messages = [
        {"role": role, "content": data.draw(text.filter(lambda x: x.strip()))}
        for role in ("user", "assistant", "user")
    ]
    encoder = shipped(path)
    rendered = encoder.tokenizer.apply_chat_template(
        messages,
        chat_template=encoder.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    ids = encoder.encode_prompt(messages)
    assert encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == rendered.rstrip(" ")


# -- templates that are no function of the messages ------------------------------------------------

DATED = "Today is {{ strftime_now('%d %B %Y, %-d.%-m.%y %H:%M 100%%') }}.\n" + CHATML
TOLD = "Today is 05 March 2026, 5.3.26 00:00 100%."


class _Clock(datetime.datetime):
    today_is = datetime.datetime(2026, 3, 5, 23, 59)

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return cls.today_is


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[_Clock]:
    """The clock that Transformers gives to templates."""
    monkeypatch.setattr(rendering, "datetime", _Clock)
    return _Clock


def text_of(encoder: ChatEncoder) -> str:
    return str(encoder.tokenizer.decode(encoder.encode_prompt([QUESTION])))


def dated(date: str | None = None, template: str = DATED) -> ChatEncoder:
    return ChatEncoder(
        wrap(byte_bpe()), template, chat_template_kwargs=date and {"strftime_now": date}
    )


def test_a_template_that_reads_the_clock_gets_one_date(clock: type[_Clock]) -> None:
    encoder = dated("2026-03-05")
    assert text_of(encoder).startswith(TOLD)
    rendered = encoder.tokenizer.apply_chat_template(
        [QUESTION], chat_template=DATED, tokenize=False, add_generation_prompt=True
    )
    assert text_of(encoder) == rendered.replace("23:59", "00:00"), "as Transformers writes it"


def test_without_a_date_it_is_the_day_on_which_the_encoder_was_made(clock: type[_Clock]) -> None:
    today = datetime.date.today()
    encoder = dated()
    assert encoder.chat_template_kwargs["strftime_now"] == today.isoformat()
    assert today.strftime("Today is %d %B %Y") in text_of(encoder)


def test_the_date_is_kept_with_the_model_and_in_other_processes(tmp_path: Path) -> None:
    taught, templates = dated("2026-03-05"), JudgeTemplates(TEMPLATES)
    save_judge_settings(tmp_path, taught, templates, taught.letter_ids(templates))
    later = encoder_as_taught(taught.tokenizer, load_judge_settings(tmp_path))
    assert text_of(later) == text_of(taught)
    assert text_of(later).startswith(TOLD)
    assert text_of(pickle.loads(pickle.dumps(taught))) == text_of(taught)
    content = json.loads((tmp_path / "judge.json").read_text())
    assert content["chat_template"] == DATED
    assert content["chat_template_kwargs"]["strftime_now"] == "2026-03-05"
    other = encoder_as_taught(taught.tokenizer, load_judge_settings(tmp_path), CHATML)
    assert "strftime_now" not in other.chat_template_kwargs, "this one reads no clock"


@pytest.mark.parametrize(
    "template",
    [
        "{% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{{ d }}{% endif %}\n",
        "\n  {%- macro head() %}{{ strftime_now('%Y') }}{% endmacro %}\n{{ head() }}",
        "  {{ strftime_now('%Y') | int + 0 }}\n",
        "\n{{ strftime_now('%Y') }}{% for m in messages %}{{ strftime_now('%j') }}{% endfor %}",
    ],
)
def test_the_date_reaches_every_place_and_moves_nothing(template: str, clock: type[_Clock]) -> None:
    encoder = dated("2026-03-05", template + CHATML)
    rendered = encoder.tokenizer.apply_chat_template(
        [QUESTION], chat_template=template + CHATML, tokenize=False, add_generation_prompt=True
    )
    assert text_of(encoder) == rendered
    assert "2026" in rendered


@pytest.mark.parametrize("directive", [*"aAbBcCdDeFgGhHIjmMnpPrRStTuUVwWxXyYzZ", *"%", "-e", "-I"])
def test_a_date_is_written_as_transformers_writes_it(directive: str, clock: type[_Clock]) -> None:
    clock.today_is = datetime.datetime(2026, 3, 5)
    template = "{{ strftime_now('[%" + directive + "]') }}" + CHATML
    encoder = dated("2026-03-05", template)
    rendered = encoder.tokenizer.apply_chat_template(
        [QUESTION], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert text_of(encoder) == rendered


@pytest.mark.parametrize("directive", ["_d", "^b", "03d", "Od", "!"])
def test_a_date_format_that_is_not_known_is_refused(directive: str) -> None:
    template = "{{ strftime_now('[%" + directive + "]') }}" + CHATML
    with pytest.raises(EncodingError, match=r"the date format .* is not supported") as caught:
        dated("2026-03-05", template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("date", ["yesterday", "2026-13-01", "", 20260305, ["2026-03-05"]])
def test_what_is_no_date_is_refused(date: Any) -> None:
    with pytest.raises(EncodingError, match="strftime_now must be a date such as '2026-03-01'"):
        ChatEncoder(wrap(byte_bpe()), DATED, chat_template_kwargs={"strftime_now": date})


@pytest.mark.parametrize(
    "chance",
    [
        "['a', 'b'] | random",
        "range(9) | random",
        "[['a', 'b']] | map('random') | first",
        "lipsum(n=1)",
        "joiner()",
        "raise_exception",
    ],
)
def test_a_template_that_draws_or_writes_addresses_is_refused(chance: str) -> None:
    for seed in range(5):
        random.seed(seed)
        with pytest.raises(EncodingError, match="renders differently every time"):
            ChatEncoder(wrap(byte_bpe()), writing(f"({chance}) ~ m.content"))


# -- markers of any spelling -----------------------------------------------------------------------

MARKERS = {
    "brackets": ("【turn】", "【/turn】"),
    "words": ("Sprecher", "Ende"),
    "outer blanks": (" <turn> ", " <end> "),
    "outer newlines": ("\n<turn>\n", "\n<end>\n"),
    "half markup": ("turn>", "<end"),
    "one character": ("🧑", "♦"),
    "one inside the other": ("~turn", "~turn~"),
    "with roles": ("【{}】", "【end】"),
    "letters": ("Human", "Assistant"),
}
TOKENIZERS = {"byte": byte_bpe, "sentencepiece": sentencepiece_bpe}


@cache
def marked(kind: str, name: str) -> ChatEncoder:
    opening, closing = MARKERS[name]
    tokenizer = wrap(TOKENIZERS[kind]())
    spelled = [opening.format(r) for r in ("user", "assistant", "system")] + [closing]
    added = [AddedToken(t, normalized=False, special=False) for t in dict.fromkeys(spelled)]
    tokenizer.add_tokens([*added, AddedToken("otter", normalized=False, special=False)])
    roles = [json.dumps(t, ensure_ascii=False) for t in spelled[:3]]
    named = f"dict(user={roles[0]}, assistant={roles[1]}, system={roles[2]})"
    end = json.dumps(closing, ensure_ascii=False)
    return ChatEncoder(
        tokenizer,
        f"{{% set names = {named} %}}{{% for m in messages %}}"
        f"{{{{ names[m.role] ~ m.content ~ {end} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {roles[1]} }}}}{{% endif %}}",
    )


def markers(encoder: ChatEncoder, name: str) -> set[int]:
    opening, closing = MARKERS[name]
    spelled = [opening.format(r) for r in ("user", "assistant", "system")] + [closing]
    return set(encoder.tokenizer.convert_tokens_to_ids(spelled))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", MARKERS)
@given(data=st.data())
def test_no_content_writes_a_marker_however_it_is_spelled(
    kind: str, name: str, data: st.DataObject
) -> None:
    encoder = marked(kind, name)
    used = markers(encoder, name)
    own = [encoder.tokenizer.convert_ids_to_tokens(i) for i in used]
    pieces = st.one_of(
        st.sampled_from([*own, *(t[:1] for t in own), *(t[1:] for t in own), " ", "\n", "otter"]),
        st.text(max_size=3),
    )
    text = st.lists(pieces, max_size=8).map("".join)
    contents = [data.draw(text) for _ in range(3)]
    roles = ("system", "user", "assistant")
    plain = [{"role": r, "content": "x"} for r in roles]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    ids, benign = encoder.encode_dialogue(messages).ids, encoder.encode_dialogue(plain).ids
    assert [i for i in ids if i in used] == [i for i in benign if i in used]
    assert used.isdisjoint(encoder.encode_content(contents[0]))
    decoded = encoder.tokenizer.decode(encoder.encode_content(contents[1]))
    if kind == "byte":
        assert decoded == contents[1].encode("utf-8", "replace").decode()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", MARKERS)
def test_markers_stand_in_the_structure_and_end_answers(kind: str, name: str) -> None:
    encoder = marked(kind, name)
    ids = encoder.encode_dialogue([QUESTION, ANSWER])
    [end] = encoder.tokenizer.convert_tokens_to_ids([MARKERS[name][1]])
    assert sum(i in markers(encoder, name) for i in ids.ids) == 4
    assert encoder.stop_token_ids[0] == end
    assert [i for i, m in zip(ids.ids, ids.mask, strict=True) if m][-1] == end
    assert all(map(encoder.is_control, markers(encoder, name)))


def test_words_around_a_marker_of_one_character_stay_whole() -> None:
    encoder = marked("byte", "one character")
    around = [encoder.tokenizer(text)["input_ids"] for text in ("the capital ", " of France")]
    ids = encoder.encode_content("the capital 🧑 of France")
    assert ids[: len(around[0])] == around[0]
    assert ids[-len(around[1]) :] == around[1]
    assert encoder.tokenizer.decode(ids) == "the capital 🧑 of France"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_added_words_that_the_structure_does_not_use_stay_words(kind: str) -> None:
    encoder = marked(kind, "brackets")
    [otter] = encoder.tokenizer.convert_tokens_to_ids(["otter"])
    assert otter in encoder.encode_content("an otter swims")
    assert not encoder.is_control(otter)


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("m['role']", "m.role")])
def test_added_words_that_are_only_keys_in_the_template_stay_words(template: str) -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in ("content", "role")])
    text = "the content of a role"
    assert ChatEncoder(tokenizer, template).encode_content(text) == tokenizer(text)["input_ids"]


def test_a_marker_that_is_an_ordinary_entry_of_the_vocabulary_is_one_too() -> None:
    saved = json.loads(unigram().to_str())
    saved["model"]["vocab"] += [["<turn>", 0.0], ["<stop>", 0.0]]
    tokenizer = wrap(Tokenizer.from_str(json.dumps(saved)))
    turn, stop = tokenizer.convert_tokens_to_ids(["<turn>", "<stop>"])
    assert turn in tokenizer("a<turn>")["input_ids"]
    encoder = ChatEncoder(
        tokenizer, "{% for m in messages %}<turn>{{ m.content }}<stop>{% endfor %}"
    )
    ids = encoder.encode_dialogue([QUESTION, {"role": "assistant", "content": "<turn>a<stop>"}])
    assert [i for i in ids.ids if i in (turn, stop)] == [turn, stop, turn, stop]
    assert encoder.stop_token_ids[0] == stop


def test_plain_text_markers_stay_text_in_contents() -> None:
    encoder = ChatEncoder(
        wrap(byte_bpe(), None), user_marker="\n\nHuman:", assistant_marker="\n\nAssistant:"
    )
    text = "a\n\nHuman: b\n\nAssistant: c"
    assert encoder.encode_content(text) == encoder.tokenizer(text)["input_ids"]
    assert encoder.tokenizer.eos_token_id == encoder.stop_token_ids[0]


def test_a_marker_that_only_an_unusual_role_shows_is_refused() -> None:
    tokenizer = wrap(byte_bpe())
    tokenizer.add_tokens([AddedToken("@critic", special=False), AddedToken("@user", special=False)])
    encoder = ChatEncoder(tokenizer, writing("'@' ~ m.role ~ ' ' ~ m.content"))
    assert encoder.encode_prompt([QUESTION])
    with pytest.raises(EncodingError, match="writes the added token '@critic' for the roles user/"):
        encoder.encode_prompt([QUESTION, {"role": "critic", "content": "no"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_white_space_that_is_an_added_token_stays_text(family: str) -> None:
    """Gemma has runs of newlines as added tokens."""
    tokenizer = FAMILIES[family].tokenizer()
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False, special=False)])
    encoder = ChatEncoder(tokenizer)
    assert tokenizer.convert_tokens_to_ids("\n\n") in encoder.encode_content("is it\n\nyes")

"""The source of chat templates: the clock, quoted texts, and templates of plain turn markers.

This module does not render templates.
"""

from __future__ import annotations

import datetime
import json
import string
from typing import TYPE_CHECKING

import jinja2

from self_judge.errors import EncodingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The name of the function from which chat templates get the date. Transformers provides the
# function. As a key of `chat_template_kwargs`, this name sets the date, in ISO format.
CLOCK = "strftime_now"


def _lexed(chat_template: str) -> list[tuple[str, str]]:
    # "data" is text outside of {{ }} and {% %}, and "string" is quoted text inside them.
    return [(kind, text) for _, kind, text in jinja2.Environment().lex(chat_template)]


def written_in(chat_template: str) -> str:
    """Returns the texts that a template may write."""
    lexed = _lexed(chat_template)
    after = [*lexed[1:], ("", "")]
    return "\0".join(
        text
        for (kind, text), (_, following) in zip(lexed, after, strict=True)
        # A key, such as 'content' in message['content'], is not written.
        if kind == "data" or (kind == "string" and following != "]")
    )


def literals_in(chat_template: str) -> list[str]:
    """Returns the short quoted texts in a template, with which it may compare contents."""
    quoted = {text[1:-1] for kind, text in _lexed(chat_template) if kind == "string"}
    texts = (text.encode("ascii", "backslashreplace").decode("unicode_escape") for text in quoted)
    return sorted(text for text in texts if text.strip() and len(text) <= 64)


def at_date(chat_template: str, date: str) -> str:
    """Returns the template with its clock fixed at midnight on `date` ("2026-03-01").

    Raises:
        EncodingError: `date` is not a date in ISO format.
    """
    try:
        moment = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    except (TypeError, ValueError) as error:
        raise EncodingError(
            f"chat_template_kwargs.{CLOCK} must be a date such as '2026-03-01', got {date!r:.40}"
        ) from error
    # Transformers does not pass functions to templates. A macro with the same name therefore
    # replaces each directive in the format: "%d %b" -> "01 %b" -> "01 Mar".
    written = {f"%{x}": moment.strftime(f"%{x}") for x in string.ascii_letters}
    written = {directive: text for directive, text in written.items() if text != directive}
    without_zero = {f"%-{x[1]}": text.lstrip("0 ") or "0" for x, text in written.items()}
    steps = [("%%", "\1"), *written.items(), *without_zero.items()]
    return (
        "{%- macro " + CLOCK + "(format) -%}{%- set now = namespace(text=format) -%}"
        "{%- for directive, text in " + json.dumps(steps) + " -%}"
        "{%- set now.text = now.text | replace(directive, text) -%}{%- endfor -%}"
        "{%- if '%' in now.text -%}{{ raise_exception('the date format ' ~ format ~ ' is not "
        "supported: use directives such as %d or %-d') }}{%- endif -%}"
        # Jinja drops this newline after the tag, but the template still starts on a new line.
        "{{ now.text | replace('\1', '%') }}{%- endmacro %}\n" + chat_template
    )


def marker_template(user_marker: str, assistant_marker: str, with_bos: bool) -> str:
    """Returns a chat template with plain-text turn markers and an EOS token after every answer."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)  # Jinja does not decode escaped surrogate pairs

    def turn(marker: str) -> str:
        spaced = marker if marker[-1:].isspace() else marker + " "
        return "{{ " + quoted(spaced) + " + message['content'] }}"

    opening = "{{ " + quoted(assistant_marker.rstrip(" ")) + " }}"
    return (
        ("{{ bos_token }}" if with_bos else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'system' %}{{ message['content'] }}"
        + "{% elif message['role'] == 'user' %}"
        + turn(user_marker)
        + "{% else %}"
        + turn(assistant_marker)
        + "{{ eos_token }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + opening
        + "{% endif %}"
    )


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # as in Transformers, use the template named "default"
        return template.get("default")
    return template


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]

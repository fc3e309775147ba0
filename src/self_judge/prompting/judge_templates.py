"""Judge templates, which are validated once and rendered the same way for training and judging.

A `Comparison` is rendered as chat messages that end with an unfinished assistant turn. This module
does not handle tokens; `prompting/chat_encoder.py` encodes the messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from self_judge.datatypes import Comparison, Message
from self_judge.errors import TemplateError
from self_judge.prompting.messages import content_of
from self_judge.prompting.thoughts import answer_of

_COMPARISON_FIELDS = ("context", "response_a", "response_b")
_RATIONALE_FIELDS = ("rationale_a", "rationale_b")
_ROLE_LABELS = {"system": "System", "user": "Human", "assistant": "Assistant"}
# A label starts a turn only if text follows it. A final label without text starts the answer.
_TURN_START = re.compile(r"\n\n(?=(?:Human|Assistant): *\S)")


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """The template for one principle.

    Args:
        user: the judge's question, with `{context}`, `{response_a}` and `{response_b}`.
        assistant: the fixed lead-in of the answer. The next token is the letter.
        system: an optional system message.
    """

    user: str
    assistant: str
    system: str | None = None


def substitute(template: str, values: Mapping[str, str]) -> str:
    """Replaces `{name}` with its value for every name in `values`, in a single pass.

    Placeholders inside values and other braces in the template therefore remain unchanged.
    """
    names = "|".join(map(re.escape, values))
    return re.sub(r"\{(" + names + r")\}", lambda match: values[match.group(1)], template)


class JudgeTemplates(Mapping[str, JudgeTemplate]):
    """The judge templates of all principles, in order, as `{principle: {system, user, assistant}}`.

    Args:
        templates: one mapping (or `JudgeTemplate`) per principle. At least one is required.
        decision_rationale: the text after the letter in training with rationales. It contains
            `{rationale_a}` and `{rationale_b}`. Pass one string for all principles or a mapping
            with one string per principle. With `None`, training uses only the letter.

    Raises:
        TemplateError: a placeholder or a part is missing from a template, or a part is unknown.
    """

    def __init__(
        self,
        templates: Mapping[str, Any],
        decision_rationale: str | Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(templates, Mapping) or not templates:
            raise TemplateError(
                "judge templates must be a mapping {principle: {system, user, assistant}} with at "
                f"least one principle, got {type(templates).__name__}: {templates!r:.80}"
            )
        self._templates = {name: _checked(str(name), parts) for name, parts in templates.items()}
        self._rationales = _checked_rationales(decision_rationale, tuple(self._templates))

    @classmethod
    def of(cls, templates: Mapping[str, Any]) -> JudgeTemplates:
        """Returns the templates themselves, or those of a plain mapping."""
        return templates if isinstance(templates, cls) else cls(templates)

    def __getitem__(self, principle: str) -> JudgeTemplate:
        return self._templates[principle]

    def __iter__(self) -> Iterator[str]:
        return iter(self._templates)

    def __len__(self) -> int:
        return len(self._templates)

    def __repr__(self) -> str:
        return f"JudgeTemplates({', '.join(self._templates)})"

    @property
    def principles(self) -> tuple[str, ...]:
        """The principles, in the order of their probabilities in a `Verdict`."""
        return tuple(self._templates)

    @property
    def has_rationales(self) -> bool:
        return bool(self._rationales)

    def render(self, principle: str, comparison: Comparison) -> list[Message]:
        """Renders a comparison for one principle as a chat, with response `a` first.

        The last message is the assistant's fixed lead-in. The next token is the letter.
        """
        template = self._templates[principle]
        values = {
            "context": comparison.context,
            "response_a": comparison.response_a,
            "response_b": comparison.response_b,
        }
        messages: list[Message] = []
        if template.system:
            messages.append({"role": "system", "content": template.system})
        messages.append({"role": "user", "content": substitute(template.user, values)})
        messages.append({"role": "assistant", "content": template.assistant})
        return messages

    def render_rationale(self, principle: str, rationale_a: str, rationale_b: str) -> str:
        """Returns the text after the letter: the rationales for A and B (see the paper)."""
        values = {"rationale_a": rationale_a, "rationale_b": rationale_b}
        return substitute(self._rationales[principle], values)

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dictionary to save with a checkpoint; `from_dict` is the inverse."""
        judge = {
            name: {"system": t.system, "user": t.user, "assistant": t.assistant}
            for name, t in self._templates.items()
        }
        return {"judge": judge, "decision_rationale": dict(self._rationales) or None}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> JudgeTemplates:
        return cls(saved["judge"], saved.get("decision_rationale"))


def _checked(principle: str, parts: Any) -> JudgeTemplate:
    if isinstance(parts, JudgeTemplate):
        parts = {"system": parts.system, "user": parts.user, "assistant": parts.assistant}
    where = f"judge template {principle!r}"
    if not isinstance(parts, Mapping):
        raise TemplateError(
            f"{where} must be a mapping with system, user, assistant, got {type(parts).__name__}"
        )
    unknown = set(parts) - {"system", "user", "assistant"}
    if unknown:
        raise TemplateError(
            f"{where} has unknown parts {sorted(map(str, unknown))}; "
            "the valid parts are system, user, assistant"
        )
    for part in ("user", "assistant"):
        if not isinstance(parts.get(part), str) or not parts[part].strip():
            raise TemplateError(f"{where} needs a non-empty string as {part!r}")
    if parts.get("system") is not None and not isinstance(parts["system"], str):
        raise TemplateError(f"{where} needs a string (or nothing) as 'system'")
    missing = [f"{{{f}}}" for f in _COMPARISON_FIELDS if f"{{{f}}}" not in parts["user"]]
    if missing:
        raise TemplateError(f"{where} lacks {', '.join(missing)} in 'user'")
    system = parts.get("system")
    # The letter token " A" starts with a space, so strip whitespace at the end of the lead-in.
    assistant = parts["assistant"].rstrip()
    return JudgeTemplate(user=parts["user"], assistant=assistant, system=system or None)


def _checked_rationales(
    given: str | Mapping[str, str] | None, principles: Sequence[str]
) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        given = dict.fromkeys(principles, given)
    if not isinstance(given, Mapping):
        raise TemplateError(
            "decision_rationale must be one string for all principles or a mapping "
            f"{{principle: string}}, got {type(given).__name__}"
        )
    given = {str(principle): text for principle, text in given.items()}
    if set(given) != set(principles):
        raise TemplateError(
            f"decision_rationale has the principles {sorted(given)}, but the judge templates have "
            f"{sorted(principles)}: give one string for all principles, or one per principle"
        )
    for principle, text in given.items():
        if not isinstance(text, str):
            raise TemplateError(
                f"decision_rationale of {principle!r} must be a string, got {type(text).__name__}"
            )
        missing = [f"{{{f}}}" for f in _RATIONALE_FIELDS if f"{{{f}}}" not in text]
        if missing:
            raise TemplateError(f"decision_rationale of {principle!r} lacks {', '.join(missing)}")
    return {principle: given[principle] for principle in principles}


def dialogue_text(messages: Sequence[Message]) -> str:
    """Formats a dialogue for a judge prompt.

    A single user message has no label; a longer dialogue gets role labels, so that the judge can
    tell the turns apart: `"Human: …\\n\\nAssistant: …\\n\\nHuman: …"`. Thoughts are left out.
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return _shown(messages[0]).strip()
    return "\n\n".join(
        f"{_ROLE_LABELS.get(m['role'], m['role'].capitalize())}: {_shown(m).strip()}"
        for m in messages
    )


def _shown(message: Message) -> str:
    return (answer_of if message["role"] == "assistant" else str)(content_of(message)) or ""


def turns_of(context: str) -> list[str]:
    """Splits a context into turns, oldest first. Joined with blank lines, they form the context.

    This function is used to shorten judge prompts that are too long. The question (the last turn)
    is always kept.
    """
    return _TURN_START.split(context)

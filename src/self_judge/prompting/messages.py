"""Messages in the formats that people have, as plain text.

It knows the keys and content parts of chat messages. It does not know templates or tokens.

A message may have its text in parts, which templates write one after the other:

    [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]   ->   "What is it?"

What cannot be kept as text (tool calls, images) makes a message unusable; it is never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONING = "reasoning_content"  # the thought of an answer, beside its content
# Keys that chat templates write, beside the role, the content and the thought. An empty value
# counts as none, since Arrow gives every message all keys.
_KEYS = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tool_responses",
    "tool_plan",
    "name",
    "images",
    "audio",
    "refusal",
)
_TEXT_TYPES = ("text", "input_text", "output_text")


def lost(message: Mapping[str, Any]) -> str | None:
    """What of a message would be lost in plain text, as a phrase; `None` if nothing would."""
    key = next((key for key in _KEYS if message.get(key)), None)
    if key is not None:
        return key
    parts = message.get("content")
    types = [_type(part) for part in parts] if isinstance(parts, list) else []
    return next((f"content of type {t!r:.40}" for t in types if t not in _TEXT_TYPES), None)


def content_of(message: Mapping[str, Any]) -> Any:
    """The content of a message, with its text parts joined; unchanged if it is no text."""
    content = message["content"]
    if not isinstance(content, list):
        return content
    given = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [text for text in given if isinstance(text, str)]
    return "".join(texts) if given and len(texts) == len(given) else content


def _type(part: Any) -> Any:
    return (part.get("type") or "text") if isinstance(part, Mapping) else "text"

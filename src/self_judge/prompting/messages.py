"""Converts chat messages in common formats to plain text.

This module handles the keys and content parts of messages. It does not depend on templates.

The text of a message may consist of several parts, which templates join:

    [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]   ->   "What is it?"

A message that contains anything other than text (tool calls, images) is unusable, because no part
of a message may be dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys for the thought before an answer, as in Qwen 3, in OpenRouter and vLLM, and in gpt-oss.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that chat templates render, other than the role, the content and the thought. Empty values
# are ignored, because Arrow adds all keys to every message.
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
# Columns of a record that chat templates render, as in TRL.
_COLUMNS = ("tools", "images", "image")
_TEXT_TYPES = ("text", "input_text", "output_text")


def lost(message: Mapping[str, Any]) -> str | None:
    """Returns the name of a part that would be lost in plain text, or `None` if there is none."""
    key = next(filter(message.get, _KEYS), None)
    if key is not None:
        return key
    parts = message.get("content")
    if not isinstance(parts, list):
        return None
    types = map(_type, parts)
    return next((f"content of type {t!r:.40}" for t in types if t not in _TEXT_TYPES), None)


def lost_column(record: Mapping[str, Any]) -> str | None:
    """Returns the name of a column that would be lost in plain text, or `None` if there is none."""
    given = (key for key in _COLUMNS if record.get(key) and record[key] != "[]")
    return next(given, None)


def reasoning_key(message: Mapping[str, Any]) -> str | None:
    """Returns the key of a message's thought, or `None` if the message has no thought."""
    return next((key for key in _REASONING if message.get(key)), None)


def content_of(message: Mapping[str, Any]) -> Any:
    """Returns the content of a message with its text parts joined; other content is unchanged."""
    content = message["content"]
    if not isinstance(content, list):
        return content
    given = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    texts = [text for text in given if isinstance(text, str)]
    return "".join(texts) if given and len(texts) == len(given) else content


def _type(part: Any) -> Any:
    return (part.get("type") or "text") if isinstance(part, Mapping) else "text"

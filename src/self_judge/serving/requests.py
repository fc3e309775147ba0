"""Validates the bodies of requests; each problem names its field, as in OpenAI's errors.

This module does not depend on models or on the web framework.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from self_judge.config.self_training import SamplingSettings
from self_judge.datatypes import Message
from self_judge.errors import ConfigError
from self_judge.storage.atomic import loads

MAX_NEW_TOKENS = 768  # the maximum length of a response, unless the request has its own
_BEST_OF = re.compile(r"(.*):best-of-(\d{1,4})", re.DOTALL)
_STOP_TEXTS, _TOP_LOGPROBS = 4, 20

# Fields that have no effect on an answer.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "prediction", "verbosity"),
}
# Fields that cannot be followed, with the values that ask for nothing.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "best_of": (1,),
}
_CHAT = {
    *("messages", "model", "n", "stream", "stream_options", "stop", "seed", "max_tokens"),
    *("max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("logprobs", "top_logprobs", "self_judge"),
}


class RequestError(Exception):
    """A request that cannot be answered, with OpenAI's parts of an error.

    Attributes:
        status: the HTTP status.
        param: the field at fault, such as `messages[0].role`.
        code: OpenAI's code, such as `model_not_found`.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        shown = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": shown}


@dataclass(frozen=True)
class ChatRequest:
    """A request to `/v1/chat/completions`.

    Attributes:
        model: the name that was asked for, with `:best-of-N` if given.
        choices: the number of choices in the answer.
        candidates: the number of responses to sample for a tournament, or `None` for plain ones.
        max_tokens: the maximum number of tokens per response, or `None` for the default.
        sampling: the sampling settings, with `max_tokens` or the default.
        top_logprobs: see `Sampling`.
        include_usage: whether a stream ends with the usage.
        deadline: the number of seconds in which the answer is due, or `None`.
    """

    model: str
    messages: list[Message]
    choices: int
    candidates: int | None
    seed: int
    max_tokens: int | None
    sampling: SamplingSettings
    stop: tuple[str, ...]
    top_logprobs: int | None
    stream: bool
    include_usage: bool
    brackets: bool
    deadline: float | None


@dataclass(frozen=True)
class JudgeRequest:
    """A request to `/v1/judge`: a context and the responses to compare, at least two."""

    model: str | None
    context: str | None
    messages: list[Message] | None
    responses: list[str]
    deadline: float | None


class _Fields:
    """Reads the fields of a JSON object; `path` is the name of the object in errors."""

    def __init__(self, given: Any, path: str = "") -> None:
        if not isinstance(given, dict):
            raise RequestError(f"expected an object, got {_kind(given)}", path or None)
        self.given: dict[str, Any] = given
        self.path = path

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def error(self, key: str, message: str, code: str | None = None) -> RequestError:
        return RequestError(f"{self.name(key)}: {message}", self.name(key), code=code)

    def only(self, known: set[str]) -> None:
        for key in self.given:
            if key not in known:
                raise self.error(f"{key:.80}", "unknown field", "unknown_parameter")

    def get(self, key: str, types: type | tuple[type, ...], wanted: str, default: Any) -> Any:
        value = self.given.get(key)
        if value is None:
            return default
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.error(key, f"expected {wanted}, got {_kind(value)}", "invalid_type")
        return value

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool, "true or false", False))

    def text(self, key: str) -> str | None:
        value: str | None = self.get(key, str, "text", None)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, (int, float), "a number", default)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, "expected a finite number", "invalid_value")
        return number

    def integer(self, key: str, least: int, most: int, default: int | None) -> int | None:
        value = self.get(key, int, "a whole number", default)
        if value is not None and not least <= value <= most:
            what = "below the minimum" if value < least else "above the maximum"
            limit = least if value < least else most
            raise self.error(key, f"{what} of {limit}", "invalid_value")
        return None if value is None else int(value)


def body_of(content: bytes) -> _Fields:
    """Parses the body of a request."""
    try:
        return _Fields(loads(content))
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error!s:.200}") from None


def chat_request(content: bytes, name: str, max_n: int) -> ChatRequest:
    """Validates a request for a chat completion.

    Args:
        name: the name of the served model.
        max_n: the maximum number of responses.

    Raises:
        RequestError: a field cannot be used.
    """
    body = body_of(content)
    body.only(_CHAT | _IGNORED | _NOT_SUPPORTED.keys())
    for key, neutral in _NOT_SUPPORTED.items():
        value = body.given.get(key)
        if value is not None and not any(_equal(value, given) for given in neutral):
            raise body.error(key, "this server does not support it", "unsupported_parameter")
    model, candidates = _model(body, name, max_n)
    own = _Fields(body.given.get("self_judge") or {}, "self_judge")
    own.only({"n", "brackets", "deadline_ms"})
    asked = own.integer("n", 1, max_n, None)
    if asked is not None and candidates is not None and asked != candidates:
        raise own.error("n", f"the model {model!r:.200} asks for another number", "invalid_value")
    candidates = candidates or asked
    choices = body.integer("n", 1, max_n, 1) or 1
    if candidates is not None and choices > candidates:
        raise body.error("n", f"a tournament of {candidates} has no {choices} responses")
    brackets = own.flag("brackets")
    if brackets and candidates is None:
        raise own.error("brackets", "there is no tournament: set self_judge.n")
    stream = body.flag("stream")
    options = _Fields(body.given.get("stream_options") or {}, "stream_options")
    options.only({"include_usage", "include_obfuscation"})
    if options.given and not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    max_tokens = body.integer("max_completion_tokens", 1, 1 << 20, None)
    max_tokens = body.integer("max_tokens", 1, 1 << 20, max_tokens)
    seed = body.integer("seed", -(1 << 63), (1 << 63) - 1, None)
    return ChatRequest(
        model=model,
        messages=_messages(body),
        choices=choices,
        candidates=candidates,
        seed=secrets.randbits(53) if seed is None else seed,  # exact in every JSON reader
        max_tokens=max_tokens,
        sampling=_sampling(body, max_tokens or MAX_NEW_TOKENS),
        stop=_stop(body),
        top_logprobs=_top_logprobs(body),
        stream=stream,
        include_usage=options.flag("include_usage"),
        brackets=brackets,
        deadline=_deadline(own),
    )


def judge_request(content: bytes, name: str, max_n: int) -> JudgeRequest:
    """Validates a request to judge responses; see `chat_request`."""
    body = body_of(content)
    body.only({"model", "context", "messages", "responses", "deadline_ms"})
    model = body.text("model")
    if model is not None:
        _model(body, name, max_n)
    context = body.text("context")
    if (context is None) == ("messages" not in body.given):
        raise body.error("context", "give either a context or messages")
    if context is not None and not context.strip():
        raise body.error("context", "expected non-empty text", "invalid_value")
    responses = body.get("responses", list, "a list of texts", [])
    if not 2 <= len(responses) <= max_n:
        raise body.error("responses", f"expected 2 to {max_n} responses, got {len(responses)}")
    for k, response in enumerate(responses):
        if not isinstance(response, str):
            raise body.error(f"responses[{k}]", f"expected text, got {_kind(response)}")
    messages = None if context is not None else _messages(body)
    return JudgeRequest(model, context, messages, responses, _deadline(body))


def _model(body: _Fields, name: str, max_n: int) -> tuple[str, int | None]:
    """Returns the model's name as given, and N of `NAME:best-of-N`."""
    model = body.text("model")
    if model is None:
        raise body.error("model", "is missing", "missing_required_parameter")
    found = None if model == name else _BEST_OF.fullmatch(model)
    if (found[1] if found else model) != name:
        raise no_model(model, name)
    if found and not 1 <= int(found[2]) <= max_n:
        raise body.error("model", f"best-of-N needs an N from 1 to {max_n}", "invalid_value")
    return model, int(found[2]) if found else None


def no_model(model: str, name: str) -> RequestError:
    return RequestError(
        f"the model {model!r:.200} does not exist: this server has {name!r}, and "
        f"{name + ':best-of-N'!r}",
        "model",
        status=404,
        code="model_not_found",
    )


def _messages(body: _Fields) -> list[Message]:
    messages = body.get("messages", list, "a list of messages", None)
    if not messages:
        raise body.error("messages", "expected at least one message", "invalid_value")
    found: list[Message] = []
    for i, given in enumerate(messages):
        message = _Fields(given, f"messages[{i}]")
        role = message.text("role")
        if role is None:
            raise message.error("role", "is missing", "missing_required_parameter")
        if role not in ("system", "developer", "user", "assistant"):
            raise message.error("role", "expected system, developer, user or assistant")
        content = message.given.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"messages[{i}].content[{k}]")
                              for k, part in enumerate(content))  # fmt: skip
        if not isinstance(content, str):
            raise message.error("content", f"expected text, got {_kind(content)}", "invalid_type")
        for key in message.given.keys() - {"role", "content", "name", "refusal", "audio"}:
            if message.given[key]:
                raise message.error(key, "this server reads only text", "unsupported_parameter")
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return found


def _part(given: Any, path: str) -> str:
    part = _Fields(given, path)
    if part.given.get("type") != "text":
        raise part.error("type", "this server reads only text", "unsupported_parameter")
    text = part.text("text")
    if text is None:
        raise part.error("text", "is missing", "missing_required_parameter")
    return text


def _sampling(body: _Fields, max_tokens: int) -> SamplingSettings:
    given = {
        name: body.number(name, default)
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0),
                              ("repetition_penalty", 1.0))
    }  # fmt: skip
    top_k = body.integer("top_k", -1, 1 << 31, 0) or 0
    try:
        return SamplingSettings(max_tokens, **given, top_k=max(0, top_k))
    except ConfigError as error:
        name = str(error).split()[0]
        raise RequestError(str(error), name, code="invalid_value") from None


def _stop(body: _Fields) -> tuple[str, ...]:
    given = body.given.get("stop")
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(t, str) and len(t) > 0 for t in texts):
        raise body.error("stop", "expected a non-empty text or a list of such texts")
    if len(texts) > _STOP_TEXTS or any(len(text) > 256 for text in texts):
        raise body.error("stop", f"expected at most {_STOP_TEXTS} texts of 256 characters")
    return tuple(texts)


def _top_logprobs(body: _Fields) -> int | None:
    asked = body.flag("logprobs")
    top = body.integer("top_logprobs", 0, _TOP_LOGPROBS, None)
    if top is not None and not asked:
        raise body.error("top_logprobs", "needs logprobs: true")
    return (top or 0) if asked else None


def _deadline(fields: _Fields) -> float | None:
    given = fields.integer("deadline_ms", 1, 1 << 31, None)
    return None if given is None else given / 1000


def _equal(value: Any, neutral: Any) -> bool:
    return type(value) is not bool and bool(value == neutral)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names: Sequence[tuple[type, str]] = (
        (bool, "true or false"), (str, "text"), (list, "a list"), (dict, "an object")
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "a number")

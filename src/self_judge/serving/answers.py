"""Writes answers as OpenAI's clients expect them: whole, or as the chunks of a stream.

This module builds plain data. It does not depend on models or on the web framework.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from self_judge.commands.tournament import bracket_json
from self_judge.datatypes import Verdict
from self_judge.judging.voting import verdict_json
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.serving.engine import Answer
from self_judge.serving.work import Game, Sample, TokenLogprob

_WORDS_PER_CHUNK = re.compile(r"(?:\s*\S+){1,4}|\s+")


class Completion:
    """An answer to a chat request in OpenAI's format.

    Args:
        model: the name that the request has.
    """

    def __init__(self, model: str, encoder: ChatEncoder, principles: Sequence[str]) -> None:
        self.encoder, self.principles = encoder, principles
        self.shared = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Returns the body of an answer that is not streamed."""
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": sample.text,
                    "refusal": None,
                    **_thought(sample),
                },
                "finish_reason": _finish_reason(sample),
                "logprobs": self._logprobs(sample),
            }
            for i, sample in enumerate(answer.choices)
        ]
        return {
            **self.shared,
            "object": "chat.completion",
            "choices": choices,
            "usage": _usage(answer),
            "self_judge": self._beside(answer),
        }

    def role_chunks(self, choices: int) -> Iterator[dict[str, Any]]:
        """Yields the first chunk of every choice, which is known before the answer."""
        for i in range(choices):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def chunks(self, answer: Answer, include_usage: bool) -> Iterator[dict[str, Any]]:
        """Yields the other chunks; their texts join to those of `whole`."""
        for i, sample in enumerate(answer.choices):
            if thought := _thought(sample):
                yield self._chunk(i, thought)
            logprobs = self._logprobs(sample)
            for text in _WORDS_PER_CHUNK.findall(sample.text):
                yield self._chunk(i, {"content": text}, None, logprobs)
                logprobs = None  # those of the whole choice come with its first text
            last = self._chunk(i, {}, _finish_reason(sample), logprobs)
            if i == 0:
                last["self_judge"] = self._beside(answer)
            yield last
        for i in range(len(answer.choices), answer.prepared.request.choices):
            yield self._chunk(i, {}, "length")  # its role was sent before the deadline passed
        if include_usage:
            chunk = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}
            yield {**self.shared, **chunk}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "logprobs": logprobs,
        }
        return {**self.shared, "object": "chat.completion.chunk", "choices": [choice]}

    def _beside(self, answer: Answer) -> dict[str, Any]:
        """Returns what OpenAI's format has no place for."""
        request, game = answer.prepared.request, answer.game
        beside: dict[str, Any] = {
            "seed": request.seed,
            "n": request.candidates or request.choices,
            "complete": len(answer.sampled),
            "sampled_tokens": answer.sampled_tokens,
            "deadline_passed": answer.deadline_passed,
        }
        if game is not None:
            beside["judged"] = judged_json(game)
        if request.brackets and answer.bracket is not None:
            beside["principles"] = list(self.principles)
            beside["responses"] = [sample.judged for sample in answer.sampled]
            beside["winner"] = answer.bracket.winner
            beside["bracket"] = bracket_json(answer.bracket)
        return beside

    def _logprobs(self, sample: Sample) -> dict[str, Any] | None:
        if sample.logprobs is None:
            return None
        ended = sample.logprobs[-1:] and sample.logprobs[-1].token_id in self.encoder.stop_token_ids
        shown = sample.logprobs[:-1] if ended else sample.logprobs
        return {"content": [self._token(entry) for entry in shown], "refusal": None}

    def _token(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._scored(token, logprob) for token, logprob in entry.top]
        return {**self._scored(entry.token_id, entry.logprob), "top_logprobs": top}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.encoder.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        whole = "\ufffd" not in text  # a token may be a part of a character
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(text.encode()) if whole else None,
        }


def judgment(
    model: str,
    judged: Sequence[tuple[int, int, Verdict]],
    game: Game,
    responses: int,
    principles: Sequence[str],
) -> dict[str, Any]:
    """Returns the body of an answer of `/v1/judge`.

    A response's score is its mean share of the scores in its pairs, ½ for an undecidable pair.
    """
    shares: list[list[float]] = [[] for _ in range(responses)]
    for a, b, verdict in judged:
        shares[a].append(verdict.share)
        shares[b].append(1 - verdict.share)
    scores = [sum(own) / len(own) for own in shares]
    return {
        "object": "judgment",
        "created": int(time.time()),
        "model": model,
        "ranking": sorted(range(responses), key=lambda k: (-scores[k], k)),
        "scores": scores,
        "verdicts": [{"a": a, "b": b, **verdict_json(v, principles)} for a, b, v in judged],
        "judged": judged_json(game),
    }


def judged_json(game: Game) -> dict[str, int]:
    """Returns what a game took."""
    return {
        "rounds": game.rounds,
        "comparisons": len(game.verdicts),
        "orders_agree": sum(verdict.orders_agree for verdict in game.verdicts),
        "undecidable": sum(verdict.preferred is None for verdict in game.verdicts),
    }


def model_cards(name: str, max_n: int, created: int) -> list[dict[str, Any]]:
    """Returns the models that `/v1/models` lists: plain, and the powers of two as best of N."""
    sizes = [2**k for k in range(1, max_n.bit_length()) if 2**k <= max_n]
    return [
        {"id": model, "object": "model", "created": created, "owned_by": "self_judge"}
        for model in (name, *(f"{name}:best-of-{n}" for n in sizes))
    ]


def _usage(answer: Answer) -> dict[str, Any]:
    prompt = len(answer.prepared.prompt)
    new = sum(len(sample.response.ids) for sample in answer.choices)
    thought = sum(sample.response.thought_length for sample in answer.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


def _finish_reason(sample: Sample) -> str:
    return "stop" if sample.ended else "length"


def _thought(sample: Sample) -> dict[str, str]:
    thought = sample.response.thought
    return {} if thought is None else {"reasoning_content": thought}

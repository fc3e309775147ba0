"""Reads the answers of `vllm serve`: its model, sampled tokens and log-probabilities.

This module does not depend on how the requests are sent.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from self_judge.errors import EngineError
from self_judge.storage.atomic import loads


def base_model(content: bytes, shown: str) -> tuple[str, str, int]:
    """Returns the name, the source and the maximum length of the model in `/v1/models`.

    Raises:
        EngineError: there is no such model.
    """
    try:
        base = next(card for card in loads(content)["data"] if not card.get("parent"))
        root = str(base.get("root") or base["id"])
        return str(base["id"]), root, operator.index(base["max_model_len"])
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise EngineError(
            f"{shown} lists no base model at /v1/models: is it a vLLM server?"
        ) from error


def sampled_ids(
    choice: Mapping[str, Any], url: str, longest: int, vocabulary: int | None = None
) -> list[int]:
    """Returns the token ids of a sampled choice.

    Raises:
        EngineError: the server is too old.
        ValueError: these are no token ids, or more than `longest`.
    """
    if choice.get("token_ids") is None:
        raise EngineError(f"{url} returns no token ids: it needs vLLM 0.28 or newer")
    ids = list(choice["token_ids"])
    most = vocabulary or 1 << 31
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < most]
    if wrong:
        raise ValueError(f"{wrong[0]!r:.60} is not a token id of the model")
    if len(ids) > longest:
        raise ValueError(f"a response has {len(ids)} of {longest} tokens")
    return ids


def letter_logprobs(choice: Mapping[str, Any], token_ids: Sequence[int], url: str) -> list[float]:
    """Returns the log-probabilities of the given tokens at the first position in a choice.

    Raises:
        EngineError: the server is too old.
        ValueError: these are no log-probabilities.
    """
    top = choice["logprobs"]["top_logprobs"][0]
    missing = next((t for t in token_ids if f"token_id:{t}" not in top), None)
    if missing is not None:
        raise EngineError(
            f"{url} does not return the log-probability of token {missing}: it needs vLLM 0.28 or "
            "newer (logprob_token_ids)"
        )
    found = [float(top[f"token_id:{token}"]) for token in token_ids]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"log-probabilities {found}")
    return found

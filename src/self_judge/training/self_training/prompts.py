"""Converts dataset rows to prompt ids and judge contexts for self-training, and batches them.

This module handles the row formats of the method and of TRL. It does not sample, judge or train.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset

from self_judge.data.hub import workers_end_with_parent
from self_judge.datatypes import Message
from self_judge.errors import require_type
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.messages import content_of, lost, lost_column

logger = logging.getLogger(__name__)

# A column that marks queries whose format differs from the chat template's. The column is removed
# after these queries are counted.
_FOREIGN = "foreign"
COLUMNS = ("record", "prompt_ids", "context", "chosen_ids", "rejected_ids")


class SelfJudgeCollator:
    """Batches prepared records unchanged. Responses are sampled and collated later."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        missing = {"record", "prompt_ids", "context"} - set(examples[0])
        if missing:
            raise ValueError(
                f"SelfJudgeCollator got records without {sorted(missing)}: it requires records "
                "that SelfJudgeTrainer prepared from query and context, or from prompt"
            )
        batch: dict[str, Any] = {
            name: [example.get(name) for example in examples] for name in COLUMNS[1:]
        }
        # Accelerate and the Trainer read the batch size from this tensor.
        batch["record"] = torch.tensor([example["record"] for example in examples])
        return batch


class PromptPreparer:
    """Prepares dataset rows for training. Instances can be pickled for `datasets.map(num_proc=…)`.

    Args:
        encoder: encodes the prompt to ids.
        max_length, max_new_tokens: a prompt may have at most `max_length - max_new_tokens` ids. The
            oldest exchanges are removed from a dialogue until it fits. A prompt that cannot
            fit gets no ids.
        dataset_name: the name of the dataset in error messages.
        with_responses: whether to also encode the `chosen` and `rejected` responses for evaluation.

    Raises:
        ValueError: a row has no usable `query` or `prompt`. The message names the record.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        max_length: int | None,
        max_new_tokens: int,
        dataset_name: str,
        with_responses: bool,
    ) -> None:
        self.encoder = encoder
        self.budget = None if max_length is None else max_length - max_new_tokens
        self.dataset_name = dataset_name
        self.with_responses = with_responses

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        prompt, query = row.get("prompt"), row.get("query")
        if what := lost_column(row):
            raise ValueError(
                f"record {index} of the {self.dataset_name} dataset has a column {what!r}: only "
                "text can be encoded"
            )
        if isinstance(prompt, str) and query is None:
            query, prompt = prompt, None
        if query is None and prompt is None:
            raise ValueError(
                f"record {index} of the {self.dataset_name} dataset has neither 'query' nor "
                f"'prompt'; it has {sorted(row)}"
            )
        if query is not None:
            if not isinstance(query, str) or not query.strip():
                raise ValueError(
                    f"record {index} of the {self.dataset_name} dataset: 'query' is empty or not "
                    "text"
                )
            ids, messages = self.encoder.encode_query(query), None
            foreign = self.encoder.messages_of(query) is None
            context = row.get("context") or query
        else:
            messages, foreign = _messages(prompt, index, self.dataset_name), False
            context = row.get("context") or dialogue_text(messages)
            ids = self.encoder.encode_prompt(messages)
            while self.budget is not None and len(ids) > self.budget:
                shorter = _without_oldest_exchange(messages)
                if shorter is None:
                    break
                messages = shorter
                ids = self.encoder.encode_prompt(messages)
        if not isinstance(context, str):
            raise ValueError(
                f"record {index} of the {self.dataset_name} dataset: 'context' must be text, got "
                f"{type(context).__name__}"
            )
        fits = self.budget is None or len(ids) <= self.budget
        prepared: dict[str, Any] = {
            "record": index,
            "prompt_ids": ids if fits else [],
            "context": context,
            "chosen_ids": None,
            "rejected_ids": None,
            _FOREIGN: foreign,
        }
        if self.with_responses:
            for side in ("chosen", "rejected"):
                where = f"record {index} of the {self.dataset_name} dataset: {side!r}"
                response = _response(row.get(side), where)
                prepared[f"{side}_ids"] = self._response_ids(response, query, messages)
        return prepared

    def _response_ids(
        self, response: str | None, query: str | None, messages: list[Message] | None
    ) -> list[int] | None:
        """Returns the ids of a response and its end of turn, as if the policy had sampled them."""
        if response is None:
            return None
        end = list(self.encoder.stop_token_ids[:1])
        eos = self.encoder.tokenizer.eos_token
        if query is not None:
            response = response.removeprefix(query).removesuffix(eos or "")
        if messages is not None:
            # The last trained span of the encoded dialogue is the answer as formatted by the chat
            # template, including its end-of-turn token.
            answered = [*messages, Message(role="assistant", content=response)]
            encoded = self.encoder.encode_dialogue(answered)
            last = encoded.trained.rfind(1)
            first = encoded.trained.rfind(0, 0, last) + 1
            return encoded.ids[first : last + 1]
        return [*self.encoder.encode_content(response), *end]


def has_prompt(row: Mapping[str, Any]) -> bool:
    """Returns whether a prepared prompt leaves room for a response."""
    return len(row["prompt_ids"]) > 0


def prepare_dataset(dataset: Any, encoder: ChatEncoder, args: Any, name: str) -> Any:
    """Adds each prompt's ids and judge context, unless the dataset is already prepared.

    Args:
        dataset: a `Dataset` or an `IterableDataset` of rows; see `SelfJudgeTrainer`.
        args: a `SelfJudgeConfig`.
        name: the name of the dataset in error messages. In the `train` dataset, responses are
            ignored.

    Raises:
        ValueError: a row cannot be used, or no prompt fits into `max_length`.
    """
    kinds = (Dataset, IterableDataset)
    require_type(f"the {name} dataset", dataset, kinds, "a datasets.Dataset or IterableDataset")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"the {name} dataset has no rows")
    if {"record", "prompt_ids", "context"} <= set(first):
        return dataset
    prepare = PromptPreparer(
        encoder, args.max_length, args.max_new_tokens, name, with_responses=name != "train"
    )
    mapped: dict[str, Any] = {"with_indices": True, "remove_columns": dataset.column_names}
    with PartialState().main_process_first():
        if isinstance(dataset, IterableDataset):
            return dataset.map(prepare, **mapped).filter(has_prompt).remove_columns(_FOREIGN)
        workers_end_with_parent()
        workers = {"num_proc": args.dataset_num_proc}
        prepared = dataset.map(prepare, desc=f"Encoding {name} prompts", **mapped, **workers)
        kept = prepared.filter(has_prompt, **workers).remove_columns(_FOREIGN)
    foreign = sum(prepared[_FOREIGN])
    first_process = PartialState().is_main_process
    if foreign and first_process:
        logger.warning(
            "%s dataset: %d of %d queries do not have the format of the chat template. They are "
            "passed to the model unchanged, so their format differs from that of 'prompt' rows and "
            "of JSFT examples",
            name, foreign, len(prepared),
        )  # fmt: skip
    if not len(kept):
        raise ValueError(
            f"no prompt in the {name} dataset fits: max_length {args.max_length} minus "
            f"max_new_tokens {args.max_new_tokens} leaves too few tokens"
        )
    if len(kept) < len(prepared) and first_process:
        logger.warning(
            "%s dataset: %d of %d prompts do not fit into max_length - max_new_tokens and are "
            "skipped",
            name, len(prepared) - len(kept), len(prepared),
        )  # fmt: skip
    return kept


def _messages(prompt: Any, index: int, dataset_name: str) -> list[Message]:
    where = f"record {index} of the {dataset_name} dataset: 'prompt'"
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where} must be text or a non-empty list of messages")
    for message in prompt:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"{where} has a message without a role and content: {message!r:.80}")
    if prompt[-1]["role"] != "user":
        raise ValueError(
            f"{where} ends with a message from {prompt[-1]['role']!r}; the last message must be "
            "from 'user'"
        )
    return [Message(role=m["role"], content=_text_of(m, where)) for m in prompt]


def _response(given: Any, where: str) -> str | None:
    """Returns the text of a response that is given as text or as messages."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, list) or not given or not isinstance(given[-1], Mapping):
        raise ValueError(f"{where} must be text or a non-empty list of messages")
    return _text_of(given[-1], where)


def _text_of(message: Mapping[str, Any], where: str) -> str:
    if what := lost(message):
        raise ValueError(f"{where} has a message with {what}: only text can be encoded")
    text = content_of(message)
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where} has a message whose content is {kind}: only text can be encoded")
    return text


def _without_oldest_exchange(messages: list[Message]) -> list[Message] | None:
    """Removes the first user turn and its answers from a dialogue, but keeps the system message."""
    # system u1 a1 u2   ->   system u2   ->   None, because the last question is always kept
    head = messages[:1] if messages[0]["role"] == "system" else []
    rest = messages[len(head) :]
    nexts = [i for i, m in enumerate(rest) if m["role"] == "user" and i > 0]
    return [*head, *rest[nexts[0] :]] if nexts else None

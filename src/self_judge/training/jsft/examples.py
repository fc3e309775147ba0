"""Converts preference records to JSFT training examples, and examples to batches.

This module decides which tokens the loss covers. It does not depend on the data sources or the
trainer.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from self_judge.data.hub import workers_end_with_parent
from self_judge.data.records import judge_context
from self_judge.datatypes import Comparison, LabeledPair, Message, PreferenceRecord
from self_judge.errors import require_type, suggesting
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_prompt import AsArrays, encode_orders
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.thoughts import NO_ANSWER, answers_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

# Reasons why an example is truncated or skipped. The command prints and saves the number of
# examples for each reason.
CUT = "cut at max_length"
NO_ROOM = "no trained token within max_length"
NO_FIT = "judge prompt does not fit into max_length"

_RECORDS_AT_ONCE = 20_000  # the number of records that are held as JSON at a time
_RECORD = tuple(f.name for f in fields(PreferenceRecord))
_PAIR = tuple(f.name for f in fields(LabeledPair))


@dataclass(frozen=True, slots=True)
class JSFTExample:
    """One training example.

    Attributes:
        kind: `"sft"` or `"judge"`.
        input_ids: token ids, length T.
        labels: the ids of the trained tokens, and `ignore_index` for all other tokens; length T.
        note: the reason why the example is truncated or skipped, or `None` if it is neither. A
            skipped example has no ids.
        swapped: whether this is the previous example with the responses swapped.
        principle: the principle of a judge example's template; empty for SFT.
    """

    # One record with a labeled pair gives these examples (- is `ignore_index`):
    #
    #   sft              input_ids  user turn  answer  <end>        labels  -  answer  <end>
    #   judge            input_ids  prompt (chosen first)    A      labels  -  A
    #   judge, swapped   input_ids  prompt (rejected first)  B      labels  -  B
    #
    # Rationales, if any, follow the letter and are trained as well. With several principles, there
    # are two judge examples for each principle.

    kind: str
    input_ids: array[int]
    labels: array[int]
    note: str | None = None
    swapped: bool = False
    principle: str = ""


@dataclass(frozen=True)
class ExampleEncoder:
    """Converts records to examples. Instances can be pickled for `datasets.map(num_proc=…)`.

    Args:
        encoder: encodes dialogues and judge prompts to ids.
        templates, letter_ids: the judge templates and the ids of the judge's letters.
        max_length: the maximum number of tokens in an example; `None` means no limit.
        ignore_index: the label of tokens that the loss ignores.
    """

    encoder: ChatEncoder
    templates: JudgeTemplates
    letter_ids: tuple[int, int]
    max_length: int | None = None
    ignore_index: int = -100

    def examples(self, record: PreferenceRecord) -> list[JSFTExample]:
        """Returns a record's examples for D_SFT and, in both orders, D_Judge (see the paper).

        The loss of the SFT example covers every assistant turn of the dialogue and its end-of-turn
        token. The loss of a judge example covers the letter, and the rationales if the templates
        have `decision_rationale` and the pair has rationales, but no end-of-turn token.
        A pair labeled for one principle uses that principle's template. Other pairs use all
        templates.

        Raises:
            ValueError: a pair is labeled for a principle that has no template.
        """
        examples = []
        if record.demonstration is not None:
            answer = Message(role="assistant", content=record.demonstration)
            chat = self.encoder.encode_dialogue([*record.prompt, answer])
            labels = self._ignored(len(chat.array))
            for trained in map(re.Match.span, re.finditer(b"\1+", chat.trained)):
                labels[slice(*trained)] = chat.array[slice(*trained)]
            examples.append(self._example("sft", chat.array, labels))
        for pair in record.pairs:
            if pair.principle is not None and pair.principle not in self.templates:
                raise ValueError(
                    f"{record.source}, record {record.index}: a pair is labeled for principle "
                    f"{pair.principle!r}, but there are judge templates only for "
                    f"{', '.join(self.templates.principles)}"
                )
            comparison = Comparison(judge_context(record), pair.chosen, pair.rejected)
            labeled = self.templates.principles if pair.principle is None else (pair.principle,)
            for principle in labeled:
                examples += self._judge_examples(pair, comparison, principle)
        return examples

    def _judge_examples(
        self, pair: LabeledPair, comparison: Comparison, principle: str
    ) -> list[JSFTExample]:
        room = None if self.max_length is None else self.max_length - 1  # for the letter
        shown = answers_of(comparison)  # without thoughts, as at inference
        prompts = AsArrays(self.encoder)
        orders: Any = shown and encode_orders(prompts, self.templates, principle, shown, room)
        if not orders:
            note = NO_ANSWER if shown is None else NO_FIT
            nothing = array("i")
            return [JSFTExample("judge", nothing, nothing, note, principle=principle)] * 2
        rationales: list[list[int]] = [[], []]
        if self.templates.has_rationales and pair.rationale_chosen and pair.rationale_rejected:
            given = (pair.rationale_chosen, pair.rationale_rejected)
            rationales = [
                self.encoder.encode_content(self.templates.render_rationale(principle, *shown))
                for shown in (given, given[::-1])
            ]
        examples = []
        # If the chosen response comes first, the letter is A. Otherwise, it is B.
        for prompt, letter, rationale in zip(orders, self.letter_ids, rationales, strict=True):
            trained = array("i", [letter, *rationale])
            labels = self._ignored(len(prompt)) + trained
            swapped = letter == self.letter_ids[1]
            examples.append(self._example("judge", prompt + trained, labels, swapped, principle))
        return examples

    def _example(
        self,
        kind: str,
        ids: array[int],
        labels: array[int],
        swapped: bool = False,
        principle: str = "",
    ) -> JSFTExample:
        note = None
        if self.max_length is not None and len(ids) > self.max_length:
            ids, labels, note = ids[: self.max_length], labels[: self.max_length], CUT
        # The first token of a sequence is never predicted.
        if labels[1:] == self._ignored(len(labels) - 1):
            return JSFTExample(kind, array("i"), array("i"), NO_ROOM, principle=principle)
        return JSFTExample(kind, ids, labels, note, swapped, principle)

    def _ignored(self, length: int) -> array[int]:
        return array("i", [self.ignore_index]) * length

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> pa.Table:
        """Returns the columns of `jsft_dataset` for a batch of JSON records."""
        import pyarrow as pa

        examples = [e for text in batch["record"] for e in self.examples(record_from_json(text))]
        columns = {f.name: [getattr(e, f.name) for e in examples] for f in fields(JSFTExample)}
        columns["note"] = [note or "" for note in columns["note"]]
        columns["length"] = list(map(len, columns["input_ids"]))
        columns |= {name: _arrow_lists(columns[name]) for name in ("input_ids", "labels")}
        # Arrow converts lists of a given type several times as fast as `datasets` does.
        return pa.table(columns, schema=_features().arrow_schema)


def _arrow_lists(arrays: Sequence[array[int]]) -> pa.ListArray:
    import pyarrow as pa

    ends = array("i", accumulate(map(len, arrays), initial=0))
    values = pa.Array.from_buffers(pa.int32(), ends[-1], [None, pa.py_buffer(b"".join(arrays))])
    return pa.ListArray.from_arrays(pa.array(ends), values)


def _features() -> Features:
    from datasets import Features, List, Value

    # Declare the column types, because they cannot be inferred if no example in a batch fits.
    ids = List(Value("int32"))
    return Features(
        input_ids=ids,
        labels=ids,
        length=Value("int32"),
        kind=Value("string"),
        principle=Value("string"),
        swapped=Value("bool"),
        note=Value("string"),
    )


@suggesting(tokenizer="encoder", processing_class="encoder", judge_templates="templates")
def jsft_dataset(
    records: Iterable[PreferenceRecord],
    encoder: ChatEncoder | PreTrainedTokenizerBase,
    templates: JudgeTemplates | Mapping[str, Any],
    letter_ids: tuple[int, int] | None = None,
    *,
    max_length: int | None = None,
    ignore_index: int = -100,
    num_proc: int | None = None,
) -> tuple[Dataset, dict[str, int]]:
    """Builds the JSFT training set, in which SFT and judge examples have equal weight.

    Args:
        records: the preference records, such as those from `load_preferences`.
        encoder: a `ChatEncoder`, or a tokenizer whose own chat template is used.
        templates: the judge templates, or a mapping `{principle: {system, user, assistant}}`.
        letter_ids: the ids of the judge's letters (default: `encoder.letter_ids(templates)`).
        num_proc: the number of encoding processes; it does not change the result.

    Returns:
        A dataset with `input_ids`, `labels`, `length`, `kind`, `principle` and `swapped`, and the
        number of examples by kind and by the reason for truncating or skipping them.

    Raises:
        ValueError: no example remains, or a pair is labeled for an unknown principle.
    """
    from datasets import Dataset, concatenate_datasets

    workers_end_with_parent()
    records = list(records)
    if not records:
        raise ValueError("there are no records to create training examples from")
    for i, record in enumerate(records):
        require_type(f"records[{i}]", record, PreferenceRecord, "a record of load_preferences")
    encoder, templates = ChatEncoder.of(encoder), JudgeTemplates.of(templates)
    letters = letter_ids or encoder.letter_ids(templates)
    encode = ExampleEncoder(encoder, templates, letters, max_length, ignore_index)
    parts = []
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        texts = [record_to_json(r) for r in records[start : start + _RECORDS_AT_ONCE]]
        parts.append(
            Dataset.from_dict({"record": texts}).map(
                encode,
                batched=True,
                remove_columns=["record"],
                features=_features(),
                num_proc=num_proc,
                desc="Encoding examples",
            )
        )
    encoded = concatenate_datasets(parts)
    counts: dict[str, int] = {}
    for kind, note in zip(encoded["kind"][:], encoded["note"][:], strict=True):
        if note not in (NO_ROOM, NO_FIT, NO_ANSWER):
            counts[f"{kind} examples"] = counts.get(f"{kind} examples", 0) + 1
        if note:
            key = f"{kind} examples: {note}"
            counts[key] = counts.get(key, 0) + 1
    kept = [i for i, length in enumerate(encoded["length"][:]) if length]
    if not kept:
        raise ValueError(f"no training example remains from {len(records)} records: {counts}")
    return encoded.select(kept).remove_columns(["note"]), counts


def record_to_json(record: PreferenceRecord) -> str:
    """Converts a record to one line of JSON; `record_from_json` is the inverse."""
    plain = {name: getattr(record, name) for name in _RECORD}
    plain["pairs"] = [{name: getattr(pair, name) for name in _PAIR} for pair in record.pairs]
    return json.dumps(plain)  # ASCII only, because Arrow rejects lone surrogates


def record_from_json(text: str) -> PreferenceRecord:
    """Restores a record from the JSON that `record_to_json` wrote."""
    saved = json.loads(text)
    return PreferenceRecord(
        prompt=tuple(Message(role=m["role"], content=m["content"]) for m in saved["prompt"]),
        demonstration=saved["demonstration"],
        pairs=tuple(LabeledPair(**pair) for pair in saved["pairs"]),
        source=saved["source"],
        index=saved["index"],
        context=saved["context"],
    )


class JudgeAugmentedSFTCollator:
    """Pads JSFT examples on the right: `input_ids`, `attention_mask` and `labels` are `(B, T)`.

    Args:
        tokenizer: provides the padding token.
        ignore_index: the label of padding tokens.
        pad_to_multiple_of: T is rounded up to a multiple of this number.

    Raises:
        ValueError: `ignore_index` could be a token id.
    """

    @suggesting(
        processing_class="tokenizer",
        pad_token_id="tokenizer",
        max_length="max_length to jsft_dataset (the collator does not truncate)",
    )
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | ChatEncoder,
        ignore_index: int = -100,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        require_type("ignore_index", ignore_index, int, "a number below 0")
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index must be below 0, got {ignore_index}: the collator does not truncate "
                "(pass max_length to jsft_dataset)"
            )
        if isinstance(tokenizer, ChatEncoder):
            tokenizer = tokenizer.tokenizer
        pad = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if pad is None else pad
        self.ignore_index = ignore_index
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        missing = {"input_ids", "labels"} - set(examples[0])
        if missing:
            raise ValueError(
                f"JudgeAugmentedSFTCollator got examples without {sorted(missing)}: it requires "
                "examples of jsft_dataset"
            )
        lengths = [len(e["input_ids"]) for e in examples]
        step = self.pad_to_multiple_of
        shape = (len(examples), -(-max(lengths) // step) * step)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, self.ignore_index),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"])
            batch["labels"][row, :length] = torch.as_tensor(example["labels"])
            batch["attention_mask"][row, :length] = 1
        return batch

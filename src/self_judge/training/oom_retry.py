"""An update that does not fit into memory is done in parts, with the same gradient.

A mixin for the trainer, around its training step; it does not know the loss, which is a mean over
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from self_judge.runtime import halve_or_raise

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


# A micro-batch's number within its optimizer step, among its columns.
MICRO_BATCH = "micro_batch"


class OOMRetryMixin(Base):
    """A mixin before TRL's `DPOTrainer`: memory that is full halves the pairs of a forward pass.

    One process alone does so: with several, all would have to at the same place.
    """

    _metrics: Any  # TRL's own
    _total_train_tokens: Any
    _step_batches: Sequence[Any] = ()
    _pairs_at_once: int | None = None
    _share = 1.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As Transformers'; a step in which memory was full is done again from its first batch."""
        model.train()  # as the inherited step does, which comes too late for the next line
        place = inputs.get(MICRO_BATCH, 0)
        prepared = self._prepare_inputs(inputs)
        if place == 0:  # what was sampled and judged is counted by now, once
            self._counted = {key: len(v) for key, v in self._metrics["train"].items()}
            self._tokens = self._total_train_tokens
        try:
            return self._in_parts(model, prepared, num_items_in_batch)
        except RuntimeError as error:
            self._take_less(prepared, error)
        while True:
            model.zero_grad()
            for key, values in self._metrics["train"].items():
                del values[self._counted.get(key, 0) :]
            self._total_train_tokens = self._tokens
            try:
                for batch in self._step_batches[:place]:
                    self._in_parts(model, self._prepare_inputs(batch), num_items_in_batch)
                return self._in_parts(model, prepared, num_items_in_batch)
            except RuntimeError as error:
                self._take_less(prepared, error)

    def _take_less(self, prepared: dict[str, Any], error: RuntimeError) -> None:
        if self.accelerator.num_processes > 1:
            raise error
        pairs = self._pairs_at_once or _pairs(prepared)
        self._pairs_at_once = halve_or_raise("updating on", pairs, "pairs", error)

    def _in_parts(
        self, model: Any, prepared: dict[str, Any], num_items_in_batch: Any
    ) -> torch.Tensor:
        pairs = _pairs(prepared)
        most = self._pairs_at_once or pairs
        if pairs <= most:
            return super().training_step(model, prepared, num_items_in_batch)
        losses = []
        for start in range(0, pairs, most):
            stop = min(start + most, pairs)
            part = _rows(prepared, start, stop)
            self._share = (stop - start) / pairs
            try:
                losses.append(super().training_step(model, part, num_items_in_batch))
            finally:
                self._share = 1.0
        return torch.stack(losses).sum()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a part counts as much as its share of the pairs."""
        found: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return found if self._share == 1.0 else found * self._share


def _pairs(batch: dict[str, Any]) -> int:
    return batch["input_ids"].size(0) // 2


def _rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some pairs of a preference batch: chosen rows come first, then the rejected ones."""
    pairs = _pairs(batch)
    return {
        name: torch.cat([value[start:stop], value[pairs + start : pairs + stop]])
        if value.size(0) == 2 * pairs
        else value[start:stop]
        for name, value in batch.items()
    }

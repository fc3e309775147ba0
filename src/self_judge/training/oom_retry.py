"""Repeats an update that runs out of memory, in smaller parts that give the same gradient.

This module contains a mixin for the trainer's step. The loss must be a mean over pairs.
"""

# For example, a step has micro-batches 0, 1 and 2 with 4 pairs each, and micro-batch 1 runs out of
# memory. Part of its gradient may already have been accumulated, so the whole step starts again
# with half as many pairs at a time:
#
#   micro-batch 0: 4 pairs   ok
#   micro-batch 1: 4 pairs   out of memory -> zero the gradients, discard this step's metrics
#   micro-batch 0: 2 + 2     ok
#   micro-batch 1: 2 + 2     ok            (out of memory again: 1 + 1 + 1 + 1, and so on)
#   micro-batch 2: 2 + 2     and 2 pairs at a time from here on
#
# The loss is a mean, so each part is weighted by its share of the pairs: mean(4) = 2/4 mean(2) +
# 2/4 mean(2). With 3 pairs at a time, the parts 3 + 1 have weights 3/4 and 1/4. Nothing is sampled
# again.

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


# The batch key for the index of a micro-batch within its optimizer step.
MICRO_BATCH = "micro_batch"


class OOMRetryMixin(Base):
    """A mixin for TRL's `DPOTrainer` that halves the number of pairs in a pass if memory runs out.

    The mixin works only in a single process, because several processes would have to retry at the
    same point.
    """

    _metrics: Any  # defined by TRL
    _total_train_tokens: Any
    _step_batches: Sequence[Any] = ()
    _pairs_at_once: int | None = None
    _share = 1.0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Runs the inherited method, but repeats the step from its start if memory runs out."""
        model.train()  # the inherited step also does this, but `_prepare_inputs` needs it earlier
        place = inputs.get(MICRO_BATCH, 0)
        prepared = self._prepare_inputs(inputs)
        if place == 0:  # metrics for sampling and judging are already recorded and must be kept
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
        """Computes the loss. A part of a micro-batch is weighted by its share of the pairs."""
        found: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return found if self._share == 1.0 else found * self._share


def _pairs(batch: dict[str, Any]) -> int:
    return batch["input_ids"].size(0) // 2


def _rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Selects pairs from a preference batch, in which all chosen rows precede the rejected rows."""
    # In the batch c0 c1 c2 c3 r0 r1 r2 r3, pairs 2 and 3 are the rows c2 c3 r2 r3. A column with
    # one value per pair, such as the reference's log-probabilities, is sliced directly.
    pairs = _pairs(batch)
    return {
        name: torch.cat([value[start:stop], value[pairs + start : pairs + stop]])
        if value.size(0) == 2 * pairs
        else value[start:stop]
        for name, value in batch.items()
    }

"""Averages log-probabilities if the inherited loss sums them, and sums them if it averages them.

See `SelfJudgeConfig.average_log_prob`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from trl.trainer import dpo_trainer

from self_judge.packing.fused_head import FUSED_HEAD


class LogProbAveraging:
    """Switches between sums and means of a response's per-token log-probabilities.

    TRL's sigmoid and hinge losses sum over tokens, and its ipo loss averages over them. A hook
    switches to the other convention without changing TRL's code. It divides (sigmoid, hinge) or
    multiplies (ipo) the models' log-probabilities by the number of tokens in the response.
    """

    # If the tokens of a response have the log-probabilities -1, -3 and -2, sigmoid sums them to -6.
    # Divided by the number of tokens, they are -1/3, -1 and -2/3, and sigmoid's sum is the mean -2.
    # For ipo, the hook multiplies them by 3: they become -3, -9 and -6, and their mean is -6.

    def __init__(self, average: bool) -> None:
        self.average = average
        self.sums: list[torch.Tensor] = []  # policy, then reference: the unscaled log π(y|x)

    @classmethod
    def attach(cls, trainer: Any) -> LogProbAveraging | None:
        """Adds the hook to a trainer's models, unless the loss already has the requested form."""
        average, (loss_type, *_) = trainer.args.average_log_prob, trainer.loss_types
        if average is None or average == (loss_type == "ipo"):
            return None
        units = cls(average)
        if not FUSED_HEAD:
            return units
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                inner = model.get_base_model() if isinstance(model, PeftModel) else model
                inner.register_forward_hook(units, with_kwargs=True)
        return units

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return output
        output.log_probs = self._scaled(output.log_probs, kwargs["labels"][:, 1:] != -100)
        return output

    def _scaled(self, log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = mask.sum(1, keepdim=True).clamp(min=1)
        self.sums.append(log_probs.detach().sum(1))
        return log_probs / tokens if self.average else log_probs * tokens

    @contextmanager
    def in_loss(self) -> Iterator[None]:
        """Scales the results of the functions with which TRL 1.14 computes a loss."""
        if FUSED_HEAD:
            yield
            return
        with ExitStack() as stack:
            for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
                own = partial(self._from_logits, getattr(dpo_trainer, name))
                stack.enter_context(patch.object(dpo_trainer, name, own))
            yield

    def _from_logits(self, compute: Any, *args: Any, row_mask: torch.Tensor, **kwargs: Any) -> Any:
        found = compute(*args, row_mask=row_mask, **kwargs)
        if isinstance(found, tuple):
            return self._scaled(found[0], row_mask), *found[1:]
        return self._scaled(found, row_mask)

    def correct_metrics(self, trainer: Any) -> None:
        """For an ipo loss that uses sums, recomputes the logged rewards from the same sums."""
        sums, self.sums = self.sums, []
        if self.average or len(sums) != 2:
            return
        mode = "train" if trainer.model.training else "eval"
        (chosen, rejected), (ref_chosen, ref_rejected) = (s.chunk(2) for s in sums)
        rewards = [trainer.beta * (chosen - ref_chosen), trainer.beta * (rejected - ref_rejected)]
        for key, value in {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }.items():
            trainer._metrics[mode][key][-1] = trainer.accelerator.gather(value).mean().item()

"""LogProbAveraging: log-probabilities averaged where the inherited loss sums, or summed.

`SelfJudgeConfig.average_log_prob` asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from peft import PeftModel

from self_judge.packing.fused_head import BEFORE_FUSED_HEAD


class LogProbAveraging:
    """Sums or averages per-token log-probabilities otherwise than the inherited loss does.

    TRL's sigmoid and hinge sum over a response's tokens, its ipo averages. The other convention is
    had without touching the loss: the log-probabilities that the models return are divided
    (sigmoid, hinge) or multiplied (ipo) by the number of the response's tokens.
    """

    def __init__(self, average: bool) -> None:
        self.average = average
        self.sums: list[torch.Tensor] = []  # policy, then reference: log π(y|x) as it is

    @classmethod
    def attach(cls, trainer: Any) -> LogProbAveraging | None:
        """Hooked to the models of a `SelfJudgeTrainer`; `None` where the loss has it as asked.

        Raises:
            ValueError: a TRL without the fused head that returns per-token log-probabilities.
        """
        average, (loss_type, *_) = trainer.args.average_log_prob, trainer.loss_types
        if average is None or average == (loss_type == "ipo"):
            return None
        if BEFORE_FUSED_HEAD:
            raise ValueError(
                f"average_log_prob={average} with {loss_type} needs TRL 1.16 (Python 3.11), "
                f"this is {trl.__version__}: leave it unset for TRL's own convention"
            )
        units = cls(average)
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                inner = model.get_base_model() if isinstance(model, PeftModel) else model
                inner.register_forward_hook(units, with_kwargs=True)
        return units

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return output
        tokens = (kwargs["labels"][:, 1:] != -100).sum(1, keepdim=True).clamp(min=1)
        self.sums.append(output.log_probs.detach().sum(1))
        output.log_probs = output.log_probs / tokens if self.average else output.log_probs * tokens
        return output

    def correct_metrics(self, trainer: Any) -> None:
        """Logs rewards of summed log-probabilities for the summed ipo, as for other losses."""
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

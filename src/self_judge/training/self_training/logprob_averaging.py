"""Averages log-probabilities if the inherited loss sums them, and sums them if it averages them.

See `SelfJudgeConfig.average_log_prob`.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from peft import PeftModel

from self_judge.packing.fused_head import BEFORE_FUSED_HEAD


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
        """Adds the hook to a trainer's models, unless the loss already has the requested form.

        Raises:
            ValueError: this version of TRL lacks the fused head, which returns per-token
                log-probabilities.
        """
        average, (loss_type, *_) = trainer.args.average_log_prob, trainer.loss_types
        if average is None or average == (loss_type == "ipo"):
            return None
        if BEFORE_FUSED_HEAD:
            raise ValueError(
                f"average_log_prob={average} with {loss_type} requires TRL 1.16 (Python 3.11), got "
                f"{trl.__version__}: leave average_log_prob unset to use TRL's own convention"
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

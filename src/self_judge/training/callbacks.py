"""RunLog: a training run writes down what it is and every number it logs, for `self-judge report`.

It hears what the trainer tells its callbacks, which is what trackers hear as well. It changes
nothing about training.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from self_judge import __version__
from self_judge.storage.atomic import atomic_write
from self_judge.storage.run_dir import METRICS, RUN, append_line, rewind

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


class RunLog(TrainerCallback):
    """Writes `run.json` when training begins, and a line of `metrics.jsonl` at every log.

    A run that resumes from a checkpoint goes on behind that checkpoint's step: what was logged
    after it is taken back, since those steps are done again.

    Args:
        kind: of the run: `jsft` or `self_judge`.
        about: more to write into `run.json`, such as the judge templates.

    Attributes:
        run_file: the run's configuration, where there is a run file.
    """

    def __init__(self, kind: str, about: Mapping[str, Any] | None = None) -> None:
        self.kind = kind
        self.about = dict(about or {})
        self.run_file: Mapping[str, Any] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        rewind(folder, state.global_step)
        with atomic_write(folder / RUN) as file:
            # What has no JSON form (a dtype, an enum) is written as it prints.
            json.dump(self._described(args, state, model), file, indent=2, default=str)
            file.write("\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        numbers = {
            key: value
            for key, value in logs.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        line = {"step": state.global_step, "time": round(time.time(), 3), **numbers}
        append_line(Path(args.output_dir) / METRICS, line)

    def _described(self, args: Any, state: Any, model: Any) -> dict[str, Any]:
        parameters = list(model.parameters()) if model is not None else []
        return {
            "kind": self.kind,
            "self_judge": __version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed_at_step": state.global_step or None,
            "max_steps": state.max_steps,
            "model": str(getattr(getattr(model, "config", None), "name_or_path", "")) or None,
            "parameters": {
                # Sharded parameters are empty here; DeepSpeed keeps their number beside them.
                "all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
                "trained": sum(
                    getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad
                ),
            },
            "processes": args.world_size,
            "device": str(args.device),
            **self.about,
            "run_file": self.run_file,
            "changed_arguments": _changed(args),
            "arguments": args.to_dict(),  # tokens are masked there
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _PACKAGES},
            },
            "platform": platform.platform(),
        }


def _changed(args: Any) -> dict[str, Any]:
    """The arguments that are not at their class's default."""
    values = args.to_dict()
    changed = {}
    for field in dataclasses.fields(args):
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if getattr(args, field.name) != default and field.name in values:
            changed[field.name] = values[field.name]
    return changed


def kl_estimate(
    chosen_rewards: Sequence[float],
    rejected_rewards: Sequence[float],
    undecidable: Sequence[float],
    beta: float,
) -> float | None:
    """KL(policy ‖ reference) in nats per response, estimated from what the loss computed anyway.

    The policy sampled both responses of a pair itself, so the mean of log π(y|x) − log π_ref(y|x)
    over them estimates the divergence without further passes (the estimator k1 of Schulman,
    "Approximating KL Divergence"). Unbiased for K = 2 at temperature 1 and top_p 1; with K > 2 only
    the best and the worst response are counted. Undecidable pairs have empty rows, hence reward 0,
    and are taken out by the share of decided ones.

    Args:
        chosen_rewards, rejected_rewards: β (log π − log π_ref), means over batches of equal size.
        undecidable: share of undecidable pairs per optimizer step.
        beta: β.

    Returns:
        `None` where there is no decided pair to estimate from.
    """
    if not (chosen_rewards and rejected_rewards and undecidable):
        return None
    decided = 1.0 - sum(undecidable) / len(undecidable)
    if decided <= 0:
        return None
    rewards = sum(chosen_rewards) / len(chosen_rewards) + sum(rejected_rewards) / len(
        rejected_rewards
    )
    return rewards / (2 * beta * decided)

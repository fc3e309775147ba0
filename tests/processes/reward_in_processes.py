"""What test_reward_in_processes.py launches: rewards of groups that are spread over processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from self_judge import Judge, PairwiseReward
from self_judge.data import synthetic
from self_judge.judging.reward import Scheme
from value_judges import value_judge

# Groups of 2, 5 and 3 completions, of which two processes get the first 4 and the last 6.
PROMPTS = ["x"] * 2 + ["y"] * 5 + ["z"] * 3
COMPLETIONS = ["3", "8", "5", "1", "9", "5", "2", "7", "7", "4"]


def given(schemes: tuple[Scheme, ...]) -> dict[str, Any]:
    state, judge = PartialState(), value_judge()
    first = state.process_index == 0
    own = slice(None) if state.num_processes == 1 else slice(0, 4) if first else slice(4, None)
    rewards = {s: PairwiseReward(judge, s)(PROMPTS[own], COMPLETIONS[own]) for s in schemes}
    return {
        "rewards": {scheme: gather_object(values) for scheme, values in rewards.items()},
        "judged": gather_object([judge.scorer.prompts]),
    }


def trained(out: Path, per_device: int, rloo: bool) -> dict[str, Any]:
    """One step and one evaluation, and every group as the reward function saw it."""
    tokenizer = synthetic.tiny_tokenizer()
    model = synthetic.tiny_model(tokenizer, 0, hidden_size=16, layers=1, heads=2)
    templates = synthetic.judge_templates(principles=False, overall=True)
    reward = PairwiseReward(Judge(synthetic.tiny_model(tokenizer, 1), tokenizer, templates))
    seen: list[Any] = []

    def watched(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        values = reward(prompts, completions, **columns)
        seen.append(gather_object(list(zip(prompts, values, strict=True))))
        return values

    rows = [
        {"prompt": [{"role": "user", "content": text}]} for text in synthetic.instructions(5, 0)
    ]
    config, trainer_class = (RLOOConfig, RLOOTrainer) if rloo else (GRPOConfig, GRPOTrainer)
    args = config(
        str(out), max_steps=1, per_device_train_batch_size=per_device, num_generations=2,
        per_device_eval_batch_size=per_device, max_completion_length=6, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, beta=0.0,
    )  # fmt: skip
    trainer: Any = trainer_class(
        model=model, reward_funcs=watched, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    return {"seen": seen, "log": trainer.state.log_history}


if __name__ == "__main__":
    asked, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    done = trained(folder, **asked) if "rloo" in asked else given(asked["schemes"])
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(done, default=str))

"""GRPO with the pairwise judgments of a frozen judge as the reward, in the demo's synthetic world.

    self-judge demo --output outputs/demo
    python examples/grpo_with_self_judge.py outputs/demo/jsft outputs/grpo

The same lines work for any model folder that JSFT saved and any dataset with prompts.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from self_judge import Judge, PairwiseReward, load_model, load_tokenizer
from self_judge.data import synthetic


def main(model: str, output: str, steps: int = 30, scheme: str = "all_pairs") -> GRPOTrainer:
    """Trains the model that JSFT taught, and saves it."""
    # The judge is a copy of the initial model: it stays as it is while the policy learns.
    judge = Judge.from_pretrained(model, batch_size=128)
    prompts = [
        {"prompt": list(record.prompt)} for record in synthetic.records(16 * steps, 1, writers=2)
    ]
    args = GRPOConfig(
        output,
        max_steps=steps,
        per_device_train_batch_size=128,  # 16 prompts with 8 responses each
        num_generations=8,
        max_completion_length=36,
        learning_rate=2e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,
        beta=0.04,  # the weight of the KL divergence from the initial model
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
    )
    trainer = GRPOTrainer(
        model=load_model(model),
        reward_funcs=PairwiseReward(judge, scheme),  # type: ignore[arg-type]
        args=args,
        processing_class=load_tokenizer(model),
        train_dataset=Dataset.from_list(prompts),
    )
    trainer.train()
    trainer.save_model(output)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])

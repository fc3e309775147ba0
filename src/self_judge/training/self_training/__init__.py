"""On-policy self-training: a model samples, judges its own responses and learns from them.

It knows prompts, rollouts, the loss, and TRL's DPOTrainer, which it alone imports. It does not know
run files or data sets. It imports `training` and what that may import.
"""

"""On-policy self-training: a model samples, judges its own responses and learns from them.

It knows prompts, rollouts, the loss, and TRL's DPOTrainer, which no other package imports. It does
not know run files or data sets. It imports from `training` and the packages before it.
"""

"""On-policy self-training: a model samples, judges its own responses and learns from them.

This package handles prompts, rollouts and the loss, and is the only one that imports TRL's
DPOTrainer. It does not depend on run files or datasets. It imports from `training` and the packages
before it.
"""

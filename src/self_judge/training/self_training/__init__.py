"""On-policy self-training: a model samples responses, judges them and learns from them.

This package handles prompts, rollouts and the loss, and is the only package that imports TRL's
DPOTrainer. It does not depend on run files or datasets. It imports from `training` and the packages
listed before `training` in docs/architecture.md.
"""

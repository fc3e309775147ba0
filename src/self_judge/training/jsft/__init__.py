"""Judge-augmented supervised fine-tuning: a model learns to answer and to judge.

This package converts preference records to examples and extends TRL's SFTTrainer. It does not
depend on self-training. It imports from `training` and the packages listed before `training` in
docs/architecture.md.
"""

"""Judge-augmented supervised fine-tuning: a model learns to answer and to judge.

It knows preference records, their examples, and TRL's SFTTrainer. It does not know self-training.
It imports from `training` and the packages before it.
"""

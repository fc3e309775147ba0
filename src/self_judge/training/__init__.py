"""Shared parts of both trainers: setup, checkpoints, callbacks, out-of-memory handling.

This package extends the trainers of Transformers and TRL. It does not depend on evaluation or
commands. It imports from `judging` and the packages listed before `judging` in
docs/architecture.md, and contains `jsft` and `self_training`.
"""

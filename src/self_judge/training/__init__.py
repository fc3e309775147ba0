"""Shared parts of both trainers: setup, checkpoints, callbacks, out-of-memory handling.

This package extends the trainers of Transformers and TRL. It contains `identity`, `jsft` and
`self_training`. It imports from `judging` and the packages listed before `judging` in
docs/architecture.md. It does not depend on evaluation or commands.
"""

"""Samples responses to prompts and computes the probabilities of letters with a model.

This package handles token ids, sampling and forward passes. It does not depend on judging or
training. It imports from `packing` and the packages listed before `packing` in
docs/architecture.md.
"""

"""Checks the judge and what is saved.

This package checks that the judge stays the initial model, and that saved weights are the trained
ones and fit the run. It does not train or write checkpoints. It imports from the packages listed
before `training` in docs/architecture.md.
"""

"""Checks a run before training and reports counts, examples, estimated cost and findings.

This package reads run files and prepares a run as training does. It does not train or load weights.
It imports from `training` and the packages listed before it in docs/architecture.md.
"""

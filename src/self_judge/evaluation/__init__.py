"""Measures the quality of judges and policies, with confidence intervals.

This package handles verdicts and labels. It does not depend on models, files or tables. It imports
from `judging` and the packages listed before `judging` in docs/architecture.md.
"""

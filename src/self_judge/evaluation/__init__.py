"""Measures the quality of judges and policies, with confidence intervals.

This package computes metrics from verdicts and labels. It does not load models, read files or
format tables. It imports from `judging` and the packages listed before `judging` in
docs/architecture.md.
"""

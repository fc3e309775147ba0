"""Turns comparisons into verdicts and tournament winners.

This package judges each pair in both orders, combines the votes of all principles and runs knockout
tournaments. It does not depend on training or on how letter probabilities are computed. It imports
from `inference` and the packages listed before `inference` in docs/architecture.md.
"""

"""Turns comparisons into verdicts and tournament winners.

This package handles templates, both orders, votes and brackets. It does not depend on training or
on how letter probabilities are computed. It imports from `inference` and the packages listed before
`inference` in docs/architecture.md.
"""

"""Reads data sources as preference records and labeled comparisons.

This package covers file access, the formats of known datasets, and a built-in synthetic world. It
does not depend on tokens, models or training. It imports from `config` and the packages listed
before `config` in docs/architecture.md, and needs torch only to create a tiny model.
"""

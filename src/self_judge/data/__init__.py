"""Reads data sources as preference records and labeled comparisons.

This package handles storage, the formats of known datasets, and a built-in synthetic world. It does
not depend on tokens, models or training. It imports from `config` and the packages before it, and
runs without torch unless it creates a tiny model.
"""

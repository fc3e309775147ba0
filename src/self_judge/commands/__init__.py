"""Implements the `self-judge` commands, from inputs to outputs.

This package connects the other packages with files, models and consoles. It does not parse
arguments; `cli` does. It may import every other package.
"""

"""Implements each `self-judge` command: its inputs, work and outputs.

This package connects the other packages with files, models and consoles. It does not parse
arguments; `cli` does. It may import every other package.
"""

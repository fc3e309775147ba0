"""The implementation of each command of `self-judge`: its inputs, work and outputs.

It knows files, models and consoles, and connects the packages. It does not parse arguments: `cli`
does. It may import every other package.
"""

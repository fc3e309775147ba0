"""The work behind each command of `self-judge`: what is read, done and written.

It knows files, models and consoles, and wires the packages together. It does not parse arguments:
`cli` does. It may import every other package.
"""

"""Runs the whole method.

These modules do not train, judge or sample; each command does this in a process of its own. They
import the other commands. `init` imports `stages` for the names of files and the commands.
"""

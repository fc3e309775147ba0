"""Run files: typed, validated settings, adapted to the machine.

This package defines the sections and keys of a run file and detects the machine's capabilities. It
does not depend on data, models or trainers. It imports from `prompting` and the packages before it,
and runs without torch.
"""

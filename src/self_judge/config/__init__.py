"""Loads run files into typed, validated settings and adapts them to the machine.

This package defines the sections and keys of a run file and detects the machine's capabilities. It
does not depend on data, models or trainers. It imports from `prompting` and the packages listed
before it in docs/architecture.md, and runs without torch.
"""

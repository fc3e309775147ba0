"""Run files: typed, validated settings, adapted to the machine.

It knows YAML, the sections and keys of a run file, and the machine's capabilities. It does not know
data, models or trainers. It imports `prompting` and the packages before it, and runs without torch.
"""

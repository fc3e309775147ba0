"""Run files and machines become checked settings.

It knows YAML, the sections and keys of a run file, and what a machine offers. It does not know
data, models or trainers. It imports `prompting` and the packages before it, and runs without torch.
"""

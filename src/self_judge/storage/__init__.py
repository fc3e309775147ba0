"""Crash-safe files: replaced atomically, or appended to line by line.

It knows files, folders and JSON lines, but nothing of their contents: no data, no model, no
settings. It imports `errors` and runs without torch.
"""

"""Crash-safe files: replaced atomically, or appended to line by line.

This package handles files, folders and JSON lines. It does not interpret their contents. It imports
`errors` and runs without torch.
"""

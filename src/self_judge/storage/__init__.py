"""Writes crash-safe files by atomic replacement or by appending lines.

This package handles files, folders and JSON lines. It does not interpret their contents. It imports
`errors` and runs without torch.
"""

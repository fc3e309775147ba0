"""Writes crash-safe files by atomic replacement or by appending lines.

This package handles files, folders and JSON lines. It does not interpret their contents. Within
self_judge, it imports only `errors` and `console`. It runs without torch.
"""

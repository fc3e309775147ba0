"""Sequences that share prefixes become forward passes that compute each shared token once.

It knows token ids, attention and what a model computes exactly. It does not know what sequences
mean: judging, training and sampling look alike to it. It imports `models` and what stands before.
"""

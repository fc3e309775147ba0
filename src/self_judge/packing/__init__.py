"""Sequences that share prefixes become forward passes that compute each shared token once.

It knows token ids, attention and which ways of computing are exact for a model. It does not know
what the sequences mean: judging, training and sampling look alike to it. It imports from `models`
and the packages before it.
"""

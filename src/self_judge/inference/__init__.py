"""A model answers: it continues prompts, and gives the probabilities of letters.

This package handles token ids, sampling and forward passes. It does not depend on judging or
training. It imports from `packing` and the packages before it.
"""

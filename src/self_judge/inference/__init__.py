"""A model answers: it continues prompts, and gives the probabilities of letters.

It knows token ids, sampling and forward passes. It does not know judges, votes or training. It
imports from `packing` and the packages before it.
"""

"""A model answers: it continues prompts, and gives the probabilities of letters.

It knows token ids, sampling and the passes of a model. It does not know judges, votes or training.
It imports `packing` and the packages before it.
"""

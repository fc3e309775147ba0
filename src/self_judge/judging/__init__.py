"""Comparisons become verdicts, and verdicts become tournaments.

It knows templates, both orders, votes and brackets. It does not know how letters are computed, and
it does not know training. It imports from `inference` and the packages before it.
"""

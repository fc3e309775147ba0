"""How good a judge or a policy is: numbers with intervals.

It knows verdicts and labels. It does not know models, files or tables. It imports from `judging`
and the packages before it.
"""

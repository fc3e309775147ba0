"""How good a judge or a policy is: numbers with intervals.

This package handles verdicts and labels. It does not depend on models, files or tables. It imports
from `judging` and the packages before it.
"""

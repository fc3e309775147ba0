"""What a run would do, before it does: counts, examples, cost and findings.

It knows run files and prepares a run like training. It does not train or load weights. It imports
from `training` and the packages before it.
"""

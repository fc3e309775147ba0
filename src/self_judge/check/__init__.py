"""What a run would do, before it does: counts, examples, cost and findings.

This package reads run files and prepares a run as training does. It does not train or load weights.
It imports from `training` and the packages before it.
"""

"""What a run would do, before it does: counts, examples, cost and findings.

It knows run files and prepares a run as training does. It trains nothing and loads no weights. It
imports `training` and the packages before it.
"""

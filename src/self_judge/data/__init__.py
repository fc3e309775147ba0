"""Data sources: raw records to preference records and labeled comparisons.

It knows where records are stored, the formats of known data sets, and a built-in synthetic world.
It does not know tokens, models or training. It imports `config` and the packages before it, and
runs without torch unless it creates a tiny model.
"""

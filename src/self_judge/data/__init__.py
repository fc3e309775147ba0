"""Raw records become preference records and labeled comparisons.

It knows where records are stored, the formats of known data sets, and a synthetic world of its own.
It does not know tokens, models or training. It imports `config` and the packages before it, and
runs without torch until a tiny model is asked for.
"""

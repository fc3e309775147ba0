"""vLLM as the sampler and the scorer, in this process or behind URLs.

It knows engines, servers, and how weights reach them. It does not know the model in training: what
is handed to an engine comes from `training`. It imports `inference` and what that may import.
"""

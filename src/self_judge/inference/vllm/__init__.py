"""vLLM as the sampler and the scorer, in this process or behind URLs.

It knows engines, servers, and how weights reach them. It does not know the model in training:
`training` passes adapters and weights to an engine. It imports from `inference` and the packages
before it.
"""

"""vLLM as the sampler and the scorer, in this process or behind URLs.

This package handles engines, servers, and the transfer of weights to them. It does not depend on
the model in training. `training` passes adapters and weights to an engine. It imports from
`inference` and the packages before it.
"""

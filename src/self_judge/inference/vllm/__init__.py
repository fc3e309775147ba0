"""Samples and scores with vLLM, either in this process or on servers.

This package handles engines, servers, and the transfer of weights to them. It does not depend on
the model in training. `training` passes adapters and weights to an engine. This package imports
from `inference` and the packages listed before it in docs/architecture.md.
"""

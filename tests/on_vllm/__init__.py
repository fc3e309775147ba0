"""Tests on a real vLLM, which has an environment of its own."""

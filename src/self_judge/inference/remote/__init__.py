"""Asks servers over HTTP, within deadlines and without trusting their answers.

This package handles requests, retries, replicas and OpenAI-compatible endpoints. It does not depend
on training or on verdicts. It imports from `inference` and the packages listed before `inference`
in docs/architecture.md.
"""

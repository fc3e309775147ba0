"""Answers over HTTP by self-rejection, as OpenAI's clients expect it.

This package samples the responses of concurrent requests together, plays their tournaments together
and sends the winners. It does not implement sampling, judging or brackets. It imports from
`commands` and the packages listed before `commands` in docs/architecture.md.
"""

"""Turns the files of runs into one HTML page that needs no network.

This package handles the files of a run, the charts and the page. It only reads files and does not
train. It imports from `evaluation` and the packages listed before `evaluation` in
docs/architecture.md.
"""

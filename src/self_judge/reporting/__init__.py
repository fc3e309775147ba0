"""Turns the output files of runs into one HTML page that works offline.

This package reads the files of runs, defines the charts and writes the page. It does not train. It
imports from `evaluation` and the packages listed before `evaluation` in docs/architecture.md.
"""

"""The files of runs become one HTML page that needs no network.

It knows the files of a run, charts and the page. It only reads; it does not compute or train. It
imports from `evaluation` and the packages before it.
"""

"""What runs left in their folders becomes one HTML page that needs no network.

It knows the files of a run, charts and the page. It does not compute or train: it reads. It imports
`evaluation` and the packages before it.
"""

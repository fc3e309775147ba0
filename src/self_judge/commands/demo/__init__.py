"""The demo runs the whole method in a small synthetic world and downloads nothing.

`run` evaluates what `steps` trains. These modules do not implement any part of the method; they
import the commands that train, the judge and the sampler.
"""

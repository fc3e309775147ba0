"""Turns sequences with shared prefixes into passes that compute each shared token once.

This package handles token ids and attention, and finds out which packing modes are exact for a
model. It does not depend on the meaning of the sequences. Judging, training and sampling use this
package in the same way. It imports from `models` and the packages listed before `models` in
docs/architecture.md.
"""

"""Encodes text as token ids with templates and tokenizers.

This package ensures that text from the data never becomes a control token. It does not depend on
models or data formats. It imports `storage`, `datatypes` and `errors`, and runs without torch.
"""

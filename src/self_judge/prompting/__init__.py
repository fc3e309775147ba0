"""Texts become the token ids that a model reads.

It knows judge templates, chat templates and tokenizers, and it keeps the texts of data from turning
into control tokens. It does not know models, data formats or what the ids are for. It imports
`storage`, `datatypes` and `errors`, and runs without torch.
"""

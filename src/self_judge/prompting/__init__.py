"""Text to token ids: judge templates, chat templates and tokenizers.

It knows how to keep text from data from turning into control tokens. It does not know models, data
formats or the purpose of the ids. It imports `storage`, `datatypes` and `errors`, and runs without
torch.
"""

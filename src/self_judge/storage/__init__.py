"""Files that survive a kill: written whole, or grown by whole lines.

It knows files, folders and JSON lines. It does not know what is in them: no data, no model, no
settings. It imports `errors` and runs without torch.
"""

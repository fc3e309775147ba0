"""Overrides that let a shipped run file start on a small local model and local data."""

from __future__ import annotations

from pathlib import Path


def given(model: Path, source: Path, *more: str) -> list[str]:
    """A model and data on this disk, a fifth of it held out; `more` overrides these."""
    return [
        f"model.model_name_or_path={model}",
        "model.dtype=float32",
        "training_args.bf16=false",
        f"dataset.sources=[{{path: {source}}}]",
        "dataset.eval=[]",
        "dataset.held_out=0.2",
        *more,
    ]

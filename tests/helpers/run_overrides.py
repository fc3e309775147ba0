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


def one_step(output: Path, section: str, *more: str) -> list[str]:
    """One training step with two examples; `more` adds to this or overrides it."""
    return [
        f"training_args.output_dir={output}",
        "training_args.max_steps=1",
        "training_args.per_device_train_batch_size=2",
        "training_args.disable_tqdm=true",
        f"{section}.global_batch_size=2",
        *more,
    ]

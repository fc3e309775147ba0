"""Checks that a checkpoint is usable, and that it fits the run that resumes from it.

This module does not load weights or optimizer states.
"""

from __future__ import annotations

import hashlib
import operator
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers.trainer import FSDP_MODEL_NAME, TRAINER_STATE_NAME

from self_judge.adapters import FILES, saved_shapes
from self_judge.errors import CheckpointError, in_a_line
from self_judge.storage.atomic import loads, write_json
from self_judge.training.identity.saved_weights import in_base
from self_judge.training.identity.shards import (
    DEEPSPEED,
    FSDP_SHARDS,
    FSDP_WHOLE,
    PLAIN,
    SHARDS,
    full_shape,
    kind_of_launch,
    weights,
)

# Settings that change the meaning of an adapter's weights, but not their names or shapes.
_SCALES = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
           "trainable_token_indices")  # fmt: skip
DATA_FILE = "data_fingerprint.json"


@contextmanager
def resuming(checkpoint: Path) -> Iterator[None]:
    """Turns errors from a damaged or unsuitable checkpoint into a `CheckpointError`."""
    try:
        yield
    except (ArithmeticError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise _unusable(checkpoint, error) from error
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError) or should_reduce_batch_size(error):
            raise
        raise _unusable(checkpoint, error) from error


def _unusable(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot resume from {checkpoint}: its files are damaged, or do not fit this run "
        f"({in_a_line(error)}). Use an earlier checkpoint, or another output_dir"
    )


def check_state(checkpoint: Path) -> Path:
    """Returns the checkpoint if it has a trainer state and an optimizer state.

    Raises:
        CheckpointError: the checkpoint lacks one of them.
    """
    with resuming(checkpoint):
        state = loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
        for name in ("global_step", "train_batch_size"):
            operator.index(state[name])
    kinds = ("optimizer*", "global_step*", f"{FSDP_MODEL_NAME}*")  # Transformers, DeepSpeed, FSDP
    if any(True for kind in kinds for _ in checkpoint.glob(kind)):
        return checkpoint
    raise CheckpointError(
        f"cannot resume from {checkpoint}: it has no optimizer state (save_only_model). To start a "
        "new run from it, set model.model_name_or_path to its path and choose another output_dir"
    )


def check_same_launch(checkpoint: Path, accelerator: Accelerator) -> None:
    """Raises `CheckpointError` if FSDP or DeepSpeed wrote a checkpoint for another kind of run."""
    files = {SHARDS: FSDP_SHARDS, f"{FSDP_MODEL_NAME}.bin": FSDP_WHOLE}
    saved = next((kind for name, kind in files.items() if (checkpoint / name).exists()), PLAIN)
    if any(True for _ in checkpoint.glob("global_step*")):
        saved = DEEPSPEED
    if saved != (now := kind_of_launch(accelerator)):
        raise CheckpointError(
            f"cannot resume from {checkpoint}: it was saved with {saved}, but this run uses {now}."
            " Launch it with the same accelerate file, or use another output_dir"
        )


def check_same_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Checks that a checkpoint's adapter matches the adapter being trained.

    Raises:
        CheckpointError: the adapters differ in a setting or in the shapes of their weights, or
            only one of the two models has an adapter.
    """
    if not (checkpoint / FILES[0]).is_file():
        if isinstance(model, PeftModel):
            raise CheckpointError(
                f"cannot resume from {checkpoint}: it contains a full model, but this run "
                "trains an adapter"
            )
        return
    saved = PeftConfig.from_pretrained(str(checkpoint))
    if not isinstance(model, PeftModel):
        raise CheckpointError(
            f"cannot resume from {checkpoint}: it contains an adapter, but this run trains a "
            "full model"
        )
    asked: Any = model.active_peft_config
    for name in _SCALES:
        before, now = (getattr(c, name, None) or None for c in (saved, asked))
        if before != now:
            raise CheckpointError(
                f"cannot resume from {checkpoint}: its adapter has {name}={before}, but this run "
                f"uses {now}. Use the same peft_config, or another output_dir"
            )
    own = get_peft_model_state_dict(model, weights(model))
    file = checkpoint / FILES[1]
    found = saved_shapes(file) if file.is_file() else {}
    stored = {name: tuple(shape) for name, shape in found.items()}
    loaded = set() if stored.keys() >= own.keys() else in_base(model)  # ZeRO-3 leaves them out
    shapes = {n: full_shape(t) for n, t in own.items() if n in stored or id(t) not in loaded}
    differing = sorted(n for n in {*shapes, *stored} if shapes.get(n) != stored.get(n))
    if differing and stored:
        name = differing[0]
        raise CheckpointError(
            f"cannot resume from {checkpoint}: the shape of {name} is {stored.get(name)} in its "
            f"adapter, but {shapes.get(name)} in this run. Use the same peft_config, or another "
            "output_dir"
        )


def data_fingerprint(dataset: Any) -> str | None:
    """Returns a hash of all rows in a dataset, or `None` for a streaming dataset."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.blake2b(repr(sorted(dataset.features)).encode(), digest_size=12)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(table.column_names):
            for chunk in table.column(name).chunks:
                digest.update(pa.record_batch([chunk], [name]).serialize())
    return digest.hexdigest()


def save_fingerprints(folder: Path, data: str | None, optimizer: Any) -> None:
    """Records what the run must have in common with a run that resumes from a checkpoint."""
    write_json(folder / DATA_FILE, {"data": data, "optimizer": _name(optimizer)})


def same_data(checkpoint: Path, fingerprint: str | None) -> bool:
    """Returns `False` if a checkpoint is known to come from different training data."""
    saved = _fingerprints(checkpoint).get("data")
    return None in (saved, fingerprint) or saved == fingerprint


def check_same_optimizer(checkpoint: Path, optimizer: Any) -> None:
    """Raises `CheckpointError` if a checkpoint has the state of another optimizer."""
    saved, now = _fingerprints(checkpoint).get("optimizer"), _name(optimizer)
    if None not in (saved, now) and saved != now:
        raise CheckpointError(
            f"cannot resume from {checkpoint}: it has the state of the optimizer {saved}, but this "
            f"run uses {now}. Use the same training_args.optim, or another output_dir"
        )


def _fingerprints(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / DATA_FILE
    return dict(loads(path.read_bytes())) if path.is_file() else {}


def _name(optimizer: Any) -> str | None:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimizer
    return None if inner is None else type(inner).__name__

"""Checks that saved weights are finite, loadable and equal to the trained weights in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from self_judge.errors import CheckpointError, ModelError
from self_judge.runtime import unwrapped
from self_judge.storage.atomic import write_json
from self_judge.storage.repository import refuse_overwriting
from self_judge.training.reference import ReferenceCheck, probe_logits

# The adapter settings that determine the names and shapes of its weights.
_SHAPES = (
    "peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "modules_to_save",
    "layers_to_transform", "bias", "lora_bias", "use_dora",
)  # fmt: skip
_ROWS = 256
DATA_FILE = "data_fingerprint.json"


def not_finite(model: nn.Module, *, trained_only: bool = True) -> list[str]:
    """Returns the names of the weights that contain NaN or infinity."""
    return [
        name
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or not trained_only)
        and parameter.is_floating_point()
        and not _is_finite(parameter)
    ]


def _is_finite(parameter: torch.Tensor) -> bool:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    # The sum is not finite if any weight is not. It needs less memory than a mask of all weights.
    return bool(torch.isfinite(local.detach().sum(dtype=torch.float64)))


def check_arguments(args: TrainingArguments, model: nn.Module) -> None:
    """Raises `ValueError` if a number is not finite or the output folder is the model's folder."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: give a finite number")
    inner: Any = unwrapped(model)
    refuse_overwriting([str(args.output_dir)], filter(None, [inner.name_or_path]))


def check_configuration(model: nn.Module, folder: Path) -> None:
    """Saves everything except the weights, so that errors appear before training.

    Raises:
        ModelError: Transformers refuses to save the model's configuration.
    """
    inner: Any = unwrapped(model)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        inner.config.save_pretrained(folder)
        if inner.can_generate():
            inner.generation_config.save_pretrained(folder)
    except (TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            f"the trained model could not be saved: {' '.join(lines):.400}. Correct "
            f"generation_config.json or config.json of {inner.config.name_or_path or 'the model'}"
        ) from error


def check_saved(model: nn.Module, folder: Path) -> None:
    """Compares saved weights with those in memory, one tensor at a time.

    Weights that Transformers stores under other names are not compared.

    Args:
        model: a plain model or a `PeftModel` that is not sharded.
        folder: the folder to which `save_pretrained` wrote the model.

    Raises:
        ModelError: a weight is missing or differs; the message names it.
    """
    adapter = isinstance(model, PeftModel)
    memory: Mapping[str, torch.Tensor]
    memory = get_peft_model_state_dict(model) if adapter else unwrapped(model).state_dict()
    found, strange = set[str](), False
    for name, tensor in _saved(folder, "adapter_model*" if adapter else "model*"):
        if name not in memory:
            strange = True
            continue
        found.add(name)
        own = memory[name].detach()
        if own.is_floating_point() and not torch.equal(own.cpu(), tensor):
            raise ModelError(
                f"{folder} was not saved correctly: {name} differs from the trained weights"
            )
    stored = {memory[name].data_ptr() for name in found}
    lacking = [n for n, t in memory.items() if n not in found and t.data_ptr() not in stored]
    if lacking and not strange:
        raise ModelError(
            f"{folder} was not saved correctly: {len(lacking)} trained weights are missing, such "
            f"as {lacking[0]}"
        )


def check_merged(merged: nn.Module, expected: torch.Tensor | None) -> None:
    """Checks that a merged model gives the same logits as the model with its adapter.

    Args:
        expected: the logits of the model with its adapter (see `reference.probe_logits`), or `None`
            for a 4-bit base, which is merged without quantization.

    Raises:
        ModelError: a weight is not finite, or the logits differ.
    """
    broken = not_finite(merged, trained_only=False)
    if broken:
        raise ModelError(f"the merged weights are not finite, starting with {broken[0]}")
    if expected is None:
        return
    off = ReferenceCheck(expected, merged).moved(probe_logits(merged))
    if off is not None:
        raise ModelError(
            f"merging the adapter changed the model: its logits differ by {off:.1e} of the largest "
            "one, so nothing is saved. Set jsft_args.merge_adapter: false"
        )


def _saved(folder: Path, pattern: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob(f"{pattern}.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_tensor(name)


def with_optimizer(checkpoint: Path) -> Path:
    """Returns the checkpoint if it has an optimizer state.

    Raises:
        CheckpointError: the checkpoint has no optimizer state.
    """
    kinds = ("optimizer*", "global_step*", "pytorch_model_fsdp*")  # Transformers, DeepSpeed, FSDP
    if any(True for kind in kinds for _ in checkpoint.glob(kind)):
        return checkpoint
    raise CheckpointError(
        f"{checkpoint} cannot be resumed from: it has no optimizer state (save_only_model). To "
        "start a new run from it, set model.model_name_or_path to it and choose another output_dir"
    )


def check_same_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Checks that a checkpoint's adapter fits the one being trained.

    Raises:
        CheckpointError: the adapters differ in a setting that changes the shapes of their weights.
    """
    if not (checkpoint / "adapter_config.json").is_file():
        if isinstance(model, PeftModel):
            raise CheckpointError(
                f"{checkpoint} cannot be resumed from: it contains a full model, but this run "
                "trains an adapter"
            )
        return
    saved = PeftConfig.from_pretrained(str(checkpoint))
    if not isinstance(model, PeftModel):
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from: it contains an adapter, but this run trains a "
            "full model"
        )
    asked = model.active_peft_config
    for name in _SHAPES:
        before, now = (_plain(getattr(c, name, None)) for c in (saved, asked))
        if before != now:
            raise CheckpointError(
                f"{checkpoint} cannot be resumed from: its adapter has {name} {before}, but this "
                f"run has {now}. Use the same peft_config, or another output_dir"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, (set, list, tuple)):
        return sorted(map(str, value))
    return value or None


def data_fingerprint(dataset: Any) -> str | None:
    """Returns a hash of the size and of up to 256 evenly spaced rows; `None` for a stream."""
    try:
        count = len(dataset)
    except TypeError:
        return None
    digest = hashlib.blake2b(str(count).encode(), digest_size=12)
    for i in range(0, count, max(1, count // _ROWS)):
        digest.update(json.dumps(dataset[i], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def save_data_fingerprint(folder: Path, fingerprint: str | None) -> None:
    write_json(folder / DATA_FILE, {"data": fingerprint})


def same_data(checkpoint: Path, fingerprint: str | None) -> bool:
    """Returns false only if a checkpoint was written with different training data."""
    path = checkpoint / DATA_FILE
    if fingerprint is None or not path.is_file():
        return True
    saved = json.loads(path.read_text(encoding="utf-8")).get("data")
    return saved in (None, fingerprint)

"""Checks that saved weights are finite, loadable and equal to the trained weights in memory."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from self_judge.adapters import (
    FILES,
    Adapter,
    adapter_config,
    base_weights,
    merged,
    with_adapter,
)
from self_judge.errors import ModelError
from self_judge.models import built_again
from self_judge.runtime import unwrapped
from self_judge.storage.repository import refuse_overwriting, repository_file
from self_judge.training.identity.reference import (
    ReferenceCheck,
    is_sharded,
    perturbed,
    probe_logits,
)

logger = logging.getLogger(__name__)

# Initializations that PEFT computes from the base weights, and repeats when it loads the adapter.
_REPEATABLE = ("pissa", "olora")


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
    # The sum is not finite if any weight is not finite. Computing the sum needs less memory than a
    # mask of all weights.
    return bool(torch.isfinite(local.detach().sum(dtype=torch.float64)))


def check_start(args: TrainingArguments, model: nn.Module) -> None:
    """Finds errors in the settings and the model that would otherwise appear only on saving.

    Raises:
        ValueError: a setting is NaN or infinite, or the output folder is the folder of the model.
        ModelError: see `check_configuration` and `check_base`.
    """
    for name, value in vars(args).items():
        allowed = name == "max_grad_norm" and value == math.inf  # no clipping
        if isinstance(value, float) and not math.isfinite(value) and not allowed:
            raise ValueError(f"{name} is {value}: give a finite number")
    inner: Any = unwrapped(model)
    refuse_overwriting([str(args.output_dir)], filter(None, [inner.name_or_path]))
    if is_sharded(args):
        return
    if broken := not_finite(model):
        raise ModelError(f"the given model contains NaN or infinity (first: {broken[0]})")
    if isinstance(model, PeftModel):
        if isinstance(inner.get_output_embeddings(), TrainableTokensWrapper):
            raise ModelError(
                "peft_config.trainable_token_indices would not reach the head of a model with tied "
                "embeddings, whose weight TRL reads directly: use modules_to_save: [embed_tokens]"
            )
        check_base(model)
    else:
        check_configuration(model)


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raises `ValueError` if a given optimizer has none of the trained parameters."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer in optimizers has none of the trained parameters, so nothing would be "
            "learned: create it for the model with its adapter, or set args.optim"
        )


def check_configuration(model: nn.Module) -> None:
    """Checks, before training, that Transformers would not refuse to save the full model.

    Raises:
        ModelError: the generation config contains contradictory settings.
    """
    inner: Any = unwrapped(model)
    if not inner.can_generate():
        return
    try:
        inner.generation_config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if "`" in line]
        raise ModelError(
            f"the trained model could not be saved: {' '.join(lines) or str(error):.300} Correct "
            f"the generation_config.json of {inner.config.name_or_path or 'the model'}"
        ) from error


def check_base(model: PeftModel) -> None:
    """Compares rows of all weights in memory with those in the files of an adapter's base model.

    Bases that are adapters, and weights in 4 bits, are not compared.

    Raises:
        ModelError: the weights differ, so the saved adapter would not fit its base model.
    """
    config: Any = model.active_peft_config
    name, base = str(config.base_model_name_or_path or ""), unwrapped(model)
    known = getattr(config, "init_lora_weights", None) in _REPEATABLE
    if known or not name or adapter_config(name, config.revision) is not None:
        return
    found = repository_file(name, "config.json", config.revision)
    memory = base_weights(base) if found else {}
    # Weights beside those in 4 bits may have been rounded twice.
    rounded = getattr(base, "quantization_method", None) is not None
    for file in sorted(found.parent.glob("model*.safetensors")) if found else ():
        with safe_open(file, "pt") as weights:
            for weight in memory.keys() & set(weights.keys()):
                own, saved = memory[weight], weights.get_slice(weight)
                if saved.get_shape() != list(own.shape) or not own.is_floating_point():
                    continue
                last = len(own) - 1 if own.dim() > 1 else 0
                for row in {0, last // 2, last} if last > 0 else (slice(None),):
                    there, here = saved[row].to(own.dtype), own[row].detach().cpu()
                    if torch.equal(there, here) or (rounded and torch.allclose(there, here, 1e-2)):
                        continue
                    raise ModelError(
                        f"the adapter would name {name} as its base model, but the base model in "
                        f"memory differs from the weights saved there (in {weight}): save the "
                        "model and load it from the new folder first, or choose another "
                        "init_lora_weights"
                    )


def remove_old_adapter(model: nn.Module, folder: Path) -> None:
    """Removes an earlier run's adapter, which would be loaded instead of the full model."""
    for name in () if isinstance(model, PeftModel) else FILES:
        (folder / name).unlink(missing_ok=True)


def check_saved(model: nn.Module, folder: Path) -> None:
    """Compares saved weights with those in memory, one tensor at a time.

    Weights that Transformers stores in other pieces (experts) have the same sum of squares.

    Args:
        model: a plain model or a `PeftModel` that is not sharded.
        folder: the folder to which `save_pretrained` wrote the model.

    Raises:
        ModelError: a weight is missing or differs; the message names it.
    """
    adapter = isinstance(model, PeftModel)
    memory: Mapping[str, torch.Tensor]
    memory = get_peft_model_state_dict(model) if adapter else unwrapped(model).state_dict()
    found, renamed = set[str](), 0.0
    for name, tensor in _saved(folder, "adapter_model*" if adapter else "model*"):
        if name not in memory:
            renamed += _squares(tensor)
            continue
        found.add(name)
        own = memory[name].detach()
        if own.is_floating_point() and not torch.equal(own.cpu(), tensor):
            raise ModelError(
                f"{folder} was not saved correctly: {name} differs from the trained weights"
            )
    stored = {memory[name].data_ptr() for name in found}
    lacking = [n for n, t in memory.items() if n not in found and t.data_ptr() not in stored]
    size = sum(_squares(memory[name]) for name in lacking)
    if not math.isclose(size, renamed, rel_tol=1e-6):
        raise ModelError(
            f"{folder} was not saved correctly: {len(lacking)} trained weights are missing or "
            f"differ (first: {lacking[0] if lacking else 'a weight that is not trained'})"
        )


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def check_merged(merged: nn.Module, expected: torch.Tensor | None) -> None:
    """Checks that a merged model gives the same logits as the model with its adapter.

    Args:
        expected: the logits of the model with its adapter (see `reference.probe_logits`), or `None`
            for a 4-bit base, which is merged without quantization.

    Raises:
        ModelError: a weight contains NaN or infinity, or the logits differ.
    """
    broken = not_finite(merged, trained_only=False)
    if broken:
        raise ModelError(f"the merged weights contain NaN or infinity (first: {broken[0]})")
    if expected is None:
        return
    off = ReferenceCheck(expected, merged).moved(probe_logits(merged))
    if off is not None:
        raise ModelError(
            "merging the adapter changed the model: the relative difference of its logits is "
            f"{off:.1e}, so nothing is saved. Set jsft_args.merge_adapter: false"
        )


def rehearse_saving(model: nn.Module) -> None:
    """Checks, before training, that the trained model can be saved, and loaded unchanged.

    Noise is added to the weights of an adapter meanwhile, because a new adapter changes nothing.

    Raises:
        ModelError: a trained weight would not be saved, or see `check_loading`.
    """
    if not isinstance(model, PeftModel):
        check_loading(model)
        return
    if model.active_adapters != ["default"]:
        raise ModelError(
            f"the active adapters are {', '.join(model.active_adapters)}, but only the adapter "
            "'default' would be saved: load the adapter to train under this name, and no other"
        )
    config: Any = model.active_peft_config
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    saved = {t.data_ptr() for t in get_peft_model_state_dict(model).values()}
    lost = [name for name, p in trained.items() if p.numel() and p.data_ptr() not in saved]
    if lost and not config.is_prompt_learning:  # prompts are computed from the trained weights
        raise ModelError(
            f"{lost[0]} is trained, but it is not part of the adapter and would not be saved: "
            "freeze it, or add its module to peft_config.modules_to_save"
        )
    with perturbed(list(trained.values())), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        check_loading(model, Path(folder))


@torch.no_grad()
def check_loading(model: nn.Module, folder: Path | None = None) -> None:
    """Compares the logits of a model with those that it has after it is saved and loaded.

    The model is built again from its configuration, with the weights in memory. An adapter is
    loaded from its file and merged, as `load_model` does, into copies of the weights it adapts.
    Models in 4 bits, and models of classes that are not from Transformers, are not compared.

    Args:
        folder: the folder with the model's adapter, if it has one.

    Raises:
        ModelError: the logits differ, or loading fails.
    """
    inner: Any = unwrapped(model)
    config: Any = model.active_peft_config if isinstance(model, PeftModel) else None
    computed = getattr(config, "init_lora_weights", None) in _REPEATABLE
    replicated = getattr(config, "layer_replication", None)  # has no base of its own in memory
    quantized = getattr(inner, "quantization_method", None) is not None
    foreign = not type(inner).__module__.startswith("transformers")  # also of remote code
    if computed or replicated or quantized or foreign:
        return
    expected = probe_logits(model)
    try:
        loaded: Any = built_again(inner)
        if folder is not None:
            adapter = Adapter(str(folder), None, str(config.base_model_name_or_path))
            loaded = with_adapter(loaded, adapter, trainable=False)
            for layer in (m for m in loaded.modules() if isinstance(m, BaseTunerLayer)):
                for parameter in layer.get_base_layer().parameters():
                    parameter.data = parameter.data.clone()
            with suppress(ModelError):  # `check_mergeable` refuses to merge some adapters
                loaded = built_again(merged(loaded))
        off = ReferenceCheck(expected, loaded).moved(probe_logits(loaded))
    except (RuntimeError, MemoryError) as error:
        if not should_reduce_batch_size(error):
            raise
        logger.warning("there is too little memory to check that the model can be loaded again")
        clear_device_cache(garbage_collection=True)
        return
    if off is not None:
        of_model = "change its configuration instead of its modules"
        remedy = "choose another peft_config" if folder else of_model
        raise ModelError(
            "the trained model would be another one after it is saved and loaded: the relative "
            f"difference of the logits is {off:.1e}. Load the model again and {remedy}"
        )


def _saved(folder: Path, pattern: str) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(folder.glob(f"{pattern}.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_tensor(name)

"""Checks that saved weights are finite, loadable and equal to the trained weights in memory."""

from __future__ import annotations

import logging
import math
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
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
from self_judge.training.identity.reference import ReferenceCheck, perturbed, probe_logits
from self_judge.training.identity.shards import from_all, full_shape, gathered, shard, weights

logger = logging.getLogger(__name__)

# Initializations that PEFT computes from the base weights, and repeats when it loads the adapter.
_REPEATABLE = ("pissa", "olora")


def not_finite(model: nn.Module, *, trained_only: bool = True) -> list[str]:
    """Returns the names of the weights of which this process holds NaN or infinity."""
    return [
        name
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad or not trained_only)
        and parameter.is_floating_point()
        and not _is_finite(parameter)
    ]


def _is_finite(parameter: torch.Tensor) -> bool:
    # The sum is not finite if any weight is not finite. Computing the sum needs less memory than a
    # mask of all weights.
    return bool(torch.isfinite(shard(parameter).sum(dtype=torch.float64)))


def check_start(args: TrainingArguments, model: nn.Module) -> None:
    """Finds errors in settings and configurations that would otherwise appear only on saving.

    Raises:
        ValueError: a setting is NaN or infinite, or the output folder is the folder of the model.
        ModelError: see `check_configuration` and `check_adapter`.
    """
    for name, value in vars(args).items():
        allowed = name == "max_grad_norm" and value == math.inf  # no clipping
        if isinstance(value, float) and not math.isfinite(value) and not allowed:
            raise ValueError(f"{name} is {value}: give a finite number")
    inner: Any = unwrapped(model)
    refuse_overwriting([str(args.output_dir)], filter(None, [inner.name_or_path]))
    if isinstance(model, PeftModel):
        check_adapter(model)
    else:
        check_configuration(model)


def check_given(model: nn.Module) -> None:
    """Raises `ModelError` if the given weights are not finite, or see `check_base`."""
    if broken := from_all(not_finite(model)):
        raise ModelError(f"the given model contains NaN or infinity (first: {broken[0]})")
    if isinstance(model, PeftModel):
        check_base(model)


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
    name = str(config.base_model_name_or_path or "")
    known = getattr(config, "init_lora_weights", None) in _REPEATABLE
    if known or not name or adapter_config(name, config.revision) is not None:
        return
    # Weights beside those in 4 bits may have been rounded twice.
    rounded = getattr(unwrapped(model), "quantization_method", None) is not None
    differing = []
    with ExitStack() as opened:
        memory, saved = _base(model, opened)
        for weight in sorted(memory.keys() & saved.keys()):
            with gathered(memory[weight]) as own:
                if not _same_rows(own, saved[weight].get_slice(weight), rounded):
                    differing.append(weight)
    if differing := from_all(differing):
        raise ModelError(
            f"the adapter would name {name} as its base model, but the base model in "
            f"memory differs from the weights saved there (in {differing[0]}): save the "
            "model and load it from the new folder first, or choose another "
            "init_lora_weights"
        )


def _same_rows(own: torch.Tensor, saved: Any, rounded: bool) -> bool:
    if saved.get_shape() != list(own.shape) or not own.is_floating_point():
        return True
    last = len(own) - 1 if own.dim() > 1 else 0
    for row in {0, last // 2, last} if last > 0 else (slice(None),):
        there, here = saved[row].to(own.dtype), own[row].cpu()
        if not (torch.equal(there, here) or (rounded and torch.allclose(there, here, 1e-2))):
            return False
    return True


def remove_old_adapter(model: nn.Module, folder: Path) -> None:
    """Removes an earlier run's adapter, which would be loaded instead of the full model."""
    for name in () if isinstance(model, PeftModel) else FILES:
        (folder / name).unlink(missing_ok=True)


def check_saved(model: nn.Module, folder: Path) -> None:
    """Raises `ModelError` if saved weights are not those in memory; see `difference`."""
    if problem := difference(model, folder):
        raise ModelError(f"{folder} was not saved correctly: {problem}")


def difference(model: nn.Module, folder: Path, *, reads: bool = True) -> str | None:
    """Compares saved weights with those in memory, one tensor at a time.

    Weights of different dtypes are equal if they round to the same values of the shorter one.
    Weights that Transformers stores in other pieces (experts) have the same sum of squares.

    Args:
        model: a plain model or a `PeftModel`.
        folder: the folder to which `save_pretrained` wrote the model.
        reads: whether this process compares. The others only help to gather sharded weights.

    Returns:
        What is wrong; it names a weight that is missing or differs. `None` if nothing is.
    """
    adapter, memory = isinstance(model, PeftModel), saved_part(model)
    problem, size = None, 0.0
    with ExitStack() as opened:
        saved = _saved(folder, "adapter_model*" if adapter else "model*", opened) if reads else {}
        renamed = sum(_squares(file.get_tensor(n)) for n, file in saved.items() if n not in memory)
        stored = {shard(memory[name]).data_ptr() for name in memory.keys() & saved.keys()}
        lacking = [
            name
            for name, tensor in memory.items()
            if name not in saved and shard(tensor).data_ptr() not in stored
        ]
        if lacking and isinstance(model, PeftModel):  # ZeRO-3 leaves out frozen weights
            loaded = in_base(model)
            lacking = [name for name in lacking if id(memory[name]) not in loaded]
        for name, tensor in memory.items():
            with gathered(tensor) as own:
                if name in saved and own.is_floating_point() and problem is None:
                    if not _equal(own.cpu(), saved[name].get_tensor(name)):
                        problem = f"{name} differs from the weights in memory"
                elif reads and name in lacking:
                    size += _squares(own)
    if problem is None and reads and not math.isclose(size, renamed, rel_tol=1e-6):
        problem = (
            f"{len(lacking)} weights in memory are missing or "
            f"differ (first: {lacking[0] if lacking else 'a weight that is not trained'})"
        )
    return problem


def in_base(model: PeftModel) -> set[int]:
    """Returns the ids of the frozen weights that are loaded with the base model's files.

    Weights of another shape, such as resized embeddings, are not.
    """
    with ExitStack() as opened:
        memory, saved = _base(model, opened)
        return {
            id(memory[name])
            for name in memory.keys() & saved.keys()
            if not memory[name].requires_grad
            and saved[name].get_slice(name).get_shape() == list(full_shape(memory[name]))
        }


def _base(model: PeftModel, opened: ExitStack) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the weights of an adapter's base in memory, and in its files if there are any."""
    config: Any = model.active_peft_config
    name, base = str(config.base_model_name_or_path or ""), unwrapped(model)
    found = repository_file(name, "config.json", config.revision) if name else None
    if found is None:
        return {}, {}
    return base_weights(base, weights(base)), _saved(found.parent, "model*", opened)


def load_renamed(model: nn.Module, folder: Path) -> bool:
    """Loads a checkpoint in which some weights have other names, or are in other pieces (experts).

    Transformers' trainer would leave these weights unchanged.

    Returns:
        Whether the weights were loaded.
    """
    if isinstance(model, PeftModel):
        return False
    inner: Any = unwrapped(model)
    with ExitStack() as opened:
        if not _saved(folder, "model*", opened).keys() - weights(inner).keys():
            return False
    loaded = type(inner).from_pretrained(folder, config=inner.config, dtype=inner.dtype)
    inner.load_state_dict(loaded.state_dict())
    return True


def shard_difference(model: nn.Module, folder: Path) -> str | None:
    """Does the same for the shards of this process in a checkpoint of FSDP."""
    stored, differing = FileSystemReader(folder).read_metadata().state_dict_metadata, []
    for name, tensor in saved_part(model).items():
        saved = torch.empty_like(tensor)
        if f"model.{name}" in stored:
            load({"model": {name: saved}}, checkpoint_id=folder)  # all processes together
            if torch.equal(shard(saved), shard(tensor)):
                continue
        differing.append(name)
    return f"{differing[0]} differs from the weights in memory" if differing else None


def _equal(own: torch.Tensor, saved: torch.Tensor) -> bool:
    dtype = min(own.dtype, saved.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.to(dtype), saved.to(dtype))


def saved_part(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights in memory that a checkpoint contains, by their names there."""
    state = weights(model)
    return get_peft_model_state_dict(model, state) if isinstance(model, PeftModel) else state


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


def check_adapter(model: PeftModel) -> None:
    """Raises `ModelError` if a trained weight would not be saved with the adapter, or not read."""
    inner: Any = unwrapped(model)
    if isinstance(inner.get_output_embeddings(), TrainableTokensWrapper):
        raise ModelError(
            "peft_config.trainable_token_indices would not reach the head of a model with tied "
            "embeddings, whose weight TRL reads directly: use modules_to_save: [embed_tokens]"
        )
    if model.active_adapters != ["default"]:
        raise ModelError(
            f"the active adapters are {', '.join(model.active_adapters)}, but only the adapter "
            "'default' would be saved: load the adapter to train under this name, and no other"
        )
    config: Any = model.active_peft_config
    saved = set(map(id, get_peft_model_state_dict(model, weights(model)).values()))
    lost = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and 0 not in full_shape(p) and id(p) not in saved
    ]
    if lost and not config.is_prompt_learning:  # prompts are computed from the trained weights
        raise ModelError(
            f"{lost[0]} is trained, but it is not part of the adapter and would not be saved: "
            "freeze it, or add its module to peft_config.modules_to_save"
        )


def rehearse_saving(model: nn.Module) -> None:
    """Checks, before training, that the trained model can be saved, and loaded unchanged.

    Noise is added to the weights of an adapter meanwhile, because a new adapter changes nothing.

    Raises:
        ModelError: see `check_loading`.
    """
    if not isinstance(model, PeftModel):
        check_loading(model)
        return
    with perturbed(model, trained(model)), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        check_loading(model, Path(folder))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


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


def _saved(folder: Path, pattern: str, opened: ExitStack) -> dict[str, Any]:
    """Opens the files of a saved model, and returns them by the names of their tensors."""
    files = sorted(folder.glob(f"{pattern}.safetensors"))
    readers: list[Any] = [opened.enter_context(safe_open(file, "pt")) for file in files]
    return {name: reader for reader in readers for name in reader.keys()}  # noqa: SIM118

"""Loads and merges PEFT adapters, finds their base models, and identifies weights.

This module does not depend on data or training.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from self_judge.errors import ModelError, _lines, in_a_line
from self_judge.storage.repository import repository_file, same_path

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Adapter(NamedTuple):
    name: str
    revision: str | None
    base: str


def adapter_config(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> PeftConfig | None:
    """Returns an adapter's configuration from a folder or the Hub, or `None` for a plain model.

    Raises:
        ModelError: the configuration cannot be read, or it does not name the base model.
    """
    file = repository_file(name_or_path, "adapter_config.json", revision)
    if file is None:
        return None
    try:
        config = PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:  # a damaged file can raise any error in the library
        raise ModelError(
            f"{name_or_path} is not a valid PEFT adapter: {in_a_line(error)}"
        ) from error
    if not config.base_model_name_or_path:
        raise ModelError(
            f"the adapter {name_or_path} does not name its base model in adapter_config.json"
        )
    return config


class AdapterChain(NamedTuple):
    """A plain model with its revision, and the adapters on top of it, innermost first."""

    base: str
    revision: str | None
    adapters: list[Adapter]


def adapter_chain(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> AdapterChain:
    """Follows the chain of base models from an adapter down to the plain model."""
    # An adapter on an adapter: outputs/self_judge -> outputs/jsft -> meta-llama/Llama-2-7b-hf
    name = str(name_or_path)
    adapters: list[Adapter] = []
    while (config := adapter_config(name, revision)) is not None:
        base = str(config.base_model_name_or_path)
        adapters.append(Adapter(name, revision, base))
        if any(base == seen.name or same_path(base, seen.name) for seen in adapters):
            raise ModelError(
                f"the adapter {name} names {base} as its base, so its chain of base models never "
                "ends: a base model was overwritten, or adapter_config.json is wrong"
            )
        name, revision = base, config.revision
    return AdapterChain(name, revision, adapters[::-1])


def with_adapter(base: PreTrainedModel, adapter: Adapter, *, trainable: bool) -> PeftModel:
    """Loads an adapter on top of its base model.

    Raises:
        ModelError: the adapter does not fit the base, or its file lacks weights or contains
            unexpected weights.
    """
    shapes = _shapes(adapter)
    try:
        embeddings = _resize_for(base, shapes)
        # By default, PEFT loads the adapter onto the first GPU, even if the base is elsewhere.
        model = PeftModel.from_pretrained(
            base,
            adapter.name,
            revision=adapter.revision,
            is_trainable=trainable,
            torch_device=str(base.device),
        )
        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except (
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
    ) as error:
        # PyTorch lists all mismatched weights below a heading. The message shows only the first.
        lines = _lines(error)
        raise ModelError(
            f"the adapter {adapter.name} does not fit its base {adapter.base}, or is damaged: "
            f"{lines[1] if len(lines) > 1 else in_a_line(error):.200}"
        ) from error
    # PEFT ignores unexpected weights, and leaves missing weights at their initial values.
    wrapped = (".modules_to_save.", ".original_module.")  # with save_embedding_layers
    surplus = {
        name
        for name in shapes
        if name not in expected
        and not name.endswith(embeddings)
        and not any(part in name for part in wrapped)
    }
    for what, names in (("lacks", expected - set(shapes)), ("has unexpected", surplus)):
        if names and shapes:
            raise ModelError(
                f"the adapter {adapter.name} {what} weights: {listed(names)}. Its file is "
                "incomplete, or does not match its adapter_config.json"
            )
    return model


def listed(names: Iterable[str]) -> str:
    """Returns the first three names and the number of remaining names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _shapes(adapter: Adapter) -> dict[str, list[int]]:
    """Returns the shapes in an adapter's safetensors file, or `{}` if there is no such file."""
    file = repository_file(adapter.name, FILES[1], adapter.revision)
    if file is None:
        return {}
    try:
        return saved_shapes(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter {adapter.name} is damaged: {in_a_line(error)}") from error


def saved_shapes(file: Path) -> dict[str, list[int]]:
    """Reads the names and shapes of the tensors in a safetensors file without loading them."""
    with safe_open(file, "pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def _resize_for(base: PreTrainedModel, shapes: dict[str, list[int]]) -> tuple[str, ...]:
    """Resizes the embeddings of the base if an adapter was trained with added tokens.

    Returns:
        The name suffixes of the embedding weights that an adapter may store in full.
    """
    tables: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    own = [[n for n, module in base.named_modules() if module is table] for table in tables]
    ends = tuple(
        f"{n}{part}.weight" for names in own for n in names for part in ("", ".base_layer")
    )
    rows = {shape[0] for name, shape in shapes.items() if name.endswith(ends)}
    # LoRA's own matrix for an embedding table has one column per token.
    columns = tuple(f"{n}.lora_embedding_A" for n in own[0])
    rows |= {shape[1] for name, shape in shapes.items() if columns and name.endswith(columns)}
    if rows and rows != {tables[0].weight.shape[0]}:
        base.resize_token_embeddings(max(rows), mean_resizing=False)
    return ends


def _untie_adapted(model: PeftModel) -> None:
    """Copies the weights that adapted layers share with other layers.

    Otherwise, merging would also change the other layers. If only one of two tied embeddings has
    LoRA, they are saved as two tables, and PEFT sets `tie_word_embeddings` to false.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base: Any = layer.get_base_layer()
        for name, weight in list(base.named_parameters(recurse=False)):
            if holders[id(weight)] > 1:
                own = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
                setattr(base, name, own)


def base_weights(
    model: torch.nn.Module, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Returns the weights of a model without its adapters, under the names of the plain model.

    Args:
        state: the model's state, if it is not `model.state_dict()`.
    """
    # model.layers.0.q_proj.base_layer.weight      -> model.layers.0.q_proj.weight
    # model.layers.0.q_proj.lora_A.default.weight  -> (left out)
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside = r"(?:(?:token_adapter\.)?base_layer|original_module)\."
    adapted = [re.escape(n) for n, module in model.named_modules() if isinstance(module, kinds)]
    own = re.compile(rf"(?:{'|'.join(adapted)})\.(?!{inside})" if adapted else "(?!)")
    return {
        re.sub(rf"(?<=\.){inside}", "", name): tensor
        for name, tensor in (model.state_dict() if state is None else state).items()
        if not own.match(name)
    }


def check_mergeable(model: PeftModel) -> None:
    """Raises `ModelError` if PEFT cannot merge the active adapter into its base."""
    config: Any = model.active_peft_config
    reason = "its virtual tokens cannot become base weights" if config.is_prompt_learning else ""
    if getattr(config, "lora_bias", False):
        without = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
            and getattr(layer.get_base_layer(), "bias", 0) is None
        ]
        reason = f"lora_bias needs a bias, and {without[0]} has none" if without else ""
    if reason:
        raise ModelError(f"this adapter cannot be merged: {reason}")


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merges the active adapter into its base. Plain models are returned unchanged.

    PEFT disables the gradients of the base weights, and this function enables them again.

    Raises:
        ModelError: PEFT cannot merge this kind of adapter.
    """
    if not isinstance(model, PeftModel):
        return model
    check_mergeable(model)
    _untie_adapted(model)
    plain = model.merge_and_unload()
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


# -- identity --------------------------------------------------------------------------------------

# The files that a model is loaded from. Outputs of commands may lie next to them.
_FILES = (
    *("*.safetensors", "*.bin", "*.jinja", "*.model", "*config.json", "*token*.json"),
    *("vocab.json", "*.index.json", "chat_template.json", "judge.json"),
)
_SLICES, _SLICE_BYTES = 64, 65536


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """Returns a hash that identifies the weights in a folder, or the commit of a model on the Hub.

    The hash covers each file's name and size, and about 64 evenly spaced slices of its contents.
    Training changes every slice, and reading a large model completely would take minutes.
    """
    folder = Path(model)
    if not folder.is_dir():
        adapter = adapter_config(model, revision)
        file = repository_file(model, "adapter_config.json" if adapter else "config.json", revision)
        if file is None:
            return None
        commit = file.parent.name  # the cache keeps one folder per commit
        base = adapter and fingerprint(str(adapter.base_model_name_or_path), adapter.revision)
        return short_hash(commit.encode(), str(base).encode()) if base else commit
    parts: list[bytes] = []
    found = {f for pattern in _FILES for f in folder.glob(pattern)}
    for file in sorted(found - {folder / "training_args.bin"}):
        size = file.stat().st_size
        parts += [file.name.encode(), str(size).encode()]
        step = max(_SLICE_BYTES, size // _SLICES)
        with file.open("rb") as reader:
            for start in range(0, size, step):
                reader.seek(start)
                parts.append(reader.read(_SLICE_BYTES))
    if config := adapter_config(folder):
        base = fingerprint(str(config.base_model_name_or_path), config.revision)
        parts.append(str(base).encode())
    return short_hash(*parts)


def short_hash(*parts: bytes) -> str:
    """Returns a hash of texts, in which their boundaries count."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()

"""Creates the frozen reference, which is also the judge, and checks that it does not change."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import use_adapter

from self_judge.adapters import adapter_chain
from self_judge.errors import CheckpointError, ModelError
from self_judge.models import load_model
from self_judge.packing.exactness import IN_LESS, as_called, relative_difference, trial_tokens
from self_judge.runtime import device_of, in_evaluation_mode, unwrapped
from self_judge.storage.atomic import loads, write_json
from self_judge.storage.repository import refuse_overwriting
from self_judge.training.identity.shards import is_fsdp, is_sharded, largest, reshard, shard

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

FILE = "reference.json"
_TOKENS = 24
# Tolerances relative to the largest logit. If the reference uses trained weights, its logits change
# by more. A different device or summation order changes them by less (see `exactness`).
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


def frozen_reference(model: ModelT) -> ModelT:
    """Returns a frozen copy of the current model in evaluation mode.

    The weights are copied in memory, not loaded from disk. The copy therefore includes merged
    adapters and edited weights.
    """
    reference = copy.deepcopy(model)
    # An earlier trainer may have replaced `forward` with a closure over the original model, as
    # TRL's fused head does. A copy of this closure would use the trained weights.
    inner: Any = unwrapped(reference)
    forward = inner.__dict__.get("forward")
    by_a_trainer = getattr(forward, "__wrapped__", None) is type(inner).forward
    if by_a_trainer or "_original_forward" in inner.__dict__:
        for name in ("forward", "_original_forward"):
            inner.__dict__.pop(name, None)
    reference.requires_grad_(False)
    return reference.eval()


def reference_in_memory(model: Any, args: TrainingArguments) -> Any:
    """Returns a frozen copy of the model, or `None` under ZeRO-3, where TRL loads the reference.

    Raises:
        ValueError: ZeRO-3 is enabled, but the model has no name by which TRL could load it.
    """
    if is_deepspeed_zero3_enabled():  # sharded parameters cannot be copied
        name = model.config.name_or_path
        if not name:
            raise ValueError(
                "ZeRO-3 loads the judge by the model's name, but this model has no name: pass a "
                "ref_model, or pass the model as a folder"
            )
        logger.warning("ZeRO-3: loading the judge from %s instead of copying the model", name)
        return None
    return frozen_reference(model)


def place(model: Any, args: TrainingArguments) -> None:
    """Moves a model to its training device, so that the model is copied on that device.

    FSDP and DeepSpeed place sharded models themselves. Models with a device map or 4-bit weights
    are already on their devices.
    """
    placed = any(getattr(model, name, None) for name in ("hf_device_map", "quantization_method"))
    if args.place_model_on_device is not False and not placed and not is_sharded(args):
        model.to(args.device)


def own_models(name: str, revision: str | None = None) -> list[Path]:
    """Returns the folders of the model and its base models, to which a run must not write."""
    chain = adapter_chain(name, revision)
    models = [Path(chain.base), *(Path(adapter.name) for adapter in chain.adapters)]
    # A run in the parent folder of a checkpoint would replace the checkpoints of an earlier run.
    models += [m.parent for m in models if m.name.startswith(PREFIX_CHECKPOINT_DIR)]
    return [m for m in models if m.exists()]


def load_by_name(
    name: str, config: Any, quantization_config: Any = None, *, merge: bool
) -> PreTrainedModel | PeftModel:
    """Loads a model as TRL's trainer does: with `model_init_kwargs`, in float32 by default."""
    options = {"dtype": "float32", **(config.model_init_kwargs or {})}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    refuse_overwriting([config.output_dir], own_models(name, options.get("revision")))
    return load_model(name, merge=merge, **options)


@contextmanager
def active_reference(trainer: Any) -> Iterator[None]:
    """Activates the judge's weights, as TRL does for the reference of a `PeftModel`."""
    if trainer.ref_model is not None:
        yield
        return
    inner = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
        yield


# -- checks that the reference does not change -----------------------------------------------------


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Computes the logits `(T, V)` for a fixed sequence without autocast, in float32 on the CPU."""
    device = device_of(unwrapped(model))
    ids = torch.tensor([trial_tokens(model, _TOKENS)], device=device)
    # Accelerate wraps the `forward` of a prepared model in autocast.
    plain = None if is_fsdp(model) else getattr(as_called(model), "_original_forward", None)
    forward = plain or model
    with in_evaluation_mode(model), torch.autocast(device.type, enabled=False):
        return forward(input_ids=ids, use_cache=False).logits[0].float().cpu()


def given_logits(model: Any, ref_model: Any, args: TrainingArguments) -> torch.Tensor | None:
    """Computes the logits that the reference must reproduce, or returns `None` for a sharded model.

    This function moves the models to the training device. FSDP and DeepSpeed do that themselves,
    and a sharded model cannot be run before (see `start_logits`).

    Args:
        model: the model that was passed to the trainer.
        ref_model: the reference that was passed to the trainer, if any.
    """
    if is_sharded(args):
        return None
    place(model, args)
    if ref_model is not None:
        place(ref_model, args)
    return probe_logits(model if ref_model is None else ref_model)


def start_logits(trainer: Any, *, other: bool) -> torch.Tensor:
    """Computes the logits that the reference of a sharded model must reproduce.

    At the start, the policy is the given model: a new adapter changes nothing, and TRL copies a
    given adapter. In three cases, the policy starts as another model, and the reference is only
    compared with itself, later: after resuming, with a `ref_model`, and with an adapter that is
    drawn at random.

    Args:
        other: whether the run is resumed, or the reference was passed to the trainer.
    """
    inner: Any = as_called(trainer.model)
    config: Any = inner.active_peft_config if isinstance(inner, PeftModel) else None
    start = getattr(config, "init_lora_weights", getattr(config, "init_weights", True))
    drawn = config is not None and (config.is_prompt_learning or start in (False, "orthogonal"))
    continued = config is not None and "ref" in inner.peft_config
    if other or (drawn and not continued):
        return reference_logits(trainer)
    return probe_logits(trainer.model)


def _usual(logits: torch.Tensor) -> torch.Tensor:
    return logits.isfinite() & (logits.abs() < 1e30)


def reference_logits(trainer: Any) -> torch.Tensor:
    with active_reference(trainer):
        return probe_logits(trainer.model if trainer.ref_model is None else trainer.ref_model)


class ReferenceCheck:
    """Compares the reference's logits on a fixed sequence with those of the given model.

    Args:
        given: the logits of the model that was passed to the trainer (see `given_logits`).
        model: the trained model.
        logits: a function that computes the current logits of the reference, or `None` if training
            is allowed to change them.
        rounds: whether the models compute in less than float32, whatever their weights are.
    """

    def __init__(
        self,
        given: torch.Tensor,
        model: torch.nn.Module,
        logits: Callable[[], torch.Tensor] | None = None,
        *,
        rounds: bool = False,
    ) -> None:
        self.expected = given
        self.model = model
        self.logits = logits
        inner: Any = unwrapped(model)
        self.tolerance = IN_LESS if rounds else _TOLERANCE.get(inner.dtype, IN_LESS)

    def moved(self, logits: torch.Tensor) -> float | None:
        """Returns the difference relative to the largest logit, or `None` if it is tolerated."""
        off = self._difference(logits)
        return None if off <= self.tolerance else off

    def _difference(self, logits: torch.Tensor) -> float:
        # Masked logits are infinite or have huge magnitudes. Both models must mask the same tokens.
        usual, own = _usual(self.expected), _usual(logits)
        if not torch.equal(usual, own):
            return math.inf
        return relative_difference(logits[own], self.expected[own])

    def _moved_anywhere(self) -> float | None:
        """Returns what `moved` does for the current logits, and the same in all processes."""
        if self.logits is None:
            return None
        off = largest(self._difference(self.logits()))
        return None if off <= self.tolerance else off

    def before_training(self) -> None:
        """Checks that the reference equals the given model and does not use trained weights.

        Raises:
            ModelError: the reference differs from the given model or uses trained weights. In the
                latter case, the message names one of them.
        """
        if self.logits is None:
            return
        start = self.logits()
        off = largest(self._difference(start))
        if not off <= self.tolerance:
            raise ModelError(
                "the reference differs from the initial model: the relative difference of their "
                f"logits is {off:.1e}. Pass the initial model as ref_model, or a peft_config whose "
                "adapter can be disabled"
            )
        self.expected = start
        reshard(self.model)  # only then do the names lead to the shards
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if not self._follows(trained):
            return
        used = next(filter(self._follows, _by_kind(trained)), trained)
        # FSDP and gradient checkpointing insert the names of their wrappers.
        name = re.sub(r"_(fsdp|checkpoint)_wrapped_module\.", "", used[0][0])
        raise ModelError(
            f"the judge would change during training: it uses {name}, which is "
            "trained. Set peft_config.bias: none, choose an adapter that can be disabled, or train "
            "without peft_config"
        )

    def _follows(self, named: Sequence[tuple[str, torch.nn.Parameter]]) -> bool:
        with _changed(self.model, [p for _, p in named]):
            return self._moved_anywhere() is not None

    def check(self, step: int) -> None:
        """Raises `ModelError` if the reference has changed since training began."""
        off = self._moved_anywhere()
        if off is not None:
            raise ModelError(
                f"step {step}: the judge has changed during training: the relative difference of "
                f"its logits is {off:.1e}, so nothing is saved"
            )

    def save(self, folder: Path) -> None:
        """Writes a sample of the logits for comparison when the run resumes."""
        write_json(folder / FILE, {"logits": self._sample(), "tolerance": self.tolerance})

    def check_saved(self, checkpoint: Path) -> None:
        """Raises `CheckpointError` if a checkpoint comes from a different initial model."""
        path = checkpoint / FILE
        if not path.is_file():
            return
        content = loads(path.read_bytes())
        saved = torch.tensor(content["logits"])
        # This run may use a different dtype than the run that saved the checkpoint.
        tolerance = max(self.tolerance, content["tolerance"])
        if not relative_difference(torch.tensor(self._sample()), saved) <= tolerance:
            raise CheckpointError(
                f"cannot resume from {checkpoint}: the weights of the initial model have "
                "changed since it was saved. Restore them, or use another output_dir"
            )

    def _sample(self) -> list[float]:
        row = torch.where(_usual(self.expected), self.expected, 0.0)[-1]
        return [float(x) for x in row[:: max(1, len(row) // 64)]]


def _by_kind(
    named: Sequence[tuple[str, torch.nn.Parameter]],
) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """Groups parameters by the last parts of their names, mostly without layer numbers."""
    groups: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in named:
        groups.setdefault(".".join(name.split(".")[-3:]), []).append((name, parameter))
    return list(groups.values())


@contextmanager
def _changed(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Changes all values within the `with` block and restores the exact values afterwards."""
    reshard(model)
    _flip(parameters)
    try:
        yield
    finally:
        reshard(model)
        _flip(parameters)


def _flip(parameters: Sequence[torch.nn.Parameter]) -> None:
    # Flipping a bit twice restores it, so no copy of the weights is needed. Float32 examples:
    #   0.0 -> 0.0625       -0.03 -> 3.5e-39       5.0 -> 3.7e+37
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for parameter in parameters:
        if parameter.is_floating_point() and parameter.element_size() in bits:
            values = shard(parameter)
            pattern = torch.tensor(0.0625, dtype=values.dtype, device=values.device)
            kind = bits[values.element_size()]
            values.view(kind).bitwise_xor_(pattern.view(kind))


@contextmanager
def perturbed(model: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Adds noise within the `with` block and restores the exact values afterwards.

    Unlike the values of `_changed`, these values have usual magnitudes. They need a copy.
    """
    reshard(model)
    shards = [shard(parameter) for parameter in parameters]
    kept = [values.clone() for values in shards]
    try:
        for seed, (values, before) in enumerate(zip(shards, kept, strict=True)):
            generator = torch.Generator(values.device).manual_seed(seed)
            noise = torch.empty_like(before, dtype=torch.float32).normal_(generator=generator)
            size = before.float().square().mean().sqrt().item() / 10 or 0.02
            values.add_((size * noise).to(values.dtype))
        yield
    finally:
        reshard(model)
        for values, before in zip(shards, kept, strict=True):
            values.copy_(before)

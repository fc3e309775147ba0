"""Loads, merges and saves models, and creates the frozen reference.

This module handles files and weights. It does not depend on data, prompts or the trainers.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from self_judge.errors import ModelError, _lines, in_a_line, is_missing
from self_judge.runtime import own_device, unwrapped

logger = logging.getLogger(__name__)


ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer. If it has no padding token, it pads with the EOS token.

    Padding with EOS is safe, because loss masks are built together with the ids and not by
    searching for a token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = why(name_or_path, error)
        raise ModelError(f"cannot load a tokenizer from {name_or_path}: {reason}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {name_or_path} has neither a padding nor an end-of-sequence "
                "token: set tokenizer.eos_token and save it again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = True,
    load_in_4bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    use_bnb_nested_quant: bool = False,
    **kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """Loads a causal language model, or an adapter together with its base model.

    Args:
        name_or_path: a Hub name or a folder; a folder with `adapter_config.json` is an adapter.
        device: device of the weights. `"auto"`, for sampling and judging, means `own_device()`.
            `None`, for training, keeps Transformers' default (the CPU, or the current GPU for 4-bit
            weights), and the trainer moves the weights.
        dtype: `"auto"`, `"float32"`, `"bfloat16"`, … or a `torch.dtype`.
        merge: whether to merge an adapter into its base and return a plain model. `False` returns a
            trainable `PeftModel`.
        load_in_4bit: whether to quantize linear layers to 4 bits with bitsandbytes. They compute in
            `dtype`, and `"auto"` then means bfloat16.
        bnb_4bit_quant_type, use_bnb_nested_quant: see `transformers.BitsAndBytesConfig`.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ModelError: there is no model with that name or path, its weights are pickled (loading them
            could run code), an adapter does not fit its base or would be merged into 4-bit weights,
            or bitsandbytes is needed but not installed.
    """
    refuse_pickle(name_or_path)
    if device == "auto":
        device = own_device()
    if load_in_4bit:
        dtype = torch.bfloat16 if dtype == "auto" else dtype
        kwargs["quantization_config"] = _four_bits(dtype, bnb_4bit_quant_type, use_bnb_nested_quant)
        if device is not None:
            kwargs["device_map"] = {"": device}  # quantize on the target device
    common: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        **kwargs,
    }
    path = Path(name_or_path)
    if not (path / "adapter_config.json").is_file():
        try:
            loaded = AutoModelForCausalLM.from_pretrained(str(name_or_path), **common)
        except (OSError, ValueError, SafetensorError) as error:
            reason = why(name_or_path, error)
            raise ModelError(f"cannot load a model from {name_or_path}: {reason}") from error
        if load_in_4bit:
            _keep_trainable(loaded)
        if device is not None and loaded.device != torch.device(device):
            loaded.to(torch.device(device))  # type: ignore[arg-type]
        return loaded
    if load_in_4bit and merge:
        raise ModelError(
            f"{path} is an adapter, and rounding would lose it in 4-bit weights: merge it first "
            "(load_model(folder).save_pretrained(another)) and load the merged model"
        )
    base_name = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base_name:
        raise ModelError(f"the adapter {path} does not name its base model in adapter_config.json")
    base = load_model(
        base_name,
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    try:
        # By default, PEFT loads the adapter onto the first GPU, even if the base is elsewhere.
        model = PeftModel.from_pretrained(
            base, str(path), is_trainable=not merge, torch_device=str(base.device)
        )
    except (RuntimeError, ValueError, SafetensorError) as error:
        # PyTorch lists every weight after a heading. The first one is enough.
        lines = _lines(error)
        raise ModelError(
            f"the adapter {path} does not fit its base {base_name}, or is damaged: "
            f"{lines[1] if len(lines) > 1 else in_a_line(error):.200}"
        ) from error
    return merged(model) if merge else model


def _four_bits(dtype: str | torch.dtype, kind: str, nested: bool) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "load_in_4bit needs bitsandbytes, which is not installed: run pip install "
            "'self-judge[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        bnb_4bit_use_double_quant=nested,
    )


def _keep_trainable(model: torch.nn.Module) -> None:
    """Disables a CPU weight layout of bitsandbytes that blocks gradients.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode permanently converts a
    layer's weights to this layout. Later training would silently train only the layers above it.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


_CONVERT_MODEL = (
    "from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained({folder!r}, use_safetensors=False).save_pretrained({folder!r})"
)
_CONVERT_ADAPTER = (
    "import torch; from safetensors.torch import save_file; "
    "save_file(torch.load({folder!r} + '/adapter_model.bin', weights_only=True), "
    "{folder!r} + '/adapter_model.safetensors')"
)


def refuse_pickle(name_or_path: str | os.PathLike[str]) -> None:
    """Raises `ModelError` if a folder's weights are pickled, since loading a pickle can run code.

    Pickles next to safetensors files are harmless, because only the safetensors files are loaded.
    """
    path = Path(name_or_path)
    adapter = (path / "adapter_config.json").is_file()
    safe = "adapter_model*.safetensors" if adapter else "*.safetensors"
    unsafe = ("adapter_model*.bin",) if adapter else ("*.bin", "*.pt", "*.pth", "*.ckpt")
    named = None if adapter else _weights_named_in_config(path)
    if named is None and any(path.glob(safe)):
        return
    # Training arguments and optimizer state are also pickled, but they are not weights.
    beside = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
    found = [f.name for p in unsafe for f in sorted(path.glob(p)) if f.name not in beside]
    if named is not None or found:
        convert = (_CONVERT_ADAPTER if adapter else _CONVERT_MODEL).format(folder=str(path))
        raise ModelError(
            f"{path} has pickled weights ({named or found[0]}), and loading a pickle can run code: "
            "only safetensors files are loaded. If you trust the source, convert it: "
            f"python -c {shlex.quote(convert)}"
        )


def _weights_named_in_config(path: Path) -> str | None:
    """Returns the weights file that a model's configuration names, unless it is safetensors."""
    try:
        named = json.loads((path / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    safe = (".safetensors", ".safetensors.index.json")
    return str(named) if named and not str(named).endswith(safe) else None


def apply_umask(directory: str | os.PathLike[str]) -> None:
    """Gives the safetensors files in a folder the permissions of a normal new file.

    The safetensors library ignores the umask and makes files readable only by their owner. Other
    users, and servers that run as another user, could then not read the model.
    """
    folder = Path(directory)
    files = list(folder.glob("*.safetensors"))
    if os.name == "nt" or not files:
        return
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        (new := Path(temporary) / "file").touch()
        usual = new.stat().st_mode & 0o777
    for file in files:
        file.chmod(usual)


def merged_in_full(model: PeftModel) -> PreTrainedModel:
    """Like `merged`, but first reloads a 4-bit base from disk without quantization."""
    base: Any = unwrapped(model)
    if getattr(base, "quantization_method", None) is None:
        return merged(model)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        return load_model(adapter, dtype=base.dtype)  # type: ignore[return-value]


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merges the active adapter into its base. Plain models are returned unchanged.

    PEFT disables the gradients of the base weights, and this function enables them again.
    """
    if not isinstance(model, PeftModel):
        return model
    plain = model.merge_and_unload()
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def frozen_reference(model: ModelT) -> ModelT:
    """Returns a copy of the current model, in evaluation mode and without gradients.

    The weights are copied from memory and not from disk, so the copy includes merged adapters and
    edited weights.
    """
    reference = copy.deepcopy(model)
    reference.requires_grad_(False)
    return reference.eval()


def check_vocabulary(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` if the model lacks embeddings for some of the tokenizer's ids."""
    # An adapter may wrap the embeddings.
    embeddings: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in embeddings.modules() if isinstance(m, torch.nn.Embedding)]
    if not tables:
        return  # a custom embedding has no standard way to get its size
    size = tables[0].num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, but the model has only {size} "
            "embeddings: use the model's own tokenizer, or call model.resize_token_embeddings"
        )


def clamp_to_context(config: PreTrainedConfig, max_length: int | None) -> int | None:
    """Limits `max_length` to the model's number of positions, with a warning.

    Beyond that number, learned position embeddings fail and rotary ones are untrained.

    Args:
        config: the model's configuration.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None or context is None or max_length <= context:
        return max_length
    logger.warning(
        "max_length %d exceeds the model's %d positions: using %d",
        max_length,
        context,
        context,
    )
    return int(context)


def why(name_or_path: str | os.PathLike[str], error: BaseException) -> str:
    """Returns in one line the reason why loading a model failed.

    It says if a local path does not exist, because the libraries would treat the path as a Hub name
    and complain about its format.
    """
    return "there is no such folder" if is_missing(name_or_path) else in_a_line(error)


def reference_in_memory(model: Any, args: TrainingArguments) -> Any:
    """Returns a frozen copy of the model to use as judge and reference.

    Under ZeRO-3, it returns `None`, and TRL loads the reference from disk.

    Raises:
        ValueError: the model has no name, which ZeRO-3 needs to load it.
    """
    if is_deepspeed_zero3_enabled():  # sharded parameters cannot be copied
        name = model.config.name_or_path
        if not name:
            raise ValueError(
                "ZeRO-3 loads the judge by the model's name, but this model has no name: pass "
                "ref_model, or pass the model's folder as model"
            )
        logger.warning("ZeRO-3: loading the judge from %s instead of copying the model", name)
        return None
    _place(model, args)
    return frozen_reference(model)


def _place(model: Any, args: TrainingArguments) -> None:
    """Moves a model to its training device, so that it is copied there and not in host memory.

    FSDP and DeepSpeed place sharded models. Models with a device map or with 4-bit weights are
    already placed.
    """
    launched = (os.environ.get(f"ACCELERATE_USE_{kind}", "") for kind in ("FSDP", "DEEPSPEED"))
    sharded = args.fsdp or args.deepspeed or any(a.lower() in ("1", "true") for a in launched)
    placed = sharded or any(
        getattr(model, name, None) for name in ("hf_device_map", "quantization_method")
    )
    if args.place_model_on_device is not False and not placed:
        model.to(args.device)

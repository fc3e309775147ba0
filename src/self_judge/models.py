"""Loads models and tokenizers, and rejects models whose files are incomplete or pickled.

This module handles files and weights. It does not depend on data, prompts or the trainers.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from self_judge.adapters import (
    adapter_chain,
    adapter_config,
    base_weights,
    listed,
    merged,
    with_adapter,
)
from self_judge.errors import ModelError, in_a_line, is_missing
from self_judge.runtime import own_device, unwrapped
from self_judge.storage.atomic import loads
from self_judge.storage.repository import not_on_hub, repository_file

logger = logging.getLogger(__name__)


_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
# Buffers that older versions of Transformers saved.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".position_ids", ".inv_freq")


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, and sets its padding token to the EOS token if it has none.

    An adapter without its own tokenizer uses the tokenizer of its base model.

    Padding with EOS is safe, because loss masks are built together with the ids instead of by
    searching for the padding token.
    """
    config = adapter_config(name_or_path, revision)
    if config and not repository_file(name_or_path, "tokenizer_config.json", revision):
        name_or_path, revision = str(config.base_model_name_or_path), config.revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_path), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged file can raise any error in the libraries
        reason = why(name_or_path, error)
        raise ModelError(f"cannot load a tokenizer from {name_or_path}: {reason}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer of {name_or_path} has neither a padding nor an end-of-sequence "
                "token: set tokenizer.eos_token and save the tokenizer"
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
        name_or_path: a model ID on the Hub or a folder. A folder or repository that contains
            `adapter_config.json` is loaded as an adapter.
        device: device of the weights. `"auto"`, for sampling and judging, means `own_device()`.
            `None`, for training, keeps Transformers' default (the CPU, or the current GPU for 4-bit
            weights), and the trainer moves the weights.
        dtype: `"auto"`, `"float32"`, `"bfloat16"`, … or a `torch.dtype`.
        merge: whether to merge an adapter into its base and return a plain model. If `False`, an
            adapter is returned as a trainable `PeftModel`.
        load_in_4bit: whether to quantize linear layers to 4 bits with bitsandbytes. These layers
            compute in `dtype`, and `"auto"` then means bfloat16.
        bnb_4bit_quant_type, use_bnb_nested_quant: see `transformers.BitsAndBytesConfig`.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ModelError: the model does not exist, its weights are missing, unexpected or pickled
            (loading a pickle could run code), an adapter does not fit its base or would be merged
            into 4-bit weights, or bitsandbytes is needed but not installed.
    """
    refuse_pickle(name_or_path)
    if device == "auto":
        device = own_device()
    if load_in_4bit:
        dtype = torch.bfloat16 if dtype == "auto" else dtype
        kwargs["quantization_config"] = _four_bits(dtype, bnb_4bit_quant_type, use_bnb_nested_quant)
        if device is not None:
            kwargs["device_map"] = {"": device}  # quantize on the target device
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r:.60}")
    common: dict[str, Any] = {
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
        **kwargs,
    }
    base_name, base_revision, adapters = adapter_chain(name_or_path, revision)
    refuse_pickle(base_name)
    if adapters and load_in_4bit and merge:
        raise ModelError(
            f"{name_or_path} is an adapter that would be rounded away in 4-bit weights: merge it "
            "first (load_model(folder).save_pretrained(another)) and load the merged model"
        )
    model = _load_base(base_name, {**common, "revision": base_revision})
    if load_in_4bit:
        _keep_trainable(model)
    if device is not None and model.device != torch.device(device):
        model.to(torch.device(device))  # type: ignore[arg-type]
    for adapter in adapters if merge else adapters[:-1]:
        model = merged(with_adapter(model, adapter, trainable=False))
        # A new adapter on this model names this adapter's folder as its base. Loading that folder
        # merges this adapter again.
        model.name_or_path = model.config._name_or_path = adapter.name
    return with_adapter(model, adapters[-1], trainable=True) if adapters and not merge else model


def _load_base(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Loads a plain model, and raises an error if its weights are missing or unexpected.

    Transformers only warns about missing weights and initializes them randomly.
    """
    loaded: Any
    _refuse_two_models(Path(name))
    # Weights of other shapes would otherwise be an error that does not name them.
    options = {"ignore_mismatched_sizes": True, **options, "output_loading_info": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # a damaged file can raise any error in the libraries
        if should_reduce_batch_size(error):
            raise
        raise ModelError(f"cannot load a model from {name}: {why(name, error)}") from error
    model, report = loaded
    for what, names in _differing(report):
        raise ModelError(
            f"the model {name} {what} weights: {listed(names)}. Its files are incomplete, or "
            "do not match its config.json"
        )
    return model


def _differing(report: Mapping[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """Yields the missing, unexpected and mismatched weights in a report of Transformers."""
    other = {key for key, *_ in report["mismatched_keys"]}
    missing = {*report["missing_keys"]} - other
    surplus = {key for key in report["unexpected_keys"] if not key.endswith(_BUFFERS)}
    found = (("lacks", missing), ("has unexpected", surplus), ("has other shapes of", other))
    for what, names in found:
        if names:
            yield what, names


def _refuse_two_models(folder: Path) -> None:
    """Raises `ModelError` for a folder with weights in one file and, of another save, in shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not (single.is_file() and index.is_file()):
        return
    try:
        shards = {*loads(index.read_bytes())["weight_map"].values()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return  # the index is not used
    if single.name not in shards and all((folder / shard).is_file() for shard in shards):
        raise ModelError(
            f"{folder} has two sets of weights, {single.name} and {len(shards)} shards with "
            f"{index.name}: remove the older one"
        )


def built_again(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model that a model's configuration and weights give, without its adapters.

    Both share the weights, except for those that loading would convert to the model's dtype.

    Raises:
        ModelError: the configuration does not describe the weights, or not which are tied.
    """
    told = "the model in memory does not match its configuration, so it could not be loaded again"
    loaded: Any
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=base_weights(model),
            dtype=model.dtype,
            ignore_mismatched_sizes=True,
            device_map=None if model.device.type == "cpu" else {"": model.device},
            output_loading_info=True,
        )
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        raise ModelError(f"{told}: {in_a_line(error)}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    built, report = loaded
    for what, names in _differing(report):
        raise ModelError(f"{told}: it {what} weights: {listed(names)}")
    holders: dict[int, str] = {}
    for name, parameter in built.named_parameters():
        other = holders.setdefault(parameter.data_ptr(), name)
        if other != name and parameter.numel():
            raise ModelError(f"{told}: {other} and {name} are the same weights in memory alone")
    return built


def check_files(name_or_path: str | os.PathLike[str]) -> None:
    """Raises `ModelError` if a model's folder lacks weights or contains unexpected weights.

    This function reads only names and shapes. Models on the Hub are checked when they are loaded.
    """
    base, _, _ = adapter_chain(name_or_path)
    if any(Path(base).glob("*.safetensors")):
        _load_base(base, {"device_map": "meta"})


def _four_bits(dtype: str | torch.dtype, kind: str, nested: bool) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "load_in_4bit requires bitsandbytes, which is not installed: run pip install "
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
    layer's weights to this layout. Later training would silently train only the layers above that
    layer.
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
            "only safetensors files are loaded. If you trust the source, convert the weights: "
            f"python -c {shlex.quote(convert)}"
        )


def _weights_named_in_config(path: Path) -> str | None:
    """Returns the weights file named in a config.json, unless it is a safetensors file."""
    try:
        named = loads((path / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    safe = (".safetensors", ".safetensors.index.json")
    return str(named) if named and not str(named).endswith(safe) else None


def apply_umask(directory: str | os.PathLike[str]) -> None:
    """Sets the default file permissions on the safetensors files in a folder.

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
    """Merges like `merged`, but first reloads a 4-bit base from disk without quantization."""
    base: Any = unwrapped(model)
    if getattr(base, "quantization_method", None) is None:
        return merged(model)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        return load_model(adapter, dtype=base.dtype)  # type: ignore[return-value]


def check_vocabulary(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` if the model lacks embeddings for some of the tokenizer's ids."""
    # An adapter may wrap the embeddings.
    embeddings: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in embeddings.modules() if isinstance(m, torch.nn.Embedding)]
    if not tables:
        return  # there is no standard way to get the size of a custom embedding
    size = tables[0].num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, but the model has only {size} "
            "embeddings: use the model's own tokenizer, or call model.resize_token_embeddings"
        )


def clamp_to_context(config: PreTrainedConfig, max_length: int | None) -> int | None:
    """Limits `max_length` to the model's number of positions, and logs a warning if it was larger.

    Beyond this limit, learned position embeddings fail, and a model with rotary embeddings has not
    been trained.

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
    """Returns a one-line reason for a failure to load a model.

    If a local path does not exist, the reason says so, because the libraries would treat the path
    as a model ID on the Hub and complain about its format.
    """
    if is_missing(name_or_path):
        return "there is no such folder"
    absent = not_on_hub(name_or_path)
    return f"it {absent}" if absent else in_a_line(error)

"""Loads, merges and saves models, and creates the frozen reference.

This module handles files and weights. It does not depend on data, prompts or the trainers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from self_judge.errors import ModelError, _lines, in_a_line, is_missing
from self_judge.runtime import own_device, unwrapped
from self_judge.storage.repository import repository_file, same_path

logger = logging.getLogger(__name__)


ModelT = TypeVar("ModelT", bound=torch.nn.Module)


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer. If it has no padding token, it pads with the EOS token.

    An adapter without its own tokenizer uses the tokenizer of its base model.

    Padding with EOS is safe, because loss masks are built together with the ids and not by
    searching for a token.
    """
    config = adapter_config(name_or_path, revision)
    if config and not repository_file(name_or_path, "tokenizer_config.json", revision):
        name_or_path, revision = str(config.base_model_name_or_path), config.revision
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
        name_or_path: a Hub name or a folder. With an `adapter_config.json`, it is an adapter.
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
        ModelError: the model does not exist, its weights are missing, surplus or pickled (loading
            a pickle could run code), an adapter does not fit its base or would be merged into 4-bit
            weights, or bitsandbytes is needed but not installed.
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
    base_name, base_revision, adapters = adapter_chain(name_or_path, revision)
    if adapters and load_in_4bit and merge:
        raise ModelError(
            f"{name_or_path} is an adapter, and rounding would lose it in 4-bit weights: merge it "
            "first (load_model(folder).save_pretrained(another)) and load the merged model"
        )
    model = _load_base(base_name, {**common, "revision": base_revision})
    if load_in_4bit:
        _keep_trainable(model)
    if device is not None and model.device != torch.device(device):
        model.to(torch.device(device))  # type: ignore[arg-type]
    for adapter in adapters[:-1]:
        model = merged(_with_adapter(model, adapter, trainable=False))
    if not adapters:
        return model
    adapted = _with_adapter(model, adapters[-1], trainable=not merge)
    return merged(adapted) if merge else adapted


class Adapter(NamedTuple):
    name: str
    revision: str | None
    base: str


def adapter_config(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> PeftConfig | None:
    """Returns an adapter's configuration, from a folder or the Hub; `None` for a plain model.

    Raises:
        ModelError: the file cannot be read, or it does not name the base model.
    """
    file = repository_file(name_or_path, "adapter_config.json", revision)
    if file is None:
        return None
    try:
        config = PeftConfig.from_pretrained(str(file.parent))
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(f"{name_or_path} is no valid PEFT adapter: {in_a_line(error)}") from error
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
    """Follows the base models of adapters down to the plain model."""
    # An adapter on an adapter: outputs/self_judge -> outputs/jsft -> meta-llama/Llama-2-7b-hf
    name = str(name_or_path)
    adapters: list[Adapter] = []
    while (config := adapter_config(name, revision)) is not None:
        base = str(config.base_model_name_or_path)
        adapters.append(Adapter(name, revision, base))
        if any(base == seen.name or same_path(base, seen.name) for seen in adapters):
            raise ModelError(
                f"the adapter {name} names {base} as its base, so it is an adapter on itself: the "
                "base model was overwritten, or adapter_config.json is wrong"
            )
        name, revision = base, config.revision
        refuse_pickle(name)
    return AdapterChain(name, revision, adapters[::-1])


def _load_base(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Loads a plain model, and raises an error if its files lack weights or have surplus ones.

    Transformers only warns about missing weights and initializes them randomly.
    """
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, **options, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if should_reduce_batch_size(error):
            raise
        raise ModelError(f"cannot load a model from {name}: {why(name, error)}") from error
    model, report = loaded
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has surplus")):
        names = sorted(report[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"the model {name} {what} weights: {', '.join(names[:3])}{more}. Its files are "
                "incomplete, or do not match its config.json"
            )
    return model


def check_files(name_or_path: str | os.PathLike[str]) -> None:
    """Raises `ModelError` if the model in a folder lacks weights or has surplus ones.

    It reads only names and shapes. Models on the Hub are checked when they are loaded.
    """
    base, _, _ = adapter_chain(name_or_path)
    if any(Path(base).glob("*.safetensors")):
        _load_base(base, {"device_map": "meta"})


def _with_adapter(base: PreTrainedModel, adapter: Adapter, *, trainable: bool) -> PeftModel:
    try:
        _resize_for(base, adapter)
        # By default, PEFT loads the adapter onto the first GPU, even if the base is elsewhere.
        return PeftModel.from_pretrained(
            base,
            adapter.name,
            revision=adapter.revision,
            is_trainable=trainable,
            torch_device=str(base.device),
        )
    except (RuntimeError, ValueError, SafetensorError) as error:
        # PyTorch lists every weight after a heading. The first one is enough.
        lines = _lines(error)
        raise ModelError(
            f"the adapter {adapter.name} does not fit its base {adapter.base}, or is damaged: "
            f"{lines[1] if len(lines) > 1 else in_a_line(error):.200}"
        ) from error


def _resize_for(base: PreTrainedModel, adapter: Adapter) -> None:
    """Resizes the embeddings of the base if the adapter was trained with added tokens."""
    file = repository_file(adapter.name, "adapter_model.safetensors", adapter.revision)
    if file is None:
        return
    with safe_open(file, "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    # An adapter stores resized tables in full. LoRA's matrix for a table has a column per token.
    tables: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    own = [name for name, module in base.named_modules() if any(module is t for t in tables)]
    ends = tuple(f"{name}{part}.weight" for name in own for part in ("", ".base_layer"))
    rows = {shape[0] for name, shape in shapes.items() if name.endswith(ends)}
    rows |= {shape[1] for name, shape in shapes.items() if name.endswith("lora_embedding_A")}
    if rows and rows != {tables[0].weight.shape[0]}:
        base.resize_token_embeddings(max(rows), mean_resizing=False)


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


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Merges the active adapter into its base. Plain models are returned unchanged.

    PEFT disables the gradients of the base weights, and this function enables them again.
    """
    if not isinstance(model, PeftModel):
        return model
    _untie_adapted(model)
    plain = model.merge_and_unload()
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


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

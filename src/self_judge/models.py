"""Models in and out: load, merge, save; the frozen reference.

It knows files and weights. It does not know data, prompts or training.
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
    """Loads a tokenizer; one without a padding token pads with its EOS.

    Padding with EOS is harmless here: loss masks come from how the ids were built, never from
    looking for a token.
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
    """Loads a causal language model, or an adapter together with the base it names.

    Args:
        name_or_path: a Hub name or a folder; a folder with `adapter_config.json` is an adapter.
        device: where the weights stand; `"auto"` is `own_device()`, for sampling and judging.
            `None` is for training: Transformers' own place (the CPU; weights in 4 bits on the
            current GPU), from where the trainer takes them.
        dtype: `"auto"`, `"float32"`, `"bfloat16"`, … or a `torch.dtype`.
        merge: put an adapter's weights into the base and return a plain model; `False` returns a
            trainable `PeftModel` to continue from.
        load_in_4bit: the weights of linear layers in 4 bits, by bitsandbytes; they compute in
            `dtype`, which is bfloat16 where it is `"auto"`.
        bnb_4bit_quant_type, use_bnb_nested_quant: see `transformers.BitsAndBytesConfig`.
        kwargs: passed on to `from_pretrained`.

    Raises:
        ModelError: there is no model at that name or path, its weights are pickled (which would
            run whatever they say), an adapter does not fit its base or is to be merged into one
            of 4 bits, or bitsandbytes is wanted and not there.
    """
    refuse_pickle(name_or_path)
    if device == "auto":
        device = own_device()
    if load_in_4bit:
        dtype = torch.bfloat16 if dtype == "auto" else dtype
        kwargs["quantization_config"] = _four_bits(dtype, bnb_4bit_quant_type, use_bnb_nested_quant)
        if device is not None:
            kwargs["device_map"] = {"": device}  # quantized where it stands, and not moved later
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
            f"{path} is an adapter, and adding it to weights of 4 bits would round it away: merge "
            "it first (load_model(folder).save_pretrained(another)), and load what comes of it"
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
        # PEFT alone would read the adapter onto the first GPU, whichever the base stands on.
        model = PeftModel.from_pretrained(
            base, str(path), is_trainable=not merge, torch_device=str(base.device)
        )
    except (RuntimeError, ValueError, SafetensorError) as error:
        # PyTorch lists every weight, of which one tells the story.
        told = _lines(error)
        raise ModelError(
            f"the adapter {path} does not fit its base {base_name}, or is damaged: "
            f"{told[1] if len(told) > 1 else in_a_line(error):.200}"
        ) from error
    return merged(model) if merge else model


def _four_bits(dtype: str | torch.dtype, kind: str, nested: bool) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "load_in_4bit needs bitsandbytes, which is not installed: pip install "
            "'self-judge[qlora]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        bnb_4bit_use_double_quant=nested,
    )


def _keep_trainable(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from a layout of weights that no gradient passes through, on some CPUs.

    Where they have AVX512-BF16 it turns a layer's weights into that layout, for good, at the first
    pass in evaluation mode; training afterwards would teach the layers above alone, in silence.
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
    """Raises `ModelError` for a folder whose weights are a pickle: reading one can run code.

    Beside safetensors files, which are then what is loaded, pickles do no harm.
    """
    path = Path(name_or_path)
    adapter = (path / "adapter_config.json").is_file()
    safe = "adapter_model*.safetensors" if adapter else "*.safetensors"
    unsafe = ("adapter_model*.bin",) if adapter else ("*.bin", "*.pt", "*.pth", "*.ckpt")
    named = None if adapter else _weights_named_in_config(path)
    if named is None and any(path.glob(safe)):
        return
    # A folder's own training arguments and optimizer are pickles that are not its weights.
    beside = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
    found = [f.name for p in unsafe for f in sorted(path.glob(p)) if f.name not in beside]
    if named is not None or found:
        convert = (_CONVERT_ADAPTER if adapter else _CONVERT_MODEL).format(folder=str(path))
        raise ModelError(
            f"{path} has its weights as a pickle ({named or found[0]}), and reading one can run "
            "code: only safetensors are loaded. If you trust where it comes from, convert it: "
            f"python -c {shlex.quote(convert)}"
        )


def _weights_named_in_config(path: Path) -> str | None:
    """A file other than safetensors that a model's configuration names for its weights."""
    try:
        named = json.loads((path / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None
    safe = (".safetensors", ".safetensors.index.json")
    return str(named) if named and not str(named).endswith(safe) else None


def apply_umask(directory: str | os.PathLike[str]) -> None:
    """Gives the safetensors files of a folder the permissions of any new file in it.

    Their library makes them for their owner alone, whatever the umask says; a colleague, or a
    server under another user, could not read the model.
    """
    folder = Path(directory)
    files = list(folder.glob("*.safetensors"))
    if os.name == "nt" or not files:
        return
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        (new := Path(aside) / "file").touch()
        usual = new.stat().st_mode & 0o777
    for file in files:
        file.chmod(usual)


def merged_in_full(model: PeftModel) -> PreTrainedModel:
    """`merged`; of a base in 4 bits, the base as it was saved, which is loaded once more."""
    base: Any = unwrapped(model)
    if getattr(base, "quantization_method", None) is None:
        return merged(model)
    with tempfile.TemporaryDirectory() as adapter:
        model.save_pretrained(adapter)
        return load_model(adapter, dtype=base.dtype)  # type: ignore[return-value]


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model with the active adapter's weights added to its own; plain models as is.

    Its weights take gradients again, which PEFT had switched off.
    """
    if not isinstance(model, PeftModel):
        return model
    plain = model.merge_and_unload()
    for parameter in plain.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return plain


def frozen_reference(model: ModelT) -> ModelT:
    """A copy of the model as it is now, in evaluation mode and without gradients.

    A copy of what is in memory, not of what its name leads to on disk: a merged adapter or an
    edited weight stays in it.
    """
    reference = copy.deepcopy(model)
    reference.requires_grad_(False)
    return reference.eval()


def check_vocabulary(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` when the tokenizer has ids that the model has no embedding for."""
    # An adapter on the embeddings wraps them.
    embeddings: torch.nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    tables = [m for m in embeddings.modules() if isinstance(m, torch.nn.Embedding)]
    if not tables:
        return  # another kind of embedding, whose size cannot be asked for in one way
    size = tables[0].num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ModelError(
            f"the tokenizer has token ids up to {largest}, the model has embeddings for "
            f"{size}: they do not belong together (or call model.resize_token_embeddings)"
        )


def clamp_to_context(config: PreTrainedConfig, max_length: int | None) -> int | None:
    """`max_length`, or the positions that the model was made for where these are fewer.

    Beyond them learned positions fail, and rotary ones give what nobody trained; a warning says so.

    Args:
        config: the model's.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None or context is None or max_length <= context:
        return max_length
    logger.warning(
        "max_length %d is more than the %d positions of the model: %d are used",
        max_length,
        context,
        context,
    )
    return int(context)


def why(name_or_path: str | os.PathLike[str], error: BaseException) -> str:
    """Why a model was not loaded, in a line.

    What is plainly a path and is not there is called so: the libraries beneath take it for a
    repository's name, and speak of its spelling.
    """
    return "there is no such folder" if is_missing(name_or_path) else in_a_line(error)


def reference_in_memory(model: Any, args: TrainingArguments) -> Any:
    """The judge and reference of a model in memory; `None` under ZeRO-3, where TRL loads it.

    Raises:
        ValueError: a model under ZeRO-3 that has no name to load it by.
    """
    if is_deepspeed_zero3_enabled():  # sharded parameters cannot be copied
        name = model.config.name_or_path
        if not name:
            raise ValueError(
                "under ZeRO-3 the judge is loaded by the model's name, and this model has none: "
                "pass a ref_model, or the folder of the model"
            )
        logger.warning("ZeRO-3: the judge is loaded from %s, not copied from memory", name)
        return None
    _place(model, args)
    return frozen_reference(model)


def _place(model: Any, args: TrainingArguments) -> None:
    """Moves a model to where it is trained, so that its copy is made there and not in host memory.

    Sharded models are placed by FSDP and DeepSpeed, others by their device map or in 4 bits.
    """
    asked = (os.environ.get(f"ACCELERATE_USE_{kind}", "") for kind in ("FSDP", "DEEPSPEED"))
    sharded = args.fsdp or args.deepspeed or any(a.lower() in ("1", "true") for a in asked)
    placed = sharded or any(
        getattr(model, name, None) for name in ("hf_device_map", "quantization_method")
    )
    if args.place_model_on_device is not False and not placed:
        model.to(args.device)

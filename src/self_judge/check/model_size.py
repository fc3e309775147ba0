"""Computes a model's size from its configuration: parameters, KV cache and saved activations.

No weights are loaded. The model is on the meta device, and a forward pass with fake tensors counts
the activations that autograd saves. This module does not depend on runs, machines or data.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from self_judge.adapters import adapter_chain
from self_judge.errors import ModelError
from self_judge.models import refuse_pickle, why
from self_judge.runtime import unwrapped

# Whether frozen linear layers are stored in 4 bits. With `nested`, their block scales are also
# quantized.
FourBits: TypeAlias = Literal["no", "plain", "nested"]


def empty_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Returns the model (for an adapter, its base model) on the meta device, without weights.

    Raises:
        ModelError: the name or path has no configuration for a causal language model, or its
            weights are stored in pickle files.
    """
    refuse_pickle(name_or_path)
    name_or_path, revision, _ = adapter_chain(name_or_path, revision)
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
        wanted = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
        model.tie_weights()  # moving the model to the meta device separated tied parameters
    except Exception as error:  # a damaged file can raise any error in the library
        raise ModelError(
            f"cannot read the model configuration of {name_or_path}: {why(name_or_path, error)}"
        ) from None
    return model


# The maximum number of parameters in a shallow model. Two CPU cores generate this many random
# numbers in half a second.
_SHALLOW = 300_000_000


def shallow_model(
    model: PreTrainedModel,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """Builds a model with one layer of each kind, at full width, with random weights.

    The shallow model can share prefixes in the same ways as the whole model, and building it takes
    a second.

    Args:
        model: the whole model, on any device. Only its configuration and dtype are used.

    Returns:
        The model in evaluation mode, or `None` if it would be too large or if its configuration
        does not allow fewer layers.
    """
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    if kinds:
        text.layer_types = kinds
    text.num_hidden_layers = max(1, len(kinds))
    text.vocab_size = min(512, text.vocab_size)
    text.pad_token_id = None
    asked: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": model.dtype}
    if attn_implementation:
        asked["attn_implementation"] = attn_implementation
    try:
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(config, **asked)
        if sum(p.numel() for p in empty.parameters()) > _SHALLOW:
            return None
        shallow: PreTrainedModel = AutoModelForCausalLM.from_config(config, **asked)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError):
        return None  # for example, the configuration has a list with an entry for every layer
    return shallow.eval()


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model.

    Attributes:
        parameters, trainable: the number of all parameters and of trained parameters, including the
            adapter. Tied parameters are counted once.
        weight_bytes, trainable_bytes: the sizes of these parameters in bytes.
        matrix: the number of parameters in the matrices that process a token, without the
            embeddings and the head.
        head: the number of parameters in the LM head.
        layers, hidden, vocabulary: values from the configuration.
        context: the model's context length, or `None`.
        cache_bytes: the number of bytes in the KV cache for each token of a sequence.
    """

    parameters: int
    trainable: int
    weight_bytes: int
    trainable_bytes: int
    matrix: int
    head: int
    layers: int
    hidden: int
    vocabulary: int
    context: int | None
    cache_bytes: int


# bitsandbytes stores half a byte per weight and a float32 scale per block of 64 weights. With
# nested quantization, a scale needs one byte.
_FOUR_BITS = {"plain": 0.5 + 4 / 64, "nested": 0.5 + 1 / 64}


def size_of(model: nn.Module, four_bits: FourBits = "no") -> Size:
    """Computes the size of a model on any device.

    In a mixture of experts, `matrix` counts only the experts that process a token.

    Args:
        four_bits: how the frozen linear layers, except the head, are stored; see `FourBits`.
    """
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    parameters = list(model.parameters())
    taken = [p for p in parameters if p.requires_grad]
    head = inner.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    skipped = tables | ({id(head.weight)} if head is not None else set())
    share = _expert_share(config)
    matrix = 0.0
    for name, p in model.named_parameters():
        if p.dim() >= 2 and id(p) not in skipped:
            matrix += p.numel() * (share if ".experts." in name else 1.0)
    heads = getattr(config, "num_attention_heads", 0) or 0
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    layers = int(config.num_hidden_layers)
    saved = 0
    if four_bits != "no":
        each = _FOUR_BITS[four_bits]
        layers_of = (
            m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head
        )
        saved = sum(
            round(w.numel() * (w.element_size() - each)) for w in layers_of if not w.requires_grad
        )
    return Size(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in taken),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters) - saved,
        trainable_bytes=sum(p.numel() * p.element_size() for p in taken),
        matrix=round(matrix),
        head=head.weight.numel() if head is not None else 0,
        layers=layers,
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        context=getattr(config, "max_position_embeddings", None),
        cache_bytes=layers * 2 * kv_heads * head_dim * inner.dtype.itemsize,
    )


def _expert_share(config: Any) -> float:
    """Returns the share of a layer's experts that process each token."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if used and experts else 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """The activations that autograd saves in one forward pass.

    Attributes:
        kept: bytes without gradient checkpointing.
        checkpoints: bytes with gradient checkpointing, which keeps the inputs of every layer.
        layer: bytes for one layer. Checkpointing recomputes one layer at a time.
        counted: whether the forward pass was traced. Otherwise the numbers use a rule of thumb: 34
            bytes per token, layer and unit of hidden size in half precision (Korthikanti et al.,
            2022).
    """

    kept: int
    checkpoints: int
    layer: int
    counted: bool


def kept_activations(model: nn.Module, rows: int, tokens: int, *, bf16: bool = False) -> Kept:
    """Traces a forward pass of the backbone on `rows` × `tokens` ids with a dense mask.

    Packing also uses such a mask.

    Args:
        model: the model on the meta device, with its adapter if there is one.
        bf16: whether to trace under autocast to bfloat16.
    """
    size = size_of(model)
    inner: Any = unwrapped(copy.deepcopy(model).train())
    half = bf16 or inner.dtype.itemsize == 2
    checkpoints = size.layers * rows * tokens * size.hidden * inner.dtype.itemsize
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            kept = _followed(inner.base_model, rows, tokens, inner.dtype, bf16)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        # The choice of experts depends on values, which fake tensors do not have.
        thumb = 34 * rows * tokens * size.hidden * size.layers * (1 if half else 2)
        return Kept(thumb, checkpoints, thumb // size.layers, counted=False)
    return Kept(kept, checkpoints, kept // size.layers, counted=True)


def _followed(backbone: nn.Module, rows: int, tokens: int, dtype: torch.dtype, bf16: bool) -> int:
    """Returns how many bytes besides the parameters a forward pass saves for its backward pass."""
    parameters = {
        name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
        for name, p in backbone.named_parameters()
    }
    own = {p.untyped_storage()._cdata for p in parameters.values()}
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage  # keep it, so that its address is not reused
        return tensor

    inputs = {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "attention_mask": torch.zeros(
            rows, 1, tokens, tokens, dtype=torch.bfloat16 if bf16 else dtype
        ),
        "use_cache": False,
    }
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        functional_call(backbone, parameters, (), inputs)
    return sum(storage.nbytes() for storage in seen.values())

"""The size of a model from its configuration alone: parameters, KV cache, saved activations.

No weights are loaded: the model is on the meta device, and a forward pass over fake tensors counts
the activations that autograd saves. It does not know runs, machines or data.
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

from self_judge.errors import ModelError
from self_judge.models import adapter_chain, refuse_pickle, why
from self_judge.runtime import unwrapped

# Whether frozen linear layers are stored in 4 bits; `nested`: their block scales are quantized too.
FourBits: TypeAlias = Literal["no", "plain", "nested"]


def empty_model(
    name_or_path: str,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model on the meta device: shapes without weights; for an adapter's folder, its base.

    Raises:
        ModelError: there is no configuration of a causal language model at that name or path, or
            its weights are a pickle.
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
        model.tie_weights()  # moving parameters to the meta device separated tied ones
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the model configuration of {name_or_path}: {why(name_or_path, error)}"
        ) from None
    return model


# The most parameters of a shallow model: half a second of random numbers on two cores.
_SHALLOW = 300_000_000


def shallow_model(
    model: PreTrainedModel,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | None:
    """A model with one layer of each kind, at full width, with random weights.

    It can share prefixes in the same ways as the whole model, and takes a second to make.

    Args:
        model: the whole model, on the meta device or not; only its configuration and dtype matter.

    Returns:
        The model in evaluation mode; `None` if it would be large, or if its configuration does not
        allow fewer layers.
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
        return None  # e.g. lists with an entry for every layer, or the model's own code
    return shallow.eval()


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model.

    Attributes:
        parameters, trainable: all and trained parameters, with the adapter; tied ones once.
        weight_bytes, trainable_bytes: their bytes.
        matrix: parameters that multiply every token, without embeddings and head.
        head: parameters of the LM head.
        layers, hidden, vocabulary: from the configuration.
        context: the model's context length, or `None`.
        cache_bytes: bytes of the KV cache per token of one sequence.
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


# bitsandbytes stores half a byte per weight, and a float32 scale per block of 64; nested, a scale
# takes one byte.
_FOUR_BITS = {"plain": 0.5 + 4 / 64, "nested": 0.5 + 1 / 64}


def size_of(model: nn.Module, four_bits: FourBits = "no") -> Size:
    """Counts a model, on the meta device or not; of experts, those that process a token.

    Args:
        four_bits: count the frozen linear layers, except the head, in 4 bits.
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
    """The share of a layer's experts that process one token."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if used and experts else 1.0


@dataclass(frozen=True, slots=True)
class Kept:
    """The activations that autograd saves in one forward pass.

    Attributes:
        kept: bytes without gradient checkpointing.
        checkpoints: bytes with gradient checkpointing, the inputs of every layer.
        layer: bytes of one layer; checkpointing recomputes one layer at a time.
        counted: whether the pass was traced; otherwise the numbers follow the rule of thumb of 34
            bytes per token, layer and unit of hidden size in half precision (Korthikanti et al.,
            2022).
    """

    kept: int
    checkpoints: int
    layer: int
    counted: bool


def kept_activations(model: nn.Module, rows: int, tokens: int, *, bf16: bool = False) -> Kept:
    """Traces a forward pass of the backbone over `(rows, tokens)` with a dense mask, as in packing.

    Args:
        model: an empty model, with its adapter.
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
        # Experts are chosen by values, and fake tensors have no values.
        thumb = 34 * rows * tokens * size.hidden * size.layers * (1 if half else 2)
        return Kept(thumb, checkpoints, thumb // size.layers, counted=False)
    return Kept(kept, checkpoints, kept // size.layers, counted=True)


def _followed(backbone: nn.Module, rows: int, tokens: int, dtype: torch.dtype, bf16: bool) -> int:
    """Bytes that a pass over fake tensors saves for its backward pass, without the parameters."""
    parameters = {
        name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
        for name, p in backbone.named_parameters()
    }
    own = {p.untyped_storage()._cdata for p in parameters.values()}
    seen: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage  # held, so that its address is not reused
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

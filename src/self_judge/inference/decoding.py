"""Decoding: a causal model generates tokens one at a time and computes each prompt only once.

This module handles ids, logits and KV caches. It does not depend on text, seeds or the sampling
method.
"""

# This example has the prompts `p q r` (one copy) and `s t` (two copies) and at most 3 new tokens.
# Each prompt is computed once (prefill). Its keys and values are copied to each of its rows, at the
# left of a buffer that is allocated once at full size:
#
#   after prefill        one token later      row 1 has stopped:   one token later
#   row 0  p q r . . .   p q r A . .          it leaves, and the   p q r A D .     row 0
#   row 1  _ s t . . .   _ s t B . .          rows below it move   _ s t C E .     row 2
#   row 2  _ s t . . .   _ s t C . .          up in place
#
# `_` is padding. The model uses a view of this buffer as its cache, and the view grows by one token
# at each step. Adding tokens or removing rows therefore does not allocate a second cache. `rows`
# maps each remaining row to its original number: [0 1 2], then [0 2].
#
# On CUDA, launching the kernels for a step one by one takes longer than running them. The view
# therefore keeps the same width for many steps, a mask hides the unused tokens, and a CUDA graph
# launches each step as a whole.

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from self_judge.inference.graphed_step import GraphedStep
from self_judge.inference.prompt_cache import PromptLayer, empty_cache, joined, keeps_all_tokens
from self_judge.packing.exactness import (
    as_called,
    padded_logits,
    trial_tokens,
    warn_once,
    why_inexact,
)
from self_judge.packing.passes import attention, takes_positions
from self_judge.runtime import (
    cache_name,
    padded,
    takes,
    to_device,
    unwrapped,
    without_cudnn_attention,
)

logger = logging.getLogger(__name__)

MaxOverRanks = Callable[[int], int]
"""A function that returns the maximum of a number over all processes of a sharded model."""

# The maximum number of tokens in a prefill pass. About 1,024 tokens keep two CPU cores busy. A GPU
# needs more tokens.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_ELSEWHERE = 16_384
# The number of tokens between two checks for finished rows. On a GPU, a check waits for the device,
# which is then idle until the next pass. On a CPU, a check is free, but an unnecessary pass takes
# time.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 8
_GRAPHS = {"cuda"}  # device types on which a step is launched as one graph
# Finished rows are dropped if the share of unfinished rows is at most this value. With CUDA graphs,
# a new number of rows requires a new graph.
_LEAVE_AT = 0.75
_LEAVE_GRAPHS_AT = 0.5


class TokenSampler(Protocol):
    """Chooses the next token for each row. A sampler may keep state for each row."""

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns the next token for each row, `(B,)`. The ids are padded on the left."""

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps the state of the given rows and drops that of all others."""


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    copies: Sequence[int],
    draw: TokenSampler,
    *,
    stop: Sequence[int],
    pad: int,
    max_new_tokens: int,
    max_over_ranks: MaxOverRanks | None = None,
    look_every: int | None = None,
    graphs: bool | None = None,
) -> list[list[int]]:
    """Generates `copies` continuations of each prompt.

    Each continuation ends with a stop token or after `max_new_tokens`. The keys and values of a
    prompt are computed once for all its copies. Finished rows are removed only when they make up a
    quarter of the batch (half with CUDA graphs), because each removal copies the cache.

    Args:
        model: a model in evaluation mode, without an adapter that uses virtual tokens (see
            `why_not_shared`).
        prompts: the token ids of each prompt. Prompts must not be empty.
        copies: the number of continuations of each prompt.
        draw: chooses the next tokens. Its rows are the copies of the first prompt, then those of
            the second prompt, and so on.
        stop, pad: the tokens that end a row, and the padding token.
        max_over_ranks: for a sharded model, a function that returns the maximum of a number over
            all processes, so that all processes run the same number of forward passes.
        look_every: the number of tokens between two checks for finished rows (default: 1 on a CPU,
            8 on other devices). This number does not affect the result.
        graphs: whether each step is launched as one CUDA graph (default: if `why_no_graphs` returns
            `None` and the model is not sharded).

    Returns:
        The new ids for every row.
    """
    device = _device(model)
    every = look_every or _LOOK_EVERY.get(device.type, _LOOK_EVERY_ELSEWHERE)
    longest = max(map(len, prompts))
    of_row = [i for i, n in enumerate(copies) for _ in range(n)]
    rows = list(range(len(of_row)))  # the remaining rows
    given = padded([prompts[i] for i in of_row], device, "left", pad)
    room = (0, max_new_tokens)
    ids_BT = nn.functional.pad(given["input_ids"], room, value=pad)
    seen_BT = nn.functional.pad(given["attention_mask"], room, value=1)
    lengths_B1 = to_device(torch.tensor([[len(prompts[i])] for i in of_row]), device)
    stops = to_device(torch.tensor(list(stop)), device)
    new_BT = torch.full((len(rows), max_new_tokens), pad, device=device)
    row_B = torch.arange(len(rows), device=device)
    unfinished_B = torch.ones(len(rows), dtype=torch.bool, device=device)
    inner = unwrapped(model)
    positions, name = takes_positions(inner), cache_name(inner)
    if graphs is None:
        graphs = max_over_ranks is None and why_no_graphs(model) is None
    leave_at = _LEAVE_GRAPHS_AT if graphs else _LEAVE_AT

    with without_cudnn_attention():
        logits_BV, cache = _prefilled(
            model, prompts, of_row, longest + max_new_tokens, one_pass=max_over_ranks is not None
        )
        graphed: GraphedStep | None = None  # for the rows that remain
        for step in range(max_new_tokens):
            at = longest + step
            # Finished rows that are still in the batch get padding tokens, which are removed at the
            # end.
            token_B = torch.where(unfinished_B, draw(ids_BT[:, :at], logits_BV), pad)
            new_BT[row_B, step] = token_B
            ids_BT[:, at] = token_B
            unfinished_B &= ~(token_B[:, None] == stops).any(1)
            if step + 1 == max_new_tokens:
                break
            if (step + 1) % every == 0:
                left = [i for i, unfinished in enumerate(unfinished_B.tolist()) if unfinished]
                if not (max_over_ranks(len(left)) if max_over_ranks else left):
                    break
                if 0 < len(left) <= leave_at * len(rows):
                    rows = [rows[i] for i in left]
                    kept = to_device(torch.tensor(left), device)
                    cache.batch_select_indices(kept)
                    draw.keep(kept)
                    ids_BT, seen_BT, lengths_B1 = ids_BT[kept], seen_BT[kept], lengths_B1[kept]
                    row_B, unfinished_B = row_B[kept], unfinished_B[kept]
                    graphed = None
            if graphs:
                if graphed is None:
                    graphed = GraphedStep(model, cache, ids_BT, seen_BT, lengths_B1, longest)
                logits_BV = graphed(at)
                continue
            inputs = {"input_ids": ids_BT[:, at : at + 1], "attention_mask": seen_BT[:, : at + 1]}
            if positions:
                inputs["position_ids"] = lengths_B1 + step
            with _masks(any(len(prompts[of_row[row]]) < longest for row in rows)):
                output = model(**inputs, **{name: cache}, use_cache=True)
            logits_BV, cache = output.logits[:, -1], getattr(output, name)
        new = new_BT.tolist()
    ends = [next((t + 1 for t, x in enumerate(ids) if x in stop), len(ids)) for ids in new]
    return [ids[:end] for ids, end in zip(new, ends, strict=True)]


# Whether the rows in a forward pass are padded; `None` outside this module's forward passes.
_PADDED: ContextVar[bool | None] = ContextVar("padded", default=None)
_SDPA_MASK = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _told_mask(*args: Any, **kwargs: Any) -> Any:
    padded = _PADDED.get()
    if padded is None:
        return _SDPA_MASK(*args, **kwargs)
    if padded:
        return _SDPA_MASK(*args, **{**kwargs, "allow_is_causal_skip": False})
    return _SDPA_MASK(*args, **{**kwargs, "attention_mask": None})


ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _told_mask


@contextmanager
def _masks(padded: bool) -> Iterator[None]:
    """Tells Transformers whether any row is padded, so that it does not inspect the mask itself.

    Without padding, Transformers omits the mask for SDPA, as usual. Forward passes in other threads
    create their masks as usual.
    """
    token = _PADDED.set(padded)
    try:
        yield
    finally:
        _PADDED.reset(token)


@torch.no_grad()
def cache_bytes(model: nn.Module) -> int | None:
    """Measures how many bytes the keys and values of one token take, in a one-token forward pass.

    The size cannot be derived from the configuration alone. Models with latent attention or shared
    keys use different setting names, and under autocast, the dtype may differ from that of the
    weights.

    Args:
        model: a model in evaluation mode for which `why_not_shared` returns `None`.

    Returns:
        The number of bytes, or `None` if the cache does not expose its keys and values.
    """
    _, cache = _prefill(model, [[0]])
    layers = [x for x in cache.layers if isinstance(x, DynamicLayer) and x.is_initialized]
    held: list[Any] = [states for layer in layers for states in (layer.keys, layer.values)]
    return sum(states.nbytes for states in held) or None


def why_not_shared(model: nn.Module) -> str | None:
    """Returns why `decode` is not exact for a model, or `None` if it is exact.

    This function checks the kind of model and then runs a trial, once per model. If `decode` is not
    exact, callers use the model's own `generate` method.
    """
    inner: Any = unwrapped(model)
    known = _KNOWN.setdefault(inner, {})
    kind = isinstance(model, PeftModel)
    if kind not in known:
        known[kind] = _gate(model) or _trial(model, graphs=False)
        if known[kind]:
            warn_once(logger, f"sampling with {type(inner).__name__}.generate: {known[kind]}")
    return known[kind]


def why_no_graphs(model: nn.Module) -> str | None:
    """Returns why `decode` cannot use CUDA graphs for a model, or `None` if it can.

    Args:
        model: a model for which `why_not_shared` returns `None`.
    """
    inner: Any = unwrapped(model)
    known = _NO_GRAPHS.setdefault(inner, {})
    key = (isinstance(model, PeftModel), attention(inner), _device(model).type)
    if key not in known:
        known[key] = _no_graphs(model)
        logger.info("CUDA graphs for %s: %s", type(inner).__name__, known[key] or "yes")
    return known[key]


def _no_graphs(model: nn.Module) -> str | None:
    inner: Any = unwrapped(model)
    if _device(model).type not in _GRAPHS:
        return f"the device is {_device(model).type}"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights are on several devices"
    if attention(inner) != "sdpa" or not takes_positions(inner):
        return "it does not use sdpa attention with position ids"
    if not keeps_all_tokens(model):
        return "some layers do not keep all keys and values"
    try:
        return _trial(model, graphs=True)
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        return f"it cannot be captured: {str(error).splitlines()[0]:.160}"


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[bool, str | None]] = weakref.WeakKeyDictionary()
_NO_GRAPHS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = (
    weakref.WeakKeyDictionary()
)


def _prefilled(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    of_row: Sequence[int],
    tokens: int,
    *,
    one_pass: bool,
) -> tuple[torch.Tensor, Any]:
    """Returns the next-token logits `(B, V)` for each row's prompt, and a cache with these rows.

    Args:
        tokens: the capacity of a row in the cache, in tokens.
    """
    device = _device(model)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    # Layers of other kinds, such as sliding windows, are filled in one pass and copy their own
    # rows.
    split = keeps_all_tokens(model) and not one_pass
    parts = _parts(model, prompts, order) if split else [order]
    results = [_prefill(model, [prompts[i] for i in part]) for part in parts]
    place = {i: at for at, i in enumerate(order)}
    source = [place[i] for i in of_row]
    source_B = to_device(torch.tensor(source), device)
    # Each entry of `spread` belongs to one part. It lists rows in the batch and their source rows
    # in the part. If the two prompts at the top of this module form two parts, the entries are
    # [[0], [0]] (row 0 is p q r) and [[1, 2], [0, 0]] (rows 1 and 2 are s t).
    spread = []
    first = 0
    for part in parts:
        rows = [row for row, i in enumerate(source) if first <= i < first + len(part)]
        own = torch.tensor([rows, [source[row] - first for row in rows]])
        spread.append(to_device(own, device))
        first += len(part)
    longest = len(prompts[order[0]])
    caches = [cache for _, cache in results]
    for number, layer in enumerate(caches[0].layers):
        if type(layer) is PromptLayer and layer.is_initialized:
            layers = [cache.layers[number] for cache in caches]
            caches[0].layers[number] = joined(layers, spread, len(of_row), longest, tokens)
        else:
            layer.reorder_cache(source_B)
    return torch.cat([logits for logits, _ in results])[source_B], caches[0]


def _parts(
    model: nn.Module, prompts: Sequence[Sequence[int]], order: Sequence[int]
) -> list[list[int]]:
    """Groups prompts of similar length into passes within the token budget."""
    # On a CPU, where the budget is 1,024 tokens, prompts with 600, 590, 300, 290 and 100 tokens
    # become [600] [590] [300 290] [100]. Two prompts padded to 600 tokens would exceed the budget.
    # Combining 300 with 590, or 100 with 300, would add too much padding.
    budget = _PREFILL_TOKENS.get(_device(model).type, _PREFILL_TOKENS_ELSEWHERE)
    parts: list[list[int]] = []
    for i in order:  # longest first
        first = parts[-1][0] if parts else i
        wide = len(prompts[i]) < 0.8 * len(prompts[first])  # another pass is cheaper than padding
        if not parts or wide or (len(parts[-1]) + 1) * len(prompts[first]) > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


def _prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Any]:
    """Returns the next-token logits `(B, V)` for each prompt, and the cache."""
    inner: Any = unwrapped(model)
    longest = max(map(len, prompts))
    name = cache_name(inner)
    inputs: dict[str, Any] = padded(prompts, _device(model), "left")
    if takes_positions(inner):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if takes(inner, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    with _masks(min(map(len, prompts)) < longest):
        output = model(**inputs, **{name: empty_cache(model)}, use_cache=True)
    return output.logits[:, -1], getattr(output, name)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# -- exactness -------------------------------------------------------------------------------------


def _gate(model: nn.Module) -> str | None:
    inner: Any = unwrapped(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "the adapter adds virtual tokens before every prompt"
    if inner.config.get_text_config().is_encoder_decoder:
        return "it is an encoder-decoder model"
    if getattr(inner, "_is_stateful", False):
        return "its layers keep a state that is not stored per token"
    return None


class _Script:
    """Returns predefined tokens and records the logits."""

    def __init__(self, tokens_BT: torch.Tensor) -> None:
        self.tokens_BT = tokens_BT
        self.rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
        self.logits: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        self.logits.append((self.rows, logits_BV.clone()))
        return self.tokens_BT[self.rows, len(self.logits) - 1]

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = self.rows[rows]


def _trial(model: nn.Module, *, graphs: bool) -> str | None:
    """Compares the logits from a short decoding run with those from one padded batch."""
    called = as_called(model)
    stop, *drawn = trial_tokens(model, 33)
    drawn = [token if token != stop else token + 1 for token in drawn]  # only `stop` ends a row
    prompts, copies = [drawn[:4], drawn[4:6], drawn[6:9]], [1, 2, 1]
    script = [drawn[9 + 5 * row : 14 + 5 * row] for row in range(4)]
    script[1][0] = script[2][0] = stop
    device = _device(model)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        draw = _Script(torch.tensor(script, device=device))
        settings: Any = {"stop": [stop], "pad": stop, "max_new_tokens": 5, "look_every": 2}
        decode(called, prompts, copies, draw, **settings, graphs=graphs)
        found, sequences = [], []
        of_row = [0, 1, 1, 2]
        for step, (rows, logits_BV) in enumerate(draw.logits):
            for row, logits_V in zip(rows.tolist(), logits_BV, strict=True):
                found.append(logits_V)
                sequences.append([*prompts[of_row[row]], *script[row][:step]])
        return torch.stack(found), torch.stack([x[-1] for x in padded_logits(called, sequences)])

    return why_inexact(model, logits)

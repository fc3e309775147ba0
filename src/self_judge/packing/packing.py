"""Packing runs sequences through a model and computes each shared token only once.

This module decides once per model how prefixes can be shared (tree masks, a KV cache, or not at
all), lays out the sequences, and lets the model's own head score only the needed positions. It does
not depend on the meaning of the sequences or the use of the scores.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from self_judge.config.self_training import PackingChoice, require_choice
from self_judge.packing import flex_attention
from self_judge.packing.exactness import (
    as_called,
    padded_logits,
    trial_tokens,
    warn_once,
    why_inexact,
)
from self_judge.packing.passes import (
    Pass,
    Shape,
    Wanted,
    attention,
    better_cached,
    cache_passes,
    hidden_states_at,
    padded_passes,
    takes_positions,
    tree_passes,
)
from self_judge.packing.prefix_tree import Ints
from self_judge.packing.segment_passes import PrefixCache, chunked_passes, segment_passes
from self_judge.runtime import device_of, unwrapped

logger = logging.getLogger(__name__)

Route: TypeAlias = Literal["tree", "cache", "padding", "off"]

# The types of attention layers that accept a mask from the caller. Other layers keep their own
# state.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_LAYOUTS: dict[str, Callable[..., Iterator[Pass]]] = {
    "tree": tree_passes,
    "segments": segment_passes,
    "chunks": chunked_passes,
    "cache": cache_passes,
    "padding": padded_passes,
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The packing mode of a model.

    Attributes:
        route: `tree`, `cache`, `padding`, or `off` (the model is called without packing).
        reason: the reason for this mode, as text.
        longest: the longest sequence for which the mode is exact, or `None` for no limit.
        beyond: the packing mode for longer sequences.
        by_segments: whether trees use segment attention instead of a mask.
    """

    route: Route
    reason: str
    longest: int | None = None
    beyond: Route = "padding"
    by_segments: bool = False


class Packing:
    """Runs sequences through a model and computes each shared token only once.

    Args:
        model: a causal language model, in any wrapper (PEFT, DDP, FSDP).
        choice: `auto` tries the modes tree, cache and padding in this order, and uses the first one
            that is exact for the model. Any other value forces a mode, and `off` disables packing.
        batch_tokens: the maximum number of tokens in a forward pass, including padding (default:
            `pass_size.tokens_per_pass`). A single sequence, or two that share a prefix, may exceed
            this limit.
        gradients: whether gradients are needed (a KV cache does not work with gradient
            checkpointing).
        one_pass: whether to use a single forward pass. Sharded models need this, because all
            processes must run the same number of passes (see `LockstepPacking` for judging).

    Raises:
        ValueError: a forced mode is not exact for this model.
    """

    # `auto` selects the mode once per model. Each mode is first checked against the configuration
    # (`_gate`) and then tried on five short sequences (`_trial`). The first exact mode is used:
    #
    #   tree ──── exact ──> tree; on a CPU with SDPA by segments, if they are also exact
    #    └ not ── cache ── exact ──> cache
    #              └ not ── padding
    #
    # Sequences longer than `Decision.longest` (for example, the size of a sliding window) use
    # `Decision.beyond`.

    def __init__(
        self,
        model: nn.Module,
        choice: PackingChoice = "auto",
        *,
        batch_tokens: int | None = None,
        gradients: bool = False,
        one_pass: bool = False,
    ) -> None:
        require_choice("packing", choice, PackingChoice)
        self.model = model
        self.inner: Any = unwrapped(model)
        self.choice = choice
        self.gradients = gradients
        self.shape = Shape(batch_tokens, one_pass)
        self._prefix_cache: PrefixCache | None = None
        if choice not in ("auto", "padding", "off"):
            refused = _refused(model, choice)
            if refused:
                raise ValueError(f"packing={choice} cannot be used: {refused}")

    @property
    def decision(self) -> Decision:
        """The packing mode for the model in its current state, checked once per state."""
        known = _KNOWN.setdefault(self.inner, _Known())
        key = (
            self.choice,
            _no_cache(self),
            _by_segments(self),
            attention(self.inner),
            isinstance(self.model, PeftModel),
        )
        if key not in known.decided:
            decision = known.decided[key] = _decide(self.model, self.choice, key[1], key[2])
            # Warn that prefixes are not shared, because the user did not choose this mode.
            lost = self.choice == "auto" and decision.route in ("padding", "off")
            if lost:
                warn_once(logger, self.describe())
            else:
                logger.info(self.describe())
        return known.decided[key]

    def describe(self) -> str:
        """Returns the packing mode and its reason, on one line."""
        decision = self.decision
        limit = "" if decision.longest is None else f" up to {decision.longest} tokens"
        return f"packing of {type(self.inner).__name__}: {decision.route}{limit}; {decision.reason}"

    def passes(self, sequences: Sequence[Sequence[int]], wanted: Sequence[Ints]) -> Iterator[Pass]:
        """Yields the forward passes that compute the hidden states at the requested positions.

        Args:
            sequences: the token ids. Sequences without requested positions are skipped.
            wanted: the positions in each sequence whose hidden states are needed. Tokens after the
                last of these positions are not computed.

        Raises:
            ValueError: packing is off.
        """
        yield from self._passes(sequences, wanted, "segments")

    def _passes(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Ints], by_segments: str
    ) -> Iterator[Pass]:
        # For example, a model with a sliding window of 512 tokens uses these modes:
        #
        #   wanted positions [9] of 20 tokens     cut to the first 10
        #   up to 512 tokens after the cut        `decision.route` (or its segments or chunks)
        #   longer                                `decision.beyond`; with `one_pass`, all together
        #   under dense masks, large groups       the cache (`better_cached`), for tournament rounds
        decision = self.decision
        cut = [
            s[: int(max(w)) + 1] if len(w) else () for s, w in zip(sequences, wanted, strict=True)
        ]
        asked = Wanted.all_of(cut, wanted)
        limit = decision.longest
        nonempty = [i for i, s in enumerate(cut) if len(s)]
        within = [i for i in nonempty if limit is None or len(cut[i]) <= limit]
        layout = by_segments if decision.by_segments else decision.route
        routes: list[tuple[str, list[int]]] = [(layout, within)]
        if len(within) < len(nonempty):
            if self.shape.one_pass:
                routes = [(decision.beyond, nonempty)]
            else:
                known = set(within)
                routes.append((decision.beyond, [i for i in nonempty if i not in known]))
        if layout == "tree" and within and self._may_cache():
            better = better_cached(self.inner, self.shape, [cut[i] for i in within])
            cached = {within[n] for n in better}
            routes[0] = ("tree", [i for i in within if i not in cached])
            routes.append(("cache", sorted(cached)))
        for route, chosen in routes:
            if not chosen:
                continue
            if route == "off":
                raise ValueError(f"packing is off: {decision.reason}")
            remembered = {"prefix_cache": self._prefix_cache} if route == "chunks" else {}
            yield from _LAYOUTS[route](self.inner, self.shape, asked.only(chosen), **remembered)

    def _may_cache(self) -> bool:
        """Returns whether large groups may use a KV cache even though trees are exact."""
        free = self.choice == "auto" and not self.gradients and not self.shape.one_pass
        dense = attention(self.inner) != flex_attention.NAME
        return free and dense and _refused(self.model, "cache") is None

    @contextmanager
    def prefix_cache(self, limit: int = 2 * 2**30) -> Iterator[None]:
        """Within the block, calls reuse the prefixes that earlier calls computed.

        This only affects `next_token_logits` with segment attention.

        Args:
            limit: the maximum number of bytes of keys and values to keep.
        """
        before, self._prefix_cache = self._prefix_cache, PrefixCache(limit)
        try:
            yield
        finally:
            self._prefix_cache = before

    @torch.no_grad()
    def next_token_logits(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yields the indices of n sequences and their next-token logits `(n, V)` for each pass."""
        # Only the last position in a sequence is needed, so chunks can be used. With `one_pass`,
        # segments are used instead.
        last = [np.array([len(s) - 1]) for s in sequences]
        for this in self._passes(sequences, last, "segments" if self.shape.one_pass else "chunks"):
            with hidden_states_at(self.inner, this) as inputs:
                output = self.model(**inputs, use_cache=this.caches)
            yield this.wanted.tolist(), output.logits[0]


# -- the decision ----------------------------------------------------------------------------------


def _checkpointed(inner: nn.Module) -> bool:
    known = _KNOWN.setdefault(inner, _Known())
    if known.checkpointable is None:
        # Cache the modules, because every pass needs them and iterating over a thousand modules
        # takes milliseconds.
        known.checkpointable = [
            m for m in inner.modules() if getattr(m, "gradient_checkpointing", None) is not None
        ]
    return any(module.gradient_checkpointing for module in known.checkpointable)


@dataclass(slots=True)
class _Known:
    checkpointable: list[Any] | None = None
    refused: dict[tuple[Any, ...], str | None] = field(default_factory=dict)
    decided: dict[tuple[Any, ...], Decision] = field(default_factory=dict)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _no_cache(packing: Packing) -> str | None:
    """Returns why these settings exclude a KV cache, or `None` if they allow one."""
    if packing.shape.one_pass:
        return "a cache needs two passes, but all processes must run the same number of passes"
    if packing.gradients and _checkpointed(packing.inner):
        return "gradient checkpointing does not support a cache"
    if packing.gradients and getattr(packing.inner, "_is_stateful", False):
        return "gradients do not flow through a recurrent state"
    return None


def _by_segments(packing: Packing) -> bool:
    """Returns whether to try segment attention.

    On a GPU, the many small calls take 2 to 4 times as long as attention with a mask
    (benchmarks/RESULTS.md). Gradient checkpointing repeats forward passes after the model's usual
    attention has been restored, so it cannot be combined with segments.
    """
    inner = packing.inner
    checkpointed = packing.gradients and _checkpointed(inner)
    return attention(inner) == "sdpa" and device_of(inner).type == "cpu" and not checkpointed


def _decide(model: nn.Module, choice: str, no_cache: str | None, may_segment: bool) -> Decision:
    inner: Any = unwrapped(model)
    if choice == "off":
        return Decision("off", "as requested")
    unselectable = _refused(model, "padding")
    if unselectable:
        if choice == "auto":
            return Decision("off", unselectable)
        raise ValueError(f"packing={choice} cannot be used: {unselectable}")
    reasons: list[str] = []
    for route in ("tree", "cache") if choice == "auto" else (choice,):
        if route == "padding":
            return Decision("padding", "as requested")
        refused = (no_cache if route == "cache" else None) or _refused(model, route)
        if refused is None:
            limit = _longest_path(inner.config) if route == "tree" else None
            beyond: Route = "padding"
            if limit is not None and choice == "auto" and not no_cache:
                beyond = "cache" if _refused(model, "cache") is None else "padding"
            by_segments = route == "tree" and may_segment
            by_segments = by_segments and all(
                _refused(model, way) is None for way in ("segments", "chunks")
            )
            how = f"{attention(inner)} attention{', segment by segment,' if by_segments else ''}"
            why = "; ".join([*reasons, f"exact with {how} in a trial"])
            return Decision(route, why, limit, beyond, by_segments)
        if choice != "auto":
            raise ValueError(f"packing={choice} cannot be used: {refused}")
        reasons.append(f"no {route}: {refused}")
    return Decision("padding", "; ".join(reasons))


def _refused(model: nn.Module, route: str) -> str | None:
    """Returns why a mode is not exact for a model, or `None` if it is exact."""
    inner: Any = unwrapped(model)
    known = _KNOWN.setdefault(inner, _Known())
    key = (route, attention(inner), isinstance(model, PeftModel))
    if key not in known.refused:
        known.refused[key] = _gate(model, route) or _trial(model, route)
    return known.refused[key]


def _gate(model: nn.Module, route: str) -> str | None:
    inner: Any = unwrapped(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "the adapter adds virtual tokens before every sequence"
    if getattr(inner, "base_model", inner) is inner:
        return f"{type(inner).__name__} has no backbone separate from its head"
    config = inner.config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if route == "padding":
        return None
    if attention(inner) == flex_attention.NAME:
        if route == "cache":
            return "FlexAttention would be recompiled for many cache lengths"
        refused = flex_attention.refusal(inner, device_of(inner))
        if refused:
            return refused
    if route == "cache":
        if config.model_type == "jamba":
            return "Jamba's cache does not store the data that its recurrent state needs"
        return None
    if getattr(inner, "_is_stateful", False):
        return "its layers keep a state across the whole row"
    unknown = set(getattr(config, "layer_types", None) or ()) - _MASKED_LAYERS
    if unknown:
        return f"it has unknown kinds of layers: {', '.join(sorted(unknown))}"
    if not takes_positions(inner):
        return "it does not accept position ids"
    if getattr(config, "alibi", False):
        return "ALiBi biases depend on positions in the row"
    if attention(inner) not in ("sdpa", "eager", "flex_attention"):
        return f"{attention(inner)} attention does not accept a custom mask"
    # Older model classes hard-code their attention.
    if route in ("segments", "chunks") and not inner._can_set_attn_implementation():
        return "its attention cannot be replaced"
    return None


def _longest_path(config: Any) -> int | None:
    """Returns the maximum sequence length for which trees are exact, or `None` for no limit."""
    config = config.get_text_config()
    limits: list[int] = []
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window and (kinds is None or "sliding_attention" in kinds):
        limits.append(int(window))
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (kinds is None or "chunked_attention" in kinds):
        limits.append(int(chunk))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [r for r in (rope, *rope.values()) if isinstance(r, Mapping)]
    for parameters in ropes:
        # The scaling of these types of RoPE depends on the longest sequence in a pass.
        if parameters.get("rope_type", parameters.get("type")) in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(original or config.max_position_embeddings))
    return min(limits, default=None)


def _trial(model: nn.Module, route: str) -> str | None:
    """Compares a mode with a padded batch on two small trees; returns `None` if they agree."""
    # The five sequences (numbers are indices in `drawn`) and their trees:
    #
    #   0 1 2 3 ─┬─ 4 ─┬─ 5 6        10 11 12 ─┬─ 13 14
    #            │     └─ 7                    └─ 15 16 17
    #            └─ 8
    #
    # If a branch attends to another branch, or a token has a wrong position, at least one logit
    # changes by much more than rounding errors.
    inner: Any = unwrapped(model)
    called = as_called(model)
    drawn = trial_tokens(model, 32)
    root, other = drawn[:4], drawn[10:13]
    # Rows have at most nine tokens. In longer rows, bfloat16 rounding could hide an error.
    trees = [root + drawn[4:7], root + drawn[4:5] + drawn[7:8], root + drawn[8:9]]
    sequences = [*trees, other + drawn[13:15], other + drawn[15:18]]
    wanted = [np.arange(len(s) - 1 if route == "chunks" else 0, len(s)) for s in sequences]
    asked = Wanted.all_of(sequences, wanted)
    shape = Shape(9 if route in ("segments", "chunks") else 18)

    def logits() -> tuple[torch.Tensor, torch.Tensor]:
        with flex_attention.sdpa_instead(inner):
            padded = padded_logits(called, sequences)
        expected = torch.cat([logits[w] for logits, w in zip(padded, wanted, strict=True)])
        found = torch.full_like(expected, torch.nan)
        with nullcontext() if route == "tree" else flex_attention.sdpa_instead(inner):
            for this in _LAYOUTS[route](inner, shape, asked):
                with hidden_states_at(inner, this) as inputs:
                    computed = called(**inputs, use_cache=this.caches).logits
                found[this.wanted.to(found.device)] = computed[0].to(found.dtype)
        return found, expected

    return why_inexact(model, logits)


def needs_one_pass(distributed: Any) -> bool:
    """Returns whether processes must run the same number of forward passes (FSDP, ZeRO-3)."""
    return str(getattr(distributed, "value", distributed)).upper() in ("FSDP", "DEEPSPEED")

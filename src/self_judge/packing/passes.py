"""Builds packed forward passes from prefix trees, and selects the hidden states that are needed.

There is one generator function for each packing mode. The caller chooses the mode, and `packing.py`
checks whether it is exact for a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from self_judge.packing.flex_attention import NAME, ROW_MULTIPLE, tree_blocks
from self_judge.packing.pass_size import attention_share, busy_tokens, tokens_per_pass
from self_judge.packing.prefix_tree import (
    Ints,
    PrefixGroup,
    Row,
    batches,
    joined,
    prefix_groups,
    prefix_rows,
)
from self_judge.packing.segment_attention import attending_by_segments
from self_judge.runtime import (
    CACHES,
    cache_name,
    device_of,
    takes,
    to_device,
    without_cudnn_attention,
)

# With a dense mask, attention computes a score for every pair of tokens, at a lower rate than a
# matrix product. These factors describe the slowdown (benchmarks/RESULTS.md). They were measured on
# two CPU cores with SmolLM2-135M, and on an H200 in bfloat16, where a factor of 1.0 is within 4%
# of the best speed for the shape of a 1B model. A higher factor leads to more and smaller passes.
_DENSE_ATTENTION = {"cpu": 2.0}
_DENSE_ATTENTION_ELSEWHERE = 1.0
# The maximum number of tokens in the cache for one group. The cache needs 16 GiB for Llama 2 7B in
# bfloat16, and 4 GiB for Llama 3 8B, in which four query heads share a KV head.
_CACHED_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Shape:
    """The limits on the size of a forward pass; see `Packing`.

    Attributes:
        split_pairs: whether `batch_tokens` also applies to two sequences that share a prefix, for
            example after running out of memory. A single sequence is never cut.
    """

    batch_tokens: int | None = None
    one_pass: bool = False
    split_pairs: bool = False


class Wanted(NamedTuple):
    """The hidden states to compute.

    Attributes:
        sequences: the token ids.
        wanted: the positions in each sequence whose states are needed.
        offsets: for each sequence, the index of its first needed position among all needed
            positions.
    """

    # For `pqA`, `pqBC`, `ps` with wanted [1 2], [2 3], [1], the five states are numbered like this:
    #   qA of 0: 0 1      BC of 1: 2 3      s of 2: 4      so offsets = [0 2 4]
    # In the row p q A B C s (one pass), their indices are `Pass.states` = [1 2 3 4 5].

    sequences: Sequence[Sequence[int]]
    wanted: Sequence[Ints]
    offsets: Sequence[int]

    @classmethod
    def all_of(cls, sequences: Sequence[Sequence[int]], wanted: Sequence[Ints]) -> Wanted:
        return cls(sequences, wanted, np.cumsum([0, *map(len, wanted)])[:-1].tolist())

    def only(self, places: Sequence[int]) -> Wanted:
        """Selects some of the sequences. The needed positions keep their indices."""
        sequences, wanted, offsets = self
        return Wanted(
            [sequences[i] for i in places],
            [wanted[i] for i in places],
            [offsets[i] for i in places],
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass.

    Attributes:
        inputs: the keyword arguments for the model.
        states: the indices of the W needed hidden states in the flattened output, which starts with
            the flattened prefix if the pass has one.
        wanted: the positions of these states among all needed states (see `Wanted.offsets`).
        prefix: the inputs for the prefix pass and the prefix row of each branch, if a KV cache is
            used.
    """

    inputs: dict[str, Any]
    states: torch.Tensor
    wanted: torch.Tensor
    prefix: dict[str, torch.Tensor] | None = None

    @property
    def caches(self) -> bool:
        """Whether the model must be called with `use_cache`."""
        return self.prefix is not None or any(name in self.inputs for name in CACHES)


@contextmanager
def hidden_states_at(inner: Any, this: Pass) -> Iterator[dict[str, Any]]:
    """Makes the backbone return only the needed states `(1, W, H)`, and yields the inputs.

    The model's own head then scores these states, including any scaling or soft-capping of logits.

    Args:
        inner: the causal language model inside all wrappers.
    """
    backbone = inner.base_model
    before: torch.Tensor | None = None
    inputs = dict(this.inputs)
    segments = attending_by_segments(inner) if "prefix_segments" in inputs else nullcontext()
    with segments, without_cudnn_attention():
        if this.prefix is not None:
            before, cache = _prefix_states(inner, this.prefix)
            inputs |= cache
        with _selected(backbone, this.states, before, with_cache=this.prefix is not None):
            yield inputs


# -- packing modes ---------------------------------------------------------------------------------
#
# The same three sequences, `pqA`, `pqBC` and `ps`, in each packing mode:
#
#   tree        1 row    p q A B C s              a mask selects the ancestors; 6 tokens
#   cache       prefix   p                        computed once, then one row per branch
#               3 rows   q A _ / q B C / s _ _    reading its cache; 1 + 9 tokens, padding included
#   padding     3 rows   p q A _ / p q B C / p s _ _    nothing is shared; 12 tokens
#
# `segment_passes.py` adds trees without a mask (segments) and chunks.


def pass_tokens(inner: Any, shape: Shape) -> int:
    return shape.batch_tokens or tokens_per_pass(inner)


def _dense_cost(inner: Any) -> float:
    """Returns the cost of one more key under a dense mask, relative to a token's other work."""
    slower = _DENSE_ATTENTION.get(device_of(inner).type, _DENSE_ATTENTION_ELSEWHERE)
    return slower * attention_share(inner)


def tree_passes(inner: Any, shape: Shape, asked: Wanted) -> Iterator[Pass]:
    blocks = attention(inner) == NAME
    cost = 0.0 if blocks else _dense_cost(inner)
    most = pass_tokens(inner, shape)
    rows = prefix_rows(asked.sequences, most, cost, split_pairs=shape.split_pairs)
    if blocks:
        # Blocks that no token attends to are skipped, so all trees in a pass share one row.
        size = sum(map(len, rows)) if shape.one_pass else most
        batched = [[row] for row in joined(rows, size)]
    else:
        batched = batches(rows, most, cost, busy_tokens=busy_tokens(inner), one=shape.one_pass)
    for batch in batched:
        ids, positions, ends = stacked(batch, ROW_MULTIPLE if blocks else 1)
        device = device_of(inner)
        ends = to_device(ends, device)
        mask = tree_blocks(ends[0]) if blocks else _dense_mask(inner, ends)
        inputs = {
            "input_ids": to_device(ids, device),
            "position_ids": to_device(positions, device),
            "attention_mask": mask,
        }
        yield pass_over(inputs, batch, asked)


def better_cached(inner: Any, shape: Shape, sequences: Sequence[Sequence[int]]) -> list[int]:
    """Finds the sequences for which a KV cache is clearly cheaper than dense tree masks.

    These sequences form groups with many branches, as in a tournament round. With a dense mask,
    scores are computed between all branches in a row, and every row repeats the prefix.

    Returns:
        The indices of these sequences.
    """
    # For example, a prefix of 100 tokens and 16 branches of 20 tokens form one row of 420 tokens.
    # The dense mask computes 420² = 176,400 scores. With a cache, the prefix and the branches need
    # 100² + 16·20·120 = 48,400 scores. Branches are padded to the longest branch. If one branch has
    # 60 tokens, the branches count as 16·60 tokens.
    cost, most = _dense_cost(inner), pass_tokens(inner, shape)
    cached: list[int] = []
    for group in prefix_groups(sequences):
        if len(group.members) <= 2:
            continue  # for the two orders of a comparison, a second pass saves no work
        own = [sequences[i] for i in group.members]
        lengths = [len(row) for row in prefix_rows(own, most, cost)]
        width = max(map(len, own)) - group.prefix
        branches = len(own) * width
        met = group.prefix**2 + branches * (group.prefix + width)
        if 1.2 * (group.prefix + branches + cost * met) < sum(n + cost * n * n for n in lengths):
            cached += group.members
    return cached


def _dense_mask(inner: Any, ends_BL: torch.Tensor) -> torch.Tensor:
    """Builds the additive mask `(B, 1, L, L)` in the dtype that attention uses.

    SDPA would convert a boolean mask in every layer and keep each copy for the backward pass. Eager
    attention adds the mask to the scores, so a boolean mask would give wrong results without an
    error. The CUDA kernels copy a mask if its rows do not begin at multiples of 8.
    """
    allowed = tree_mask(ends_BL)
    kind = allowed.device.type
    dtype = inner.dtype if inner.dtype.is_floating_point else torch.float32
    if attention(inner) == "sdpa" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    rows, _, length, _ = allowed.shape
    wide = -(-length // 8) * 8
    mask = torch.zeros(rows, 1, length, wide, dtype=dtype, device=allowed.device)[..., :length]
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def padded_passes(inner: Any, shape: Shape, asked: Wanted) -> Iterator[Pass]:
    rows = [_single(i, s) for i, s in enumerate(asked.sequences)]
    most, busy = pass_tokens(inner, shape), busy_tokens(inner)
    for batch in batches(rows, most, busy_tokens=busy, one=shape.one_pass):
        # With a causal mask, right padding does not affect other tokens.
        ids, _, _ = stacked(batch)
        lengths = torch.tensor([len(r) for r in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {
            "input_ids": to_device(ids, device_of(inner)),
            "attention_mask": to_device(mask, device_of(inner)),
        }
        yield pass_over(inputs, batch, asked)


def cache_passes(inner: Any, shape: Shape, asked: Wanted) -> Iterator[Pass]:
    # Every branch needs memory for keys and values, including those of its prefix, so the limit
    # depends on memory. A group is split only if necessary, because each part recomputes the
    # prefix.
    most = 2 * pass_tokens(inner, shape)
    whole = most if shape.split_pairs else max(most, _CACHED_TOKENS)
    groups = [
        part
        for group in prefix_groups(asked.sequences)
        for part in _parts(group, asked.sequences, whole, 1 if shape.split_pairs else 2)
    ]
    alone = [i for g in groups if not g.prefix for i in g.members]
    if alone:
        yield from padded_passes(inner, shape, asked.only(alone))
    shared = [g for g in groups if g.prefix]
    shared.sort(key=lambda g: (g.prefix, len(g.members)), reverse=True)
    batch: list[PrefixGroup] = []
    for group in shared:
        together = [*batch, group]
        width = max(len(asked.sequences[i]) - g.prefix for g in together for i in g.members)
        held = sum(len(g.members) for g in together) * (together[0].prefix + width)
        if batch and held > most:
            yield _cached(inner, batch, asked)
            batch = []
        batch.append(group)
    if batch:
        yield _cached(inner, batch, asked)


def _parts(
    group: PrefixGroup, sequences: Sequence[Sequence[int]], most: int, least: int
) -> list[PrefixGroup]:
    """Splits a group into parts with at most `most` tokens and at least `least` members."""
    size = max(least, most // max(len(sequences[i]) for i in group.members))
    starts = range(0, len(group.members), size)
    parts = [group.members[start : start + size] for start in starts]
    return [PrefixGroup(group.prefix if len(own) > 1 else 0, own) for own in parts]


def _cached(inner: Any, groups: Sequence[PrefixGroup], asked: Wanted) -> Pass:
    # Groups {pqA, pqBC} and {rD, rE} need two passes. The first pass computes the prefixes, which
    # are padded on the left so that branches follow directly. The second pass computes the
    # branches, which are padded on the right.
    #
    #   prefixes   mask     branches   mask of prefix + branch   position_ids   branch of
    #   p q        1 1      A _        1 1 | 1 0                 2 3            prefix row 0
    #   _ r        0 1      B C        1 1 | 1 1                 2 3            prefix row 0
    #                       D _        0 1 | 1 0                 1 2            prefix row 1
    #                       E _        0 1 | 1 0                 1 2            prefix row 1
    # `states` counts the 4 prefix cells first (p q _ r), then the 8 branch cells: q has index 1, A
    # has index 4, C has index 7 and D has index 8.
    sequences = asked.sequences
    device = device_of(inner)
    longest = max(g.prefix for g in groups)
    members = [(g, row, i) for row, g in enumerate(groups) for i in g.members]
    width = max(len(sequences[i]) - g.prefix for g, _, i in members)
    prefixes = torch.zeros(len(groups), longest, dtype=torch.long)
    seen_prefixes = torch.zeros_like(prefixes)
    for row, group in enumerate(groups):
        own = torch.as_tensor(list(sequences[group.members[0]][: group.prefix]))
        prefixes[row, longest - group.prefix :] = own
        seen_prefixes[row, longest - group.prefix :] = 1
    branches = torch.zeros(len(members), width, dtype=torch.long)
    seen_branches = torch.zeros_like(branches)
    states, numbers = [], []
    for place, (group, row, i) in enumerate(members):
        own = torch.as_tensor(list(sequences[i][group.prefix :]))
        branches[place, : len(own)] = own
        seen_branches[place, : len(own)] = 1
        at = np.asarray(asked.wanted[i])
        in_prefix = row * longest + (longest - group.prefix) + at
        in_branch = len(groups) * longest + place * width + (at - group.prefix)
        states.append(np.where(at < group.prefix, in_prefix, in_branch))
        numbers.append(asked.offsets[i] + np.arange(len(at)))
    of_group = torch.tensor([row for _, row, _ in members])
    starts = torch.tensor([[g.prefix] for g, _, _ in members])
    positions = (seen_prefixes.cumsum(-1) - 1).clamp(min=0)
    inputs = {
        "input_ids": branches,
        "attention_mask": torch.cat([seen_prefixes[of_group], seen_branches], 1),
        "position_ids": starts + torch.arange(width),
    }
    prefix = {
        "input_ids": prefixes,
        "attention_mask": seen_prefixes,
        "position_ids": positions,
        "branches": of_group,
    }
    if not takes_positions(inner):
        inputs.pop("position_ids")
        prefix.pop("position_ids")
    return Pass(
        {name: to_device(value, device) for name, value in inputs.items()},
        to_device(torch.as_tensor(np.concatenate(states)), device),
        torch.as_tensor(np.concatenate(numbers)),
        {name: to_device(value, device) for name, value in prefix.items()},
    )


def tree_mask(ends_BL: torch.Tensor) -> torch.Tensor:
    """Builds the boolean mask `(B, 1, L, L)`: tokens attend to their ancestors and themselves.

    Args:
        ends_BL: `Row.subtree_ends` of each row, `(B, L)`.
    """
    # The condition is `k <= q < end(k)`, as drawn in `prefix_tree.py`.
    place_L = torch.arange(ends_BL.shape[1], device=ends_BL.device)
    before = place_L[None, :] <= place_L[:, None]
    return (before & (place_L[:, None] < ends_BL[:, None, :]))[:, None]


def _single(index: int, sequence: Sequence[int]) -> Row:
    ids = np.asarray(sequence, dtype=np.int64)
    places = np.arange(len(ids))
    return Row(ids, places, np.full(len(ids), len(ids)), {index: places})


def stacked(batch: Sequence[Row], multiple: int = 1) -> tuple[torch.Tensor, ...]:
    """Stacks ids, positions and subtree ends, each `(B, L)`; padding attends only to itself."""
    # A padding token at index i has subtree end i + 1, so it attends only to itself. Rows p q A s
    # and r C give:
    #   ids   p q A s     positions   0 1 2 1     ends   4 3 3 4
    #         r C _ _                 0 1 0 0            2 2 3 4
    longest = -(-max(len(r) for r in batch) // multiple) * multiple
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    positions = np.zeros_like(ids)
    ends = np.tile(np.arange(1, longest + 1), (len(batch), 1))
    for i, row in enumerate(batch):
        ids[i, : len(row)] = row.token_ids
        positions[i, : len(row)] = row.positions
        ends[i, : len(row)] = row.subtree_ends
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(ends)


def pass_over(inputs: dict[str, Any], batch: Sequence[Row], asked: Wanted) -> Pass:
    # Row i begins at i · width in the flattened output. A shared token may be needed several times.
    width = inputs["input_ids"].shape[1]
    states, numbers = [], []
    for i, row in enumerate(batch):
        for s, places in row.places.items():
            at = np.asarray(asked.wanted[s])
            states.append(i * width + places[at])
            numbers.append(asked.offsets[s] + np.arange(len(at)))
    device = inputs["input_ids"].device
    where = to_device(torch.as_tensor(np.concatenate(states)), device)
    return Pass(inputs, where, torch.as_tensor(np.concatenate(numbers)))


# -- the model -------------------------------------------------------------------------------------


def _prefix_states(
    inner: Any, prefix: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Computes the hidden states `(G, T, H)` of prefixes and a cache with one row per branch."""
    inputs = {k: v for k, v in prefix.items() if k != "branches"}
    output = inner.base_model(**inputs, use_cache=True)
    name = cache_name(inner)
    cache = getattr(output, name, None)
    if cache is None:
        raise ValueError("the model returned no cache")
    cache.reorder_cache(prefix["branches"])
    return output.last_hidden_state, {name: cache}


@contextmanager
def _selected(
    backbone: nn.Module, states: torch.Tensor, before: torch.Tensor | None, *, with_cache: bool
) -> Iterator[None]:
    used: list[bool] = []

    def select(module: nn.Module, args: Any, output: Any) -> Any:
        used.append(True)
        hidden = output.last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        if before is not None:
            flat = torch.cat([before.reshape(-1, before.shape[-1]), flat])
        output.last_hidden_state = flat[states.to(flat.device)][None]
        return output

    def keep_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "use_cache": True}  # TRL's head disables the cache

    hooks = [backbone.register_forward_hook(select)]
    if with_cache:
        hooks.append(backbone.register_forward_pre_hook(keep_cache, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not used:
        raise RuntimeError("the model did not call its own backbone: set packing=off")


def attention(inner: Any) -> str:
    return str(inner.config.get_text_config()._attn_implementation)


def takes_positions(inner: Any) -> bool:
    return takes(inner.base_model, "position_ids")

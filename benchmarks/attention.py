"""Attention of prefix trees alone: by segments, as judging on a CPU, against other ways.

The chunks are those of judging real HH pairs in both orders; queries, keys and values are random.
Every way gives the same numbers; what it costs is multiplied by the model's layers.

    python benchmarks/attention.py [--dtype bfloat16] [--shape 1b] [--pairs 32]
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import side_by_side as bench
from self_judge import Judge
from self_judge.packing.chunked_prefill import Chunk, PrefixIndex, plan_chunks
from self_judge.packing.passes import pass_tokens
from self_judge.packing.segment_attention import attending, segment_attention

PIECES = (64, 128, 256, 512)


class Work(NamedTuple):
    """Random states of a chunk, `(1, heads, tokens, size)`, and who sees whom, `(L, past + L)`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    chunk: Chunk
    sees: torch.Tensor


def work_of(chunk: Chunk, config: Any, dtype: torch.dtype, device: str) -> Work:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length, past = len(chunk.token_ids), len(chunk.past)
    sees = torch.zeros(length, past + length, dtype=torch.bool)
    for segment in chunk.segments:
        for start, stop in segment.before:
            sees[segment.start : segment.stop, start:stop] = True
        own = segment.stop - segment.start
        causal = torch.ones(own, own, dtype=torch.bool).tril()
        sees[segment.start : segment.stop, past + segment.start : past + segment.stop] = causal
    draw = functools.partial(torch.randn, dtype=dtype, device=device)
    return Work(
        draw(1, heads, length, size),
        draw(1, shared, past + length, size),
        draw(1, shared, past + length, size),
        chunk,
        sees.to(device),
    )


# -- the ways --------------------------------------------------------------------------------------


def by_segments(work: Work, piece: int | None = None) -> Callable[[], torch.Tensor]:
    """As `segment_attention` does it, in pieces of its own size or of another one."""
    sized = {} if piece is None else {"piece": piece}
    segments = attending(work.chunk.segments, work.query.device, **sized)
    states = (work.query, work.key, work.value)
    return lambda: segment_attention(nn.Module(), *states, None, prefix_segments=segments)[0]


def by_matrices(work: Work) -> Callable[[], torch.Tensor]:
    """The same segments, by two matrix products and a softmax."""
    segments = attending(work.chunk.segments, work.query.device)
    query, key, value, *_ = work
    shared, size = key.shape[1], key.shape[3]

    def attend() -> torch.Tensor:
        parts = []
        for segment in segments:
            own = query[:, :, segment.queries].reshape(shared, -1, size) * size**-0.5
            keys, values = (torch.cat([s[0, :, p] for p in segment.keys], 1) for s in (key, value))
            scores = own @ keys.mT
            added = segment.added(query.shape[1] // shared, query.dtype)
            if added is not None:
                scores += added
            found = scores.softmax(-1) @ values
            parts.append(found.reshape(1, query.shape[1], -1, size))
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous()

    return attend


def by_dense_mask(work: Work) -> Callable[[], torch.Tensor]:
    """One call for the whole row under the tree's mask."""
    query, key, value, _, sees = work
    dense = functools.partial(
        nn.functional.scaled_dot_product_attention, attn_mask=sees[None, None], enable_gqa=True
    )
    return lambda: dense(query, key, value).transpose(1, 2).contiguous()


def by_blocks(work: Work, compiled: Any) -> Callable[[], torch.Tensor]:
    """FlexAttention, which skips the blocks of 128 by 128 that no token sees."""
    query, key, value, _, sees = work
    mask = create_block_mask(
        lambda batch, head, q, k: sees[q, k], None, None, *sees.shape, device=query.device.type
    )
    attend = functools.partial(compiled, block_mask=mask, enable_gqa=True)
    return lambda: attend(query, key, value).transpose(1, 2).contiguous()


def all_of(calls: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    return [call() for call in calls]


@torch.no_grad()
def main() -> None:
    """All ways in turn."""
    given = bench.arguments(__doc__, (), pairs=32)
    model = bench.model_of(given).eval()
    judge = Judge(model, bench.encoder_of(given), bench.templates_of(), max_length=1024)
    prompts = bench.judge_prompts(judge, bench.comparisons_of(bench.records_of(given, given.pairs)))
    chunks = plan_chunks(
        prompts, pass_tokens(judge.packing.inner, judge.packing.shape), PrefixIndex()
    )
    torch.manual_seed(0)
    config = model.config.get_text_config()
    works = [work_of(s, config, model.dtype, given.device) for s in chunks]
    compiled = torch.compile(flex_attention, dynamic=True)
    ways = {
        "by segments": by_segments,
        **{f"by segments, pieces of {n}": functools.partial(by_segments, piece=n) for n in PIECES},
        "by segments, matrix products": by_matrices,
        "dense mask": by_dense_mask,
        "FlexAttention, compiled": functools.partial(by_blocks, compiled=compiled),
    }
    sides = {name: functools.partial(all_of, [way(w) for w in works]) for name, way in ways.items()}
    seconds, results = bench.alternating(sides, given)
    layers, seen = config.num_hidden_layers, sum(int(w.sees.sum()) for w in works)
    work = 4.0 * layers * seen * works[0].query.shape[1] * works[0].query.shape[3]
    print(f"\nattention of {len(works)} chunks, {len(prompts)} prompts, times {layers} layers: "
          f"{given.dtype}, {given.device}, {torch.get_num_threads()} threads")  # fmt: skip
    for (name, times), result in zip(seconds.items(), results, strict=True):
        spent = layers * statistics.median(times)
        off = max(float((a - b).abs().max()) for a, b in zip(results[0], result, strict=True))
        print(f"  {name:<26} {spent:6.2f} s, {work / spent / 1e9:5.0f} GFLOP/s of what is seen"
              f" (off by at most {off:.0e})")  # fmt: skip


if __name__ == "__main__":
    main()

"""Attention by runs: what a dense mask gives, for any tree and any grouping of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from self_judge.prefix_trees import joined, prefix_rows
from self_judge.prefix_walks import Paths, runs_of, walk
from self_judge.run_attention import Attending, attending, run_attention
from test_prefix_trees import SEQUENCES, slow_mask
from test_prefix_walks import seen

CPU = torch.device("cpu")
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])  # heads, and heads of keys


def states(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Softmax over the keys that the mask `(L, keys)` shows, written out; `(1, L, H, D)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = (s.repeat_interleave(groups, dim=1) for s in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def by_runs(*tensors: torch.Tensor, runs: list[Attending], **others: Any) -> torch.Tensor:
    attended, weights = run_attention(nn.Module(), *tensors, None, prefix_runs=runs, **others)
    assert weights is None
    assert attended.is_contiguous()
    return attended


@given(SEQUENCES, st.integers(1, 40), HEADS, st.integers(0, 999), st.floats(0.1, 2.0))
def test_a_row_of_trees_is_attended_to_as_through_its_dense_mask(
    sequences: list[list[int]],
    row_tokens: int,
    heads: tuple[int, int],
    seed: int,
    scaling: float,
) -> None:
    rows = prefix_rows(sequences, row_tokens)
    for row in joined(rows, 3 * row_tokens):
        query = states(seed, 1, heads[0], len(row), 8)
        key, value = (
            states(seed + 1, 1, heads[1], len(row), 8),
            states(seed + 2, 1, heads[1], len(row), 6),
        )
        runs = attending(runs_of(row), CPU)
        found = by_runs(query, key, value, runs=runs, scaling=scaling)
        expected = plainly(query, key, value, torch.from_numpy(slow_mask(row)), scaling)
        torch.testing.assert_close(found, expected)
        # The masks are made once and serve every layer.
        again = by_runs(query, key, value, runs=runs, scaling=scaling)
        assert torch.equal(found, again)


@given(SEQUENCES, st.integers(1, 20), HEADS, st.integers(0, 999))
def test_a_step_of_a_walk_is_attended_to_after_the_keys_of_earlier_steps(
    sequences: list[list[int]], step_tokens: int, heads: tuple[int, int], seed: int
) -> None:
    for step in walk(sequences, step_tokens, Paths()):
        own, keys = len(step.token_ids), len(step.past) + len(step.token_ids)
        query = states(seed, 1, heads[0], own, 8)
        key, value = states(seed + 1, 1, heads[1], keys, 8), states(seed + 2, 1, heads[1], keys, 8)
        mask = torch.cat([torch.from_numpy(seen(run, keys)) for run in step.runs])
        found = by_runs(query, key, value, runs=attending(step.runs, CPU), scaling=0.3)
        torch.testing.assert_close(found, plainly(query, key, value, mask, 0.3))


def test_a_long_run_is_attended_to_in_pieces_that_meet_no_key_after_them() -> None:
    [row] = prefix_rows([list(range(300)), [*range(150), *range(500, 800)]], 10_000)
    runs = attending(runs_of(row), CPU)
    assert max(run.queries.stop - run.queries.start for run in runs) == 128
    met = sum(
        (run.queries.stop - run.queries.start) * sum(k.stop - k.start for k in run.keys)
        for run in runs
    )
    assert met < 0.75 * len(row) ** 2
    query, key, value = (states(i, 1, 2, len(row), 8) for i in range(3))
    expected = plainly(query, key, value, torch.from_numpy(slow_mask(row)), 8**-0.5)
    torch.testing.assert_close(by_runs(query, key, value, runs=runs), expected)


def test_gradients_are_those_of_dense_attention() -> None:
    [row] = prefix_rows([[1, 2, 3, 4], [1, 2, 5], [1, 6, 7]], 100)
    tensors = [
        states(0, 1, 4, len(row), 8),
        states(1, 1, 2, len(row), 8),
        states(2, 1, 2, len(row), 8),
    ]
    pull = states(3, 1, len(row), 4, 8)
    gradients = []
    for attend in (
        lambda *t: by_runs(*t, runs=attending(runs_of(row), CPU), scaling=0.5),
        lambda *t: plainly(*t, torch.from_numpy(slow_mask(row)), 0.5),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        gradients.append(torch.autograd.grad((attend(*leaves) * pull).sum(), leaves))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_attention_is_without_dropout_unless_asked_for() -> None:
    [row] = prefix_rows([list(range(40))], 100)
    tensors = [states(i, 1, 2, len(row), 8) for i in range(3)]
    runs = attending(runs_of(row), CPU)
    assert torch.equal(by_runs(*tensors, runs=runs), by_runs(*tensors, runs=runs))
    dropped = by_runs(*tensors, runs=runs, dropout=0.5)
    assert not torch.allclose(dropped, by_runs(*tensors, runs=runs))


@pytest.mark.parametrize(
    "unlike",
    [{"prefix_runs": None}, {"softcap": 30.0}, {"position_bias": torch.zeros(1, 2, 3, 3)}],
    ids=lambda unlike: next(iter(unlike)),
)
def test_what_plain_attention_does_not_do_is_refused_rather_than_left_out(
    unlike: dict[str, Any],
) -> None:
    [row] = prefix_rows([[1, 2, 3]], 100)
    tensors = [states(i, 1, 2, 3, 8) for i in range(3)]
    given_runs = {"prefix_runs": attending(runs_of(row), CPU), **unlike}
    with pytest.raises(ValueError, match="does not attend by runs"):
        run_attention(nn.Module(), *tensors, None, **given_runs)

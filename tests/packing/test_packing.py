"""Packing: the same numbers as a separate pass per sequence, or a refusal; each token once."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from families import (
    CASES,
    ROUTES,
    alone,
    build,
    fresh,
    sharing,
)
from self_judge.packing import packing as packing_module
from self_judge.packing.packing import Packing

# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_next_token_logits_are_those_of_a_separate_pass(name: str, attention: str) -> None:
    seed = fresh()
    model, sequences = build(name, attention, seed), sharing(seed)
    packing = Packing(model, batch_tokens=40)
    assert packing.decision.route == ROUTES[name], packing.decision
    found: dict[int, torch.Tensor] = {}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert sorted(found) == list(range(len(sequences)))
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4, msg=f"seed {seed}, {i}")


@pytest.mark.parametrize("name", [n for n, route in ROUTES.items() if route == "tree"])
def test_under_a_mask_logits_are_those_of_a_separate_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    test_next_token_logits_are_those_of_a_separate_pass(name, "sdpa")


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name", [n for n, route in ROUTES.items() if route == "tree" and "gemma 2" not in n]
)
def test_trees_are_attended_run_by_run_and_walked_in_small_steps(name: str) -> None:
    seed = fresh()
    model, sequences = build(name, seed=seed), sharing(seed)
    packing = Packing(model, batch_tokens=7)
    assert packing.decision.by_segments, packing.decision
    window = packing.decision.longest
    found: dict[int, torch.Tensor] = {}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert window is not None or len(found) == len(sequences)
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4, msg=f"seed {seed}, {i}")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.cpu
def test_what_is_remembered_is_not_computed_again() -> None:
    model = build("llama")
    computed: list[int] = []
    packing = Packing(model, batch_tokens=40)
    list(packing.next_token_logits([[3, 4], [3, 5]]))  # tries the model once
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    context, first, second, third = list(range(3, 33)), [40, 41], [50, 51, 52], [60]
    rounds = [[context + first + second, context + second + first], [context + first + third]]
    with packing.prefix_cache():
        found = [
            row for own in rounds for _, rows in packing.next_token_logits(own) for row in rows
        ]
        # Both orders share the context; the second round takes up context and first response.
        assert sum(computed) == len(context) + 2 * (len(first) + len(second)) + len(third)
        list(packing.next_token_logits(rounds[0]))  # the last token at least is computed again
        assert sum(computed[-2:]) <= 2 + len(third)
    model.model._forward_pre_hooks.clear()
    asked = [sorted(rounds[0])[0], sorted(rounds[0])[1], rounds[1][0]]
    for row, sequence in zip(found, asked, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(row, alone(model, sequence)[-1], rtol=0, atol=1e-4)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    computed.clear()
    list(packing.next_token_logits(rounds[1]))
    assert computed == [len(rounds[1][0])]  # nothing is remembered beyond the block


def test_a_small_memory_forgets_and_gives_the_same_numbers() -> None:
    seed = fresh()
    model, draw = build("llama", seed=seed), random.Random(seed)
    packing = Packing(model, batch_tokens=16)
    sequences = sharing(seed)
    with packing.prefix_cache(limit=2000):
        for _ in range(4):
            own = [[*s, draw.randrange(3, 120)] for s in draw.sample(sequences, 5)]
            for indices, logits in packing.next_token_logits(own):
                for i, row in zip(indices, logits, strict=True):
                    with torch.no_grad():
                        expected = alone(model, own[i])[-1]
                    torch.testing.assert_close(row, expected, rtol=0, atol=1e-4, msg=f"{seed}")


def test_a_consumer_that_stops_early_leaves_no_path_without_its_states() -> None:
    model, draw = build("llama"), random.Random(2)
    packing = Packing(model, batch_tokens=16)
    sequences = [[draw.randrange(3, 120) for _ in range(12)] for _ in range(6)]
    with packing.prefix_cache():
        next(iter(packing.next_token_logits(sequences)))
        found = dict(
            pair
            for indices, logits in packing.next_token_logits(sequences)
            for pair in zip(indices, logits, strict=True)
        )
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            torch.testing.assert_close(found[i], alone(model, sequence)[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", ["tree", "cache", "padding"])
def test_every_way_that_can_be_forced_gives_the_same_numbers(choice: Any) -> None:
    model = build("llama")
    sequences = [*sharing(3), [7], [8]]  # the last two share nothing
    packing = Packing(model, choice)
    assert packing.decision.route == choice
    for indices, logits in packing.next_token_logits(sequences):
        for i, row in zip(indices, logits, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(row, alone(model, sequences[i])[-1], rtol=0, atol=1e-4)


def test_a_shared_token_is_computed_once_and_only_last_positions_reach_the_head() -> None:
    model = build("llama")
    prefix = list(range(3, 43))
    packing = Packing(model)
    assert packing.decision.route == "tree"
    list(packing.next_token_logits([[3, 4], [3, 5]]))  # tries the model once
    computed: list[int] = []
    scored: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda _, args: scored.append(args[0].shape[1]))
    list(packing.next_token_logits([[*prefix, 50, 51], [*prefix, 51, 50]]))
    assert sum(computed) == len(prefix) + 4
    assert sum(scored) == 2


def test_under_a_mask_a_tournament_round_goes_through_a_cache_and_a_comparison_through_a_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing_module, "_by_segments", lambda packing: False)
    model, draw = build("llama"), random.Random(6)

    def prompts(branches: int) -> list[list[int]]:
        prefix = [draw.randrange(3, 120) for _ in range(40)]
        return [prefix + [draw.randrange(3, 120) for _ in range(20)] for _ in range(branches)]

    sequences = [*prompts(16), *prompts(2)]
    packing = Packing(model, batch_tokens=200)
    kinds = {True: 0, False: 0}
    found = {}
    for this in packing.passes(sequences, [np.array([59])] * 18):
        kinds[this.prefix is not None] += len(this.wanted)
    assert kinds == {True: 16, False: 2}
    for indices, logits in packing.next_token_logits(sequences):
        found |= dict(zip(indices, logits, strict=True))
    assert len(found) == 18
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = alone(model, sequence)[-1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("choice", ["auto", "tree", "cache", "padding"])
def test_no_packed_pass_and_no_prefix_of_one_attends_through_cudnn(choice: Any) -> None:
    model = build("llama")
    packing = Packing(model, choice)
    assert packing.decision.route != "off"
    allowed: list[bool] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    list(packing.next_token_logits(sharing(4)))
    assert allowed
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()

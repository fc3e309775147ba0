"""Decoding: the same continuation as of every prompt alone, each prompt computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from conftest import DEVICE
from families import CONFIGS, SIZES, build
from self_judge.inference import decoding, graphed_step
from self_judge.inference.decoding import cache_bytes, decode, why_no_graphs, why_not_shared
from self_judge.inference.prompt_cache import RoomyLayer
from self_judge.runtime import cache_name

STOP = 5
PROMPTS = [[10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
COPIES = [2, 1, 3, 1]
ROWS = [i for i, n in enumerate(COPIES) for _ in range(n)]

FAMILIES = {
    **CONFIGS,
    "mistral, windows in one layer of two": lambda: hf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "deepseek v3, latent attention": lambda: hf.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16,
    ),
    "opt, learned positions": lambda: hf.OPTConfig(
        vocab_size=120, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0,
    ),
}  # fmt: skip
RECURRENT = "mamba 2, recurrent"


class Greedy:
    """Takes the likeliest token, and writes down which rows were asked for."""

    def __init__(self) -> None:
        self.rows = torch.arange(len(ROWS), device=DEVICE)
        self.asked: list[int] = []

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        assert len(ids_BT) == len(logits_BV) == len(self.rows)
        self.asked.append(len(self.rows))
        # Rows that share a prompt part ways: the row's number takes part in the choice.
        favoured = (
            torch.arange(logits_BV.shape[1], device=logits_BV.device) % len(ROWS)
            == self.rows[:, None]
        )
        return (logits_BV + 0.7 * favoured).argmax(-1)

    def keep(self, rows: torch.Tensor) -> None:
        self.rows = self.rows[rows]


def alone(model: Any, row: int, new: int, stop: int = STOP) -> list[int]:
    """The same choices, with a whole pass over one unpadded sequence per token."""
    ids = list(PROMPTS[ROWS[row]])
    for _ in range(new):
        with torch.no_grad():
            output = model(torch.tensor([ids], device=model.device), use_cache=False)
        logits_V = output.logits[0, -1].cpu()
        favoured = torch.arange(len(logits_V)) % len(ROWS) == row
        ids.append(int((logits_V + 0.7 * favoured).argmax()))
        if ids[-1] == stop:
            break
    return ids[len(PROMPTS[ROWS[row]]) :]


def continued(model: Any, draw: Any, new: int = 8, **settings: Any) -> Any:
    return decode(model, PROMPTS, COPIES, draw, stop=[STOP], pad=0, max_new_tokens=new, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != RECURRENT])
def test_every_row_is_what_its_prompt_alone_gives(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "sdpa" and name.startswith("bloom"):
        pytest.skip("Bloom has no SDPA")
    monkeypatch.setitem(CONFIGS, name, FAMILIES[name])
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", {DEVICE: 12})  # several passes, then joined
    model = build(name, attention)
    assert why_not_shared(model) is None
    # A stop token that some rows come to and others do not, so that rows leave.
    first = [alone(model, row, 8, stop=-1) for row in range(len(ROWS))]
    stop = max({t for ids in first for t in ids}, key=lambda t: sum(t in ids[:5] for ids in first))
    draw = Greedy()
    found = decode(model, PROMPTS, COPIES, draw, stop=[stop], pad=0, max_new_tokens=8)
    assert found == [alone(model, row, 8, stop) for row in range(len(ROWS))]
    assert draw.asked[0] == len(ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_one_shape_under_a_mask_continue_as_growing_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA graphs repeat, without a graph."""
    monkeypatch.setitem(CONFIGS, name, FAMILIES[name])
    monkeypatch.setattr(graphed_step, "_TOKENS", 4)  # several widths
    model = build(name, "eager" if name.startswith("bloom") or name == RECURRENT else "sdpa")
    monkeypatch.setattr(decoding, "_GRAPHS", {model.device.type})
    if name == RECURRENT or "window" in name or "ALiBi" in name:
        assert why_no_graphs(model) is not None
        return
    if DEVICE != "cpu" and "captur" in (why_no_graphs(model) or ""):
        return  # some experts read their routing on the CPU
    expected = continued(model, Greedy(), 16, graphs=False)
    assert len({len(ids) for ids in expected}) > 1 or len(expected[0]) == 16
    assert continued(model, Greedy(), 16, graphs=True) == expected
    assert continued(model, Greedy(), 16, graphs=True, look_every=3) == expected
    assert why_no_graphs(model) is None


def test_finished_rows_leave_the_batch() -> None:
    model = build("llama")

    class Scripted(Greedy):
        def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            super().__call__(ids_BT, logits_BV)
            ends = len(self.asked) > self.rows  # row r stops at step r
            return torch.where(ends, STOP, 50 + self.rows)

    draw, seen = Scripted(), []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = continued(model, draw, graphs=False)
    hook.remove()
    assert found == [[50 + row] * row + [STOP] for row in range(len(ROWS))]
    rows = [shape[0] for shape in seen][-6:]
    assert rows == [7, 5, 5, 3, 2, 1]  # a quarter of the batch at a time
    assert len(draw.asked) == len(ROWS)  # and nothing is computed after the last has finished


@pytest.mark.parametrize("every", [2, 3, 8])
def test_how_often_is_looked_for_finished_rows_changes_no_continuation(every: int) -> None:
    model = build("llama")

    class Ends(Greedy):
        """Row r stops at step r."""

        def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            token_B = super().__call__(ids_BT, logits_BV)
            token_B = torch.where(token_B == STOP, STOP + 1, token_B)
            return torch.where(len(self.asked) > self.rows, STOP, token_B)

    expected, looked = continued(model, Ends(), 16), Ends()
    assert [len(ids) for ids in expected] == [1, 2, 3, 4, 5, 6, 7]
    assert continued(model, looked, 16, look_every=every) == expected
    assert len(looked.asked) == -(-7 // every) * every  # up to the look after the last has finished
    assert set(looked.asked[:every]) == {len(ROWS)}
    assert all(n < len(ROWS) for n in looked.asked[2 * every :])


def test_a_batch_takes_the_memory_of_its_cache_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", {"cpu": 12})
    model, rows = build("llama"), []
    memory: set[tuple[tuple[int, int], ...]] = set()

    class Watches(Greedy):
        def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            ends = len(self.asked) >= 2 * self.rows
            return torch.where(ends, STOP, super().__call__(ids_BT, logits_BV))

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        layers = kwargs[cache_name(model)].layers
        if isinstance(layers[0], RoomyLayer):
            held = [states for layer in layers for states in (layer.keys, layer.values)]
            rows.append(len(held[0]))
            storages = [states.untyped_storage() for states in held]
            memory.add(tuple((s.data_ptr(), s.nbytes()) for s in storages))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    continued(model, Watches(), 16, graphs=False)
    hook.remove()
    assert rows[0] == len(ROWS)
    assert rows[-1] == 1  # the others have left
    (once,) = memory
    # As much as the longest prompt and its new tokens need.
    tokens = max(map(len, PROMPTS)) + 16
    assert {nbytes for _, nbytes in once} == {len(ROWS) * tokens * 2 * 8 * 4}


@pytest.mark.parametrize("name", ["llama", "gemma 2, windows in turn"])
def test_under_autocast_the_cache_holds_what_attention_computes_with(name: str) -> None:
    model, types = build(name), set()

    def watch(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        layers = [x for x in kwargs[cache_name(model)].layers if isinstance(x, RoomyLayer)]
        types.update(states.dtype for layer in layers for states in (layer.keys, layer.values))

    with torch.autocast(DEVICE, torch.bfloat16):
        expected = [alone(model, row, 8) for row in range(len(ROWS))]
        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        assert continued(model, Greedy()) == expected
        hook.remove()
        if name == "llama":
            assert cache_bytes(model) == 2 * 2 * 2 * 8 * 2  # layers, K and V, heads, size, bytes
    assert types == {torch.bfloat16}


def test_a_prompts_tokens_are_computed_once_and_reach_the_head_at_the_last_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", {DEVICE: 1})
    model = build("llama")
    computed, scored = [], []
    layer, head = model.model.layers[0], model.lm_head
    hooks = [
        layer.register_forward_hook(lambda _, args, __: computed.append(args[0].shape[:2])),
        head.register_forward_hook(lambda _, args, __: scored.append(args[0].shape[:2].numel())),
    ]
    continued(model, Greedy(), new=1)
    for hook in hooks:
        hook.remove()
    assert sum(shape.numel() for shape in computed) <= 1.25 * sum(map(len, PROMPTS))
    assert sum(scored) == len(PROMPTS)


def test_prompts_of_like_lengths_share_a_pass_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", {DEVICE: 40})
    lengths = [20, 3, 19, 18, 10, 9]
    parts = decoding._parts(model, [[1] * n for n in lengths], [0, 2, 3, 4, 5, 1])
    assert [[lengths[i] for i in part] for part in parts] == [[20, 19], [18], [10, 9], [3]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cache_is_used_whatever_gradient_checkpointing_says(checkpointing: bool) -> None:
    model = build("llama")
    expected = continued(model, Greedy())
    if checkpointing:
        model.gradient_checkpointing_enable()
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda _, args, __: seen.append(args[0].shape[1])
    )
    assert continued(model, Greedy()) == expected
    hook.remove()
    assert seen[-1] == 1


def test_models_for_which_it_would_be_wrong_are_named() -> None:
    assert "keep a state" in (why_not_shared(build(RECURRENT, "eager")) or "")
    model = build("llama")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "virtual tokens" in (why_not_shared(get_peft_model(model, prompt)) or "")


def test_an_adapter_is_sampled_with_and_without() -> None:
    base = build("llama")
    plain = continued(base, Greedy())
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], lora_alpha=64,
                        init_lora_weights=False)  # fmt: skip
    adapted = get_peft_model(base, config).eval()
    assert why_not_shared(adapted) is None
    with_adapter = continued(adapted, Greedy())
    assert with_adapter == [alone(adapted, row, 8) for row in range(len(ROWS))] != plain
    with adapted.disable_adapter():
        assert continued(adapted, Greedy()) == plain


def test_a_model_that_forgets_its_cache_is_caught_by_the_trial() -> None:
    class Forgets(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get(cache_name(self))
            if cache is not None and cache.get_seq_length() > 4:
                cache.layers[0].values *= 0
            return super().forward(*args, **kwargs)

    model = Forgets(CONFIGS["llama"]()).eval()
    model.load_state_dict(build("llama").state_dict())
    assert "in a trial, logits differed by" in (why_not_shared(model) or "")


def test_logits_that_are_not_numbers_are_no_proof() -> None:
    model = build("llama")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    assert "in a trial, logits differed by" in (why_not_shared(model) or "")


@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "deepseek v3, latent attention"])
def test_what_a_token_takes_in_the_cache_is_found_for_every_kind_of_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, name, FAMILIES[name])
    model = build(name)
    output = model(torch.tensor([PROMPTS[0]], device=model.device), use_cache=True)
    cache = output[cache_name(model)]
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert cache_bytes(model) == held / len(PROMPTS[0])
    if name == "llama":
        assert cache_bytes(model) == 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, size, bytes


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("others", [0, 3])
def test_processes_in_step_go_on_until_the_last_has_finished(others: int, every: int) -> None:
    model = build("llama")

    class Ends(Greedy):
        def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
            super().__call__(ids_BT, logits_BV)
            return torch.full((len(self.rows),), STOP, device=DEVICE)

    asked: list[int] = []

    def most(own: int) -> int:
        asked.append(own)
        return max(own, 1 if len(asked) <= others else 0)

    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    found = continued(model, Ends(), 16, max_over_ranks=most, look_every=every)
    hook.remove()
    assert found == [[STOP]] * len(ROWS)
    assert asked == [0] * (1 + others)
    assert (
        len(passes) == (1 + others) * every
    )  # one prefill whatever the lengths, then as the others go


@pytest.mark.skipif(DEVICE != "cuda", reason="captures a graph (SELF_JUDGE_TEST_DEVICE=cuda)")
def test_a_step_that_cannot_be_captured_leaves_pytorch_as_it_was() -> None:
    class Waits(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            assert output.logits[0, 0, 0].item() == output.logits[0, 0, 0].item()
            return output

    model = Waits(CONFIGS["llama"]()).eval().to(DEVICE)
    model.load_state_dict(build("llama").state_dict())
    stream = torch.cuda.current_stream()
    assert "cannot be captured" in (decoding.why_no_graphs(model) or "")
    assert torch.cuda.current_stream() == stream
    assert torch.nn.functional.dropout(torch.ones(1000, device=DEVICE), 0.5).unique().numel() == 2
    torch.cuda.empty_cache()
    assert continued(model, Greedy()) == [alone(model, row, 8) for row in range(len(ROWS))]
    other = build("llama")
    assert decoding.why_no_graphs(other) is None
    assert continued(other, Greedy()) == [alone(other, row, 8) for row in range(len(ROWS))]

"""Seconds, tokens, memory and share of the floor against strong baselines, on three shapes.

The floor of a piece of work is the larger of its FLOPs, for its unique tokens, at the rate of a
large matrix product, and the bytes that it must move at the rate of a copy. The limit is what
sharing allows at most: tokens that the best baseline computes, over the unique ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from measuring import (
    Check,
    Floor,
    allocated,
    clean,
    cudnn_attention,
    gib,
    peak,
    timed,
    weight_bytes,
    with_and_without_cudnn,
)
from project import (
    JSFTTrainer,
    Judge,
    JudgeAugmentedSFTCollator,
    PairSampler,
    SamplingSettings,
    TransformersSampler,
    agreement,
    attending_by_segments,
    bench,
    computed,
    encoder_of,
    jsft_dataset,
    judge_context,
    knockouts,
    needed_of,
    pairs_of,
    plain,
    preference_batch,
    quiet_training,
    records,
    shaped,
    updating,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

Prompts = Sequence[Sequence[int]]
PAIRS = {"smollm2": 256, "1b": 128, "7b": 48}
SIZES = {"smollm2": (8, 32, 128), "1b": (8, 32, 128), "7b": (8, 32)}  # of padded batches


def _each_shape(check: Check, work: Callable[[Check, str], None]) -> None:
    for shape in check.shapes:
        if check.left() < 15:
            check.say(shape=shape, skipped="no time left")
            return
        with check.errors_told(shape=shape):
            work(check, shape)


def _measured(check: Check, floor: Floor, tokens: int, work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, tokens per second, peak above what stood before, share of the floor; the result."""
    clean()
    before = allocated()
    found = timed(check, work)
    least = floor.seconds(check)
    return {
        "seconds": round(found.seconds, 4),
        "first": round(found.first, 3),
        "tokens_per_s": round(tokens / found.seconds),
        "floor": round(least, 5),
        "share_of_floor": round(least / found.seconds, 3),
        "peak_gib": gib(peak()),
        "peak_above_weights_gib": gib(peak() - before),
        "result": found.result,
    }


# -- judging ---------------------------------------------------------------------------------------


def judging(check: Check) -> None:
    """Both orders of real pairs."""
    _each_shape(check, _judging)


def _judging(check: Check, shape: str) -> None:
    model, encoder = shaped(check, shape), encoder_of(check)
    judge = Judge(model, encoder, bench.templates_of(), max_length=1024)
    comparisons = bench.comparisons_of(records(check, 4 if check.tiny else PAIRS[shape]))
    prompts = bench.judge_prompts(judge, comparisons)

    def packed() -> torch.Tensor:
        return judge.letter_probabilities(prompts)

    _judged(check, shape, "judging", judge, prompts, packed)


def _judged(
    check: Check,
    shape: str,
    what: str,
    judge: Judge,
    prompts: Prompts,
    packed: Callable[[], torch.Tensor],
) -> None:
    """Packed against length-sorted padded batches of the best size."""
    model: Any = judge.model
    floor = Floor(bench.flops(model, prompts, len(prompts)), weight_bytes(model))
    about = {"what": what, "shape": shape, "prompts": len(prompts)}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    lengthwise = [prompts[i] for i in order]

    def padded(size: int) -> torch.Tensor:
        found = plain(model, lengthwise, judge.letter_ids, size)
        return found[torch.tensor(order).argsort()]

    best: dict[str, Any] | None = None
    for size in (4,) if check.tiny else SIZES[shape]:
        for cudnn in with_and_without_cudnn():
            side = {"side": f"padded, sorted, {size} a batch", "cudnn": cudnn}
            with check.errors_told(**about, **side), cudnn_attention(cudnn):
                tokens = computed(lengthwise, size)
                found = _measured(check, floor, sum(map(len, prompts)), lambda s=size: padded(s))
                found["computed"] = tokens
                _say(check, found, **about, **side)
                if best is None or found["seconds"] < best["seconds"]:
                    best = found
    ours = _measured(check, floor, sum(map(len, prompts)), packed)
    unique = bench.unique_tokens(prompts)
    compared = {}
    if best is not None:
        limit, ratio = best["computed"] / unique, best["seconds"] / ours["seconds"]
        compared = {
            "limit": round(limit, 2),
            "ratio": round(ratio, 2),
            "ratio_over_limit": round(ratio / limit, 3),
            "agrees": agreement(ours["result"], best["result"]),
        }
    way = bench.way(judge.packing)
    _say(check, ours, **about, side="packed", unique=unique, **compared, way=way[:240])
    # The way not taken. Rounds of a tournament share a prefix cache only by segments, which a GPU
    # is not given before they were measured on one.
    segments = not judge.packing.decision.by_segments
    side = {"side": "packed, by segments" if segments else "packed, under masks"}
    with check.errors_told(**about, **side), attending_by_segments(segments):
        found = _measured(check, floor, sum(map(len, prompts)), packed)
        over = round(ours["seconds"] / found["seconds"], 2)
        agrees = agreement(ours["result"], found["result"])
        _say(check, found, **about, **side, over_packed=over, agrees=agrees)


def _say(check: Check, found: dict[str, Any], **about: Any) -> None:
    check.say(**about, **{k: v for k, v in found.items() if k != "result"})


# -- a tournament ----------------------------------------------------------------------------------


def tournaments(check: Check) -> None:
    """Of 16 responses; the baseline judges all matches at once, which a bracket cannot."""
    _each_shape(check, _tournament)


def _tournament(check: Check, shape: str) -> None:
    contexts, responses, new = (2, 4, 6) if check.tiny else (16, 16, 64)
    if shape == "7b":
        contexts = 4
    model, encoder = shaped(check, shape), encoder_of(check)
    own = records(check, contexts)
    judge = Judge(model, encoder, bench.templates_of(), max_length=1024)
    sampler = TransformersSampler(model, encoder, SamplingSettings(max_new_tokens=new, top_p=0.9))
    drawn = sampler.sample([encoder.encode_prompt(r.prompt) for r in own], responses, seeds=0)
    rounds: list[list[list[int]]] = []

    def compare(comparisons: Any) -> Any:
        rounds.append(bench.judge_prompts(judge, comparisons))
        return judge.compare(comparisons)

    texts = [[r.text for r in answers] for answers in drawn]
    knockouts(compare, [judge_context(r) for r in own], texts, seeds=list(range(len(own))))
    every = [prompt for own_round in rounds for prompt in own_round]

    def packed() -> torch.Tensor:
        with judge.prefix_cache():
            return torch.cat([judge.letter_probabilities(own_round) for own_round in rounds])

    _judged(check, shape, f"tournament of {responses}", judge, every, packed)


# -- the update, and JSFT --------------------------------------------------------------------------


def updates(check: Check) -> None:
    """Policy, gradients and reference of real pairs, LoRA, against DPOTrainer."""
    _each_shape(check, _update)


def _update(check: Check, shape: str) -> None:
    count, size = (4, 2) if check.tiny else (16, 8)
    encoder = encoder_of(check)
    pairs = pairs_of(check, encoder, count)
    batches = [
        preference_batch(pairs[i : i + size], 0, max_length=1024) for i in range(0, count, size)
    ]
    inputs = [{k: v.to(check.device) for k, v in batch.items()} for batch in batches]
    sequences = [[*p, *side][:1024][:-1] for p, *sides, _ in pairs for side in sides]
    targets = sum(int(b["completion_mask"].sum()) for b in batches)
    padded = sum(b["input_ids"].numel() for b in batches)

    def make(name: str, checkpointing: bool) -> Any:
        if name == "packed":
            return updating(check, shaped(check, shape), gradient_checkpointing=checkpointing)
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        return DPOTrainer(
            model=shaped(check, shape),
            args=DPOConfig(
                **quiet_training(check, gradient_checkpointing=checkpointing, max_length=1024)
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=encoder.tokenizer,
            peft_config=bench.lora(),
        )

    # The reference's forward and the policy's, and in the backward pass of LoRA once more: the
    # gradients of activations, but none of the frozen weights.
    _trained(check, shape, "update", make, ("DPOTrainer", "packed"), inputs, [sequences], [targets],
             padded, passes=3)  # fmt: skip


def jsft(check: Check) -> None:
    """A JSFT step, LoRA, against SFTTrainer on the same batches."""
    _each_shape(check, _jsft)


def _jsft(check: Check, shape: str) -> None:
    count, size = (4, 2) if check.tiny else (32, 16)
    encoder, templates = encoder_of(check), bench.templates_of()
    letters = encoder.letter_ids(templates)
    dataset, _ = jsft_dataset(records(check, count), encoder, templates, letters, max_length=1024)
    examples = [dataset[i] for i in list(PairSampler(dataset["swapped"], seed=0))[:count]]
    collate = JudgeAugmentedSFTCollator(encoder.tokenizer)
    groups = [examples[i : i + size] for i in range(0, len(examples), size)]
    inputs = [{k: v.to(check.device) for k, v in collate(own).items()} for own in groups]

    def make(name: str, checkpointing: bool) -> Any:
        args = quiet_training(check, gradient_checkpointing=checkpointing, max_length=None)
        return (JSFTTrainer if name == "packed" else SFTTrainer)(
            model=shaped(check, shape),
            args=SFTConfig(**args),
            data_collator=collate,
            train_dataset=dataset,
            processing_class=encoder.tokenizer,
            peft_config=bench.lora(),
        )

    needed = [[needed_of(e) for e in own] for own in groups]
    targets = [sum(label != -100 for e in own for label in e["labels"]) for own in groups]
    padded = sum(batch["input_ids"].numel() for batch in inputs)
    _trained(check, shape, "JSFT", make, ("SFTTrainer", "packed"), inputs, needed, targets, padded,
             passes=2)  # fmt: skip


def _trained(
    check: Check,
    shape: str,
    what: str,
    make: Callable[[str, bool], Any],
    sides: tuple[str, str],
    inputs: list[dict[str, torch.Tensor]],
    sequences: list[list[Any]],
    targets: list[int],
    padded: int,
    passes: int,
) -> None:
    """TRL's trainer, then ours, with the same checkpointing."""
    unique = sum(map(bench.unique_tokens, sequences))
    ways = (False, True) if shape != "7b" else (True,)
    if check.tiny:
        ways = (True,)
    for checkpointing in ways:
        about = {"what": what, "shape": shape, "checkpointing": checkpointing}
        found: dict[str, dict[str, Any]] = {}
        for name in sides:
            if check.left() < 10:
                check.say(**about, side=name, skipped="no time left")
                return
            with check.errors_told(**about, side=name):
                trainer = make(name, checkpointing)
                trainer.model.train()
                inner = trainer.model.get_base_model()
                own = zip(sequences, targets, strict=True)
                flops = sum(bench.flops(inner, one, scored) for one, scored in own)
                again = passes + checkpointing  # the forward pass is made again
                floor = Floor(again * flops, again * weight_bytes(inner))

                def step(trainer: Any = trainer) -> list[float]:
                    with trainer.accelerator.autocast():
                        return bench.losses_of(trainer, inputs)

                found[name] = _measured(check, floor, unique, step)
                compared = {}
                if name == "packed" and sides[0] in found:
                    theirs = found[sides[0]]
                    limit, ratio = padded / unique, theirs["seconds"] / found[name]["seconds"]
                    ours_above, above = (f["peak_above_weights_gib"] for f in (found[name], theirs))
                    compared = {
                        "limit": round(limit, 2),
                        "ratio": round(ratio, 2),
                        "ratio_over_limit": round(ratio / limit, 3),
                        "memory_ratio": round(ours_above / above, 2) if above else None,
                        "agrees": bench.gap([found[name]["result"], theirs["result"]]),
                    }
                way = trainer.packing.describe()[:200] if name == "packed" else None
                _say(check, found[name], **about, side=name, unique=unique, padded=padded,
                     **compared, way=way)  # fmt: skip
            trainer = inner = None
            gc.collect()


# -- sampling --------------------------------------------------------------------------------------


def sampling(check: Check) -> None:
    """Two responses to each prompt, our decoding against `generate`."""
    _each_shape(check, _sampling)


def _sampling(check: Check, shape: str) -> None:
    model, encoder = shaped(check, shape), encoder_of(check)
    new = 6 if check.tiny else 128
    for rows in (4,) if check.tiny else (64, 256):
        if check.left() < 10:
            check.say(shape=shape, rows=rows, skipped="no time left")
            return
        prompts = [encoder.encode_prompt(r.prompt)[-300:] for r in records(check, rows // 2)]
        settings = SamplingSettings(max_new_tokens=new, top_p=0.9)
        sampler = TransformersSampler(model, encoder, settings, rows)

        def ours(sampler: Any = sampler, prompts: Any = prompts) -> int:
            drawn = sampler.sample(prompts, 2, seeds=0)
            return sum(len(r.ids) for own in drawn for r in own)

        floor = _decoding_floor(model, prompts, new)
        found: dict[str, dict[str, Any]] = {}
        for side, work in (
            ("generate", lambda p=prompts: _generate(model, p, new, encoder.tokenizer)),
            ("shared prompts", ours),
        ):
            # Our decoding switches cuDNN attention off by itself.
            for cudnn in with_and_without_cudnn() if side == "generate" else (False,):
                about = {"what": "sampling", "shape": shape, "rows": rows, "side": side}
                with check.errors_told(**about, cudnn=cudnn), cudnn_attention(cudnn):
                    one = _measured(check, floor, 1, work)
                    tokens = one["result"]
                    one["tokens_per_s"] = round(tokens / one["seconds"])
                    one["ms_a_step"] = round(1e3 * one["seconds"] / new, 2)
                    if torch.cuda.is_available():
                        one["reserved_gib"] = gib(torch.cuda.max_memory_reserved())
                    if side not in found or one["seconds"] < found[side]["seconds"]:
                        found[side] = one
                    _say(check, one, **about, cudnn=cudnn, tokens=tokens)
        if len(found) == 2:
            theirs, mine = (found[s]["tokens_per_s"] for s in ("generate", "shared prompts"))
            check.say(what="sampling", shape=shape, rows=rows, ratio=round(mine / theirs, 2))


def _decoding_floor(model: Any, prompts: Prompts, new: int) -> Floor:
    """Every step reads the weights and the keys and values of every row."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    held = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    cache = sum(2 * new * (len(p) + new / 2) * held for p in prompts)
    weights = sum(p.numel() for p in model.parameters())
    tokens = sum(len(p) + 2 * new for p in prompts)
    return Floor(2.0 * weights * tokens, (new + 1) * weight_bytes(model) + cache)


@torch.no_grad()
def _generate(model: Any, prompts: Prompts, new: int, tokenizer: Any) -> int:
    """Tokens that `generate` samples, every prompt twice, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new,
        num_return_sequences=2,
        do_sample=True,
        top_p=0.9,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ended = (output[:, width:] == tokenizer.eos_token_id).int().cumsum(1)
    # Up to the end of turn, itself included.
    return int((ended - (output[:, width:] == tokenizer.eos_token_id).int() == 0).sum())

"""Exactness of every route: next-token logits, and losses with gradients, against float64.

Beside each of our errors stands that of the plain way in the same dtype: one sequence alone, or
TRL's padded batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers as hf
from measuring import Check, clean
from project import Packing, built, pack_fused_head, why_no_graphs, why_not_shared
from trl.trainer.utils import add_fused_lm_head

VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NINE_HEADS = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
# Family: configuration and attention. Soft-capped scores are not in SDPA.
FAMILIES: dict[str, tuple[Any, str]] = {
    "llama": (hf.LlamaConfig(**SIZES), "sdpa"),
    "llama, 9 heads of 64": (hf.LlamaConfig(**{**SIZES, **NINE_HEADS}), "sdpa"),
    "qwen3": (hf.Qwen3Config(**SIZES, head_dim=32), "sdpa"),
    "gemma2": (hf.Gemma2Config(**SIZES, head_dim=32, sliding_window=24), "eager"),
    "mistral, window 24": (hf.MistralConfig(**SIZES, sliding_window=24), "sdpa"),
    "mixtral": (hf.MixtralConfig(**SIZES, num_local_experts=4), "sdpa"),
    "bloom": (
        hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4, bos_token_id=1,
                       eos_token_id=2, hidden_dropout=0, attention_dropout=0),
        "eager",
    ),
}  # fmt: skip
CHOICES = ("auto", "tree", "cache", "padding")


def exact(check: Check) -> None:
    """Every family in both dtypes by every route that it takes."""
    families = list(FAMILIES)[:1] if check.tiny else list(FAMILIES)
    for name in families:
        for dtype in (torch.float32, torch.bfloat16):
            about = {"family": name, "dtype": str(dtype)[6:]}
            with check.errors_told(**about):
                for one in routes(check, name, dtype):
                    check.say(**about, **one)
            if name != "bloom":  # not in TRL's fused head with a cache and a padded mask
                with check.errors_told(**about):
                    check.say(**about, **gradients(check, name, dtype))


def _true(config: Any) -> torch.dtype:
    """The dtype of the reference: grouped matrix products of experts take no float64."""
    return torch.float32 if config.model_type == "mixtral" else torch.float64


def _sharing(seed: int, count: int = 5, longest: int = 60) -> list[list[int]]:
    """Sequences with prefixes in common, on two levels."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]

    sequences = []
    for _ in range(count):
        root = tokens(4, longest)
        for _ in range(2):
            branch = root + tokens(1, 8)
            sequences += [branch + tokens(1, 20) for _ in range(2)]
    draw.shuffle(sequences)
    return sequences


@torch.no_grad()
def routes(
    check: Check,
    name: str,
    dtype: torch.dtype,
    attention: str | None = None,
    choices: Sequence[str] = CHOICES,
) -> Iterator[dict[str, Any]]:
    """Next-token logits by every choice, against a reference that sees one sequence at a time."""
    config, usual = FAMILIES[name]
    attention = attention or usual
    sequences = _sharing(3, count=2 if check.tiny else 5)
    reference = built(config, usual, _true(config), check.device)
    ids = [torch.tensor([s], device=check.device) for s in sequences]
    expected = [reference(own).logits[0, -1].double() for own in ids]
    plain = built(config, usual, dtype, check.device)
    alone = [plain(own, use_cache=False).logits[0, -1].double() for own in ids]
    for choice in choices:
        model = built(config, attention, dtype, check.device)
        try:
            packing = Packing(model, choice)
        except ValueError as refused:
            yield {"asked": choice, "refused": str(refused)[:160]}
            continue
        found: dict[int, torch.Tensor] = {}
        for places, logits in packing.next_token_logits(sequences):
            found |= dict(zip(places, logits.double(), strict=True))
        one: dict[str, Any] = {
            "asked": choice,
            "route": packing.decision.route,
            "off": _worst([found[i] for i in range(len(sequences))], expected),
            "alone_off": _worst(alone, expected),
        }
        if choice == "auto":
            own_decoding = why_not_shared(model) or "shared prompts"
            graphs = why_no_graphs(model) or "used"
            one |= {"why": packing.describe()[:200], "decoding": own_decoding[:160]}
            one |= {"graphs": graphs[:160]}
        yield one


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative error of all rows."""
    pairs = zip(found, expected, strict=True)
    return float(f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.1e}")


def gradients(
    check: Check, name: str, dtype: torch.dtype, attention: str | None = None
) -> dict[str, float]:
    """Loss and gradients through TRL's fused head: packed, and padded as TRL does it."""
    config, usual = FAMILIES[name]
    sequences = _sharing(5, count=3, longest=20)
    batch = {k: v.to(check.device) for k, v in _batch(sequences).items()}
    losses: dict[str, float] = {}
    found: dict[str, torch.Tensor] = {}
    for side in ("true", "packed", "padded"):
        own = _true(config) if side == "true" else dtype
        how = attention if attention and side == "packed" else usual
        model = built(config, how, own, check.device).train()
        if side == "true":
            loss = _plain_loss(model, **batch)
        else:
            add_fused_lm_head(model)
            if side == "packed":
                pack_fused_head(model)
            loss = model(**batch, fused_lm_head=True).loss
        loss.backward()
        losses[side] = loss.item()
        parts = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        found[side] = torch.cat(parts)
        clean()
    off = {}
    for side in ("packed", "padded"):
        gap = (found[side] - found["true"]).norm() / found["true"].norm()
        off[f"{side}_loss_off"] = float(f"{abs(losses[side] - losses['true']):.1e}")
        off[f"{side}_gradient_off"] = float(f"{float(gap):.1e}")
    return off


def _batch(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """Padded on the right; the second half of each sequence is trained."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, own in enumerate(sequences):
        ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
        labels[row, len(own) // 2 : len(own)] = ids[row, len(own) // 2 : len(own)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _plain_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    log_probs = output.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    scored = targets != -100
    own = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(own * scored).sum() / scored.sum()

"""Provides a sampler for the policy in training, with Transformers or vLLM.

This module does not judge or train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl.models.utils import unwrap_model_for_generation

from self_judge.inference.sampling import Sampler, TransformersSampler
from self_judge.packing.fused_head import FUSED_HEAD
from self_judge.training.identity.reference import active_reference


@contextmanager
def policy_sampler(trainer: Any) -> Iterator[Sampler]:
    """Provides a sampler for the current policy of a `SelfJudgeTrainer`."""
    if trainer.vllm is not None:
        yield trainer.vllm.sampler(active_reference(trainer))
        return
    args = trainer.args
    # In training mode with gradient checkpointing, generation would silently disable the KV cache.
    checkpointing: dict[str, Any] = {}
    if FUSED_HEAD:  # TRL 1.14 lacks this argument
        checkpointing["gradient_checkpointing_kwargs"] = args.gradient_checkpointing_kwargs
    with unwrap_model_for_generation(
        trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=True, **checkpointing
    ) as policy:
        yield TransformersSampler(
            policy,
            trainer.encoder,
            args.sampling(),
            args.generation_batch_size,
            batch_tokens=args.generation_batch_tokens,
            max_over_ranks=trainer.max_over_ranks,
        )

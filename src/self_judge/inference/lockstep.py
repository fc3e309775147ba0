"""Lockstep: processes that hold parts of one model make the same number of forward passes.

Under FSDP and ZeRO-3 a forward pass is a meeting of all processes. How many passes a process needs
for its own prompts differs, so those with fewer go on with passes for nothing until all are done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from self_judge.config.self_training import PackingChoice
from self_judge.inference.decoding import MaxOverRanks
from self_judge.packing.packing import Decision, Packing, needs_one_pass


def check_processes(accelerator: Accelerator) -> None:
    """Raises `ValueError` when the launcher asked for other processes than Accelerate runs.

    Without this, processes that do not know of each other train into one folder, and a model that
    was to be sharded is not, all with exit status 0.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    kind = str(accelerator.distributed_type.value)
    if accelerator.num_processes != launched or (launched > 1 and kind == "NO"):
        raise ValueError(
            f"{launched} processes were launched (WORLD_SIZE), and this one takes part in a run of "
            f"{accelerator.num_processes} ({kind}): they would train apart and into one folder. "
            "Launch with a file of configs/accelerate and --num_processes"
        )
    if launched == 1:
        return
    for asked in ("FSDP", "DEEPSPEED"):
        wanted = os.environ.get(f"ACCELERATE_USE_{asked}", "false").lower() in ("1", "true")
        if wanted and kind != asked:
            raise ValueError(
                f"{asked} was asked for, and {kind} is what Accelerate makes of it here: the model "
                "would not be sharded. Launch with configs/accelerate/ddp.yaml, or on GPUs"
            )


def max_over_ranks(accelerator: Accelerator) -> MaxOverRanks | None:
    """The largest of a number over all processes where they share a model; else `None`."""
    if accelerator.num_processes == 1 or not needs_one_pass(accelerator.distributed_type):
        return None

    def largest(own: int) -> int:
        number = torch.tensor(own, device=accelerator.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    return largest


class LockstepPacking(Packing):
    """Packing for logits of a model that processes share: every pass is one that all make.

    After its last call each process calls `finish`, which returns when all have.

    Args:
        model, choice: see `Packing`; `off` is taken as `padding`.
        batch_rows: half the prompts of a pass: both orders of a comparison share a row.
        max_over_ranks: the largest of a number over all processes.
        batch_tokens: tokens of a row at most.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        choice: PackingChoice,
        *,
        batch_rows: int,
        max_over_ranks: MaxOverRanks,
        batch_tokens: int | None = None,
    ) -> None:
        chosen: PackingChoice = "padding" if choice == "off" else choice
        super().__init__(model, chosen, batch_tokens=batch_tokens, one_pass=True)
        self.batch_rows = batch_rows
        self.max_over_ranks = max_over_ranks

    @property
    def decision(self) -> Decision:
        """The route; trying it takes forward passes, so all processes ask at the same time.

        Raises:
            ValueError: the model cannot be packed, and its passes could not be counted.
        """
        decision = super().decision
        if decision.route == "off":
            raise ValueError(f"a model spread over processes cannot judge: {decision.reason}")
        return decision

    def next_token_logits(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """As `Packing` does, in passes of so many rows, each announced to the others."""
        size = 2 * self.batch_rows
        for start in range(0, len(sequences), size):
            self.max_over_ranks(1)
            for numbers, logits in super().next_token_logits(sequences[start : start + size]):
                yield [start + n for n in numbers], logits

    def finish(self) -> None:
        """Goes along with the passes of the processes that are not done yet."""
        while self.max_over_ranks(0):
            passed: Any = super().next_token_logits([[0]])
            list(passed)

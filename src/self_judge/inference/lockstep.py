"""Lockstep: all processes with a shard of a model run the same number of forward passes.

With FSDP and ZeRO-3, all processes take part in every forward pass, because each process stores
only part of the weights. A process that needs fewer passes runs empty passes until all processes
are done.
"""

# In this example, process 0 needs three passes for its prompts, and process 1 needs one. Before
# every pass, each process contributes a number, and all processes receive the maximum. The number
# is 1 if the process has another pass to run, and 0 if it is done.
#
#   exchange       1        2        3        4
#   process 0      1 pass   1 pass   1 pass   0
#   process 1      1 pass   0 empty  0 empty  0        (in `finish` from exchange 2 on)
#   maximum        1        1        1        0        all leave `finish` together
#
# Without empty passes, process 0 would wait forever in its second pass for the weights of process
# 1.

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from self_judge.config.self_training import PackingChoice
from self_judge.inference.decoding import MaxOverRanks
from self_judge.packing.packing import Decision, Packing, needs_one_pass


def check_processes(accelerator: Accelerator) -> None:
    """Raises `ValueError` if Accelerate ignores launched processes or the requested sharding.

    Without this check, the processes would train separately in the same folder, or a model would
    not be sharded although sharding was requested. The exit status would still be 0.
    """
    check_connected(accelerator)
    if accelerator.num_processes == 1:
        return
    kind = str(accelerator.distributed_type.value)
    for asked in ("FSDP", "DEEPSPEED"):
        wanted = os.environ.get(f"ACCELERATE_USE_{asked}", "false").lower() in ("1", "true")
        if wanted and kind != asked:
            raise ValueError(
                f"{asked} was requested, but Accelerate uses {kind} on this machine: the model "
                "would not be sharded. Launch with configs/accelerate/ddp.yaml, or on GPUs"
            )


def check_connected(state: Accelerator | PartialState) -> None:
    """Raises `ValueError` if Accelerate ignores launched processes."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    kind = str(state.distributed_type.value)
    if state.num_processes != launched or (launched > 1 and kind == "NO"):
        raise ValueError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate uses "
            f"{state.num_processes} ({kind}): the processes would train separately in the "
            "same folder. Launch with a file from configs/accelerate and --num_processes"
        )


def max_over_ranks(accelerator: Accelerator) -> MaxOverRanks | None:
    """Returns a function that computes the maximum of a number over all processes.

    Returns `None` if the model is not sharded.
    """
    if accelerator.num_processes == 1 or not needs_one_pass(accelerator.distributed_type):
        return None

    def largest(own: int) -> int:
        number = torch.tensor(own, device=accelerator.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    return largest


class LockstepPacking(Packing):
    """Computes logits with a sharded model. All processes take part in every packed pass.

    After its last call to `next_token_logits`, each process calls `finish`, which returns when all
    processes have called it.

    Args:
        model, choice: see `Packing`; `off` is treated as `padding`.
        batch_rows: half the number of prompts in a pass, because both orders of a comparison share
            a row.
        max_over_ranks: a function that returns the maximum of a number over all processes.
        batch_tokens: the maximum number of tokens in a row.
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
        """The packing mode. All processes must access this property together.

        The first access may run a trial with forward passes, in which all processes take part.

        Raises:
            ValueError: the model cannot be packed, so its passes cannot be counted.
        """
        decision = super().decision
        if decision.route == "off":
            raise ValueError(f"a sharded model cannot judge: {decision.reason}")
        return decision

    def next_token_logits(
        self, sequences: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yields the same values as `Packing`, in passes that all processes run together."""
        size = 2 * self.batch_rows
        for start in range(0, len(sequences), size):
            self.max_over_ranks(1)
            for numbers, logits in super().next_token_logits(sequences[start : start + size]):
                yield [start + n for n in numbers], logits

    def finish(self) -> None:
        """Runs empty passes until every process is done."""
        while self.max_over_ranks(0):
            passed: Any = super().next_token_logits([[0]])
            list(passed)

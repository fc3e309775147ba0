"""How much memory a run needs on each process, from a model's size and what a step holds at once.

Plain arithmetic, each constant with its origin. It does not know data or run files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from self_judge.check.model_size import FourBits, Kept, Size

Sharding = Literal["none", "zero2", "zero3", "fsdp"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """What computes.

    Attributes:
        memory: bytes; 0 where nobody knows.
        resident: bytes that are taken before any tensor is there.
    """

    name: str
    memory: int
    resident: int = GIB


GPUS: dict[str, Device] = {
    "rtx-3090": Device("RTX 3090", 24 * GIB),
    "rtx-4090": Device("RTX 4090", 24 * GIB),
    "a10": Device("A10", 24 * GIB),
    "l4": Device("L4", 24 * GIB),
    "l40s": Device("L40S", 48 * GIB),
    "a100-40gb": Device("A100 40 GB", 40 * GIB),
    "a100-80gb": Device("A100 80 GB", 80 * GIB),
    "h100": Device("H100 80 GB", 80 * GIB),
    "h200": Device("H200", 141 * GIB),
}


def this_cpu(meminfo: Path = Path("/proc/meminfo")) -> Device:
    """This machine without a GPU.

    What the process itself takes was measured with SmolLM2-135M (benchmarks/RESULTS.md).
    """
    memory = 0
    if meminfo.is_file():
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemTotal"))
        memory = int(line.split()[1]) * 1024
    return Device("this CPU", memory, resident=int(1.1 * GIB))


@dataclass(frozen=True, slots=True)
class Setting:
    """How a run trains.

    Attributes:
        reference: a second, frozen copy of all weights is held (full fine-tuning with a judge).
        checkpointing: gradient checkpointing.
        bf16: computing is under autocast to bfloat16.
        optimizer: as `training_args.optim` names it.
        processes, sharding: over how many processes what is spread.
        four_bits: how the weights below the adapter are kept.
    """

    reference: bool = False
    checkpointing: bool = True
    bf16: bool = True
    optimizer: str = "adamw_torch"
    processes: int = 1
    sharding: Sharding = "none"
    four_bits: FourBits = "no"


@dataclass(frozen=True, slots=True)
class Work:
    """One optimizer step on one process; lengths in tokens.

    Attributes:
        tokens: that the update computes in the step, each shared one once.
        largest: (rows, tokens) of the largest micro-batch, whose activations are held at once.
        largest_scored: positions of it that the head scores.
        sampled_at_once: responses that are sampled together; 0 where nothing is sampled.
        sampled_length: of a prompt and its response at its longest.
        judged_at_once: tokens of one pass of the judge.
    """

    tokens: float
    largest: tuple[int, int]
    largest_scored: int
    sampled_at_once: int = 0
    sampled_length: float = 0.0
    judged_at_once: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one process.

    Attributes:
        weights, reference, gradients, optimizer: held throughout.
        activations: of the largest micro-batch, at the start of its backward pass.
        head: of scoring responses.
        cache: of sampling, prompts and responses at their longest, and a sharded model made whole.
        judging: of one pass of the judge, without gradients.
        resident: of the process itself.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    cache: int
    judging: int
    resident: int

    @property
    def held(self) -> int:
        """What stands in every phase."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.resident

    @property
    def phases(self) -> dict[str, int]:
        """What each phase takes beside that."""
        update = self.activations + self.head
        return {"update": update, "sampling": self.cache, "judging": self.judging}

    @property
    def peak(self) -> int:
        """In the largest phase."""
        return self.held + max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


# TRL's fused head works in tiles of N tokens and N words, each a few times in float32.
_TILE_TOKENS, _TILE_WORDS, _TILE_COPIES = 4096, 32_768, 3
# Copies of the hidden state and of the inside of one layer that a pass without gradients holds.
_INFERENCE_COPIES = 16


def memory(size: Size, kept: Kept, work: Work, setting: Setting, device: Device) -> Memory:
    """Of one process; `kept` is for `work.largest`."""
    n = setting.processes
    spread = n if setting.sharding in ("zero3", "fsdp") else 1
    weights, gradients = size.weight_bytes, size.trainable_bytes
    moments = _moments(setting.optimizer) * gradients
    deepspeed = setting.sharding in ("zero2", "zero3") and setting.bf16
    if deepspeed:
        # DeepSpeed computes in bfloat16 and keeps float32 weights beside the moments.
        weights, gradients = 2 * size.parameters, 2 * size.trainable
        moments = 4 * size.trainable * (1 + _moments(setting.optimizer))
    gathered = 0
    if spread > 1:  # one layer is whole at a time, and the next one is fetched meanwhile
        gathered = 2 * 2 * size.matrix // size.layers
    elif setting.bf16 and not deepspeed and size.weight_bytes > 3 * size.parameters:
        gathered = 2 * size.matrix  # autocast keeps a bfloat16 copy of float32 weights
    over = n if setting.sharding != "none" else 1
    sampled = work.sampled_at_once
    # TRL gathers a sharded model whole to sample from it.
    whole = 2 * size.parameters if spread > 1 and sampled else 0
    kept_bytes = kept.checkpoints if setting.checkpointing else kept.kept
    tile = min(work.largest_scored, _TILE_TOKENS) * min(size.vocabulary, _TILE_WORDS)
    element = 2 if setting.bf16 or weights < 3 * size.parameters else 4
    return Memory(
        weights=weights // spread + gathered,
        reference=weights // spread if setting.reference else 0,
        gradients=gradients // over,
        optimizer=round(moments / over),
        # The gradients of a layer stand beside what was kept of it.
        activations=kept_bytes + kept.layer * (2 if setting.checkpointing else 1),
        head=tile * 4 * _TILE_COPIES + work.largest_scored * size.hidden * 8,
        cache=whole
        + round(sampled * work.sampled_length) * size.cache_bytes
        + sampled * size.vocabulary * 4 * 4,
        judging=work.judged_at_once * size.hidden * element * _INFERENCE_COPIES,
        resident=device.resident,
    )


def _moments(optimizer: str) -> float:
    """How often the trainable weights are held by the optimizer."""
    name = optimizer.lower()
    if "8bit" in name or "bnb" in name:
        return 0.5
    if "adafactor" in name or name.startswith("sgd"):
        return 0.0
    return 2.0

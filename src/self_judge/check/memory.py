"""Estimates the memory of each process from the size of a model and the work in a step.

Apart from `this_cpu`, this module only does arithmetic. It does not depend on data or run files.
"""

# The estimate is the memory in use in every phase (held) plus the memory of the largest phase:
#
#   held     weights + reference + gradients + optimizer + resident
#   phases   update:    activations of the largest micro-batch + head
#            sampling:  KV cache (+ the whole model if it is sharded)    peak = held + the largest
#            judging:   one pass of the judge, without gradients

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from self_judge.check.model_size import FourBits, Kept, Size

Sharding = Literal["none", "zero2", "zero3", "fsdp"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """A device and its memory.

    Attributes:
        memory: bytes; 0 if unknown.
        resident: bytes in use before any tensor is allocated.
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
    """Returns the CPU of this machine as a device.

    The memory for the process itself was measured with SmolLM2-135M (benchmarks/RESULTS.md).
    """
    memory = 0
    if meminfo.is_file():
        line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemTotal"))
        memory = int(line.split()[1]) * 1024
    return Device("this CPU", memory, resident=int(1.1 * GIB))


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings that determine the memory of a run.

    Attributes:
        reference: whether there is a frozen copy of all weights (full fine-tuning with a judge).
        checkpointing: whether gradient checkpointing is on.
        bf16: whether autocast to bfloat16 is on.
        optimizer: the name in `training_args.optim`.
        processes, sharding: the number of processes, and how they shard the model.
        four_bits: how the base model's weights are stored.
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
    """The work in one optimizer step on one process, with lengths in tokens.

    Attributes:
        tokens: the number of tokens that the update processes. Shared tokens are counted once.
        largest: (rows, tokens) of the largest micro-batch, whose activations are all in memory at
            the same time.
        largest_scored: the number of tokens in this micro-batch that the head scores.
        sampled_at_once: the number of responses that are sampled together; 0 without sampling.
        sampled_length: the number of tokens in a prompt and a response of maximum length.
        judged_at_once: the number of tokens in one forward pass of the judge.
    """

    tokens: float
    largest: tuple[int, int]
    largest_scored: int
    sampled_at_once: int = 0
    sampled_length: float = 0.0
    judged_at_once: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one process, in bytes.

    Attributes:
        weights, reference, gradients, optimizer: memory that is in use in every phase.
        activations: the activations of the largest micro-batch at the start of its backward pass.
        head: memory for scoring responses.
        cache: memory for sampling responses of maximum length, including the gathered model if the
            model is sharded.
        judging: memory for one forward pass of the judge, without gradients.
        resident: memory for the process itself.
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
        """The memory that is in use in every phase."""
        return self.weights + self.reference + self.gradients + self.optimizer + self.resident

    @property
    def phases(self) -> dict[str, int]:
        """The additional memory in each phase."""
        update = self.activations + self.head
        return {"update": update, "sampling": self.cache, "judging": self.judging}

    @property
    def peak(self) -> int:
        """The memory in the largest phase."""
        return self.held + max(self.phases.values())

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


# TRL's fused head processes tiles of tokens × vocabulary and keeps a few float32 copies of each
# tile.
_TILE_TOKENS, _TILE_WORDS, _TILE_COPIES = 4096, 32_768, 3
# The memory for a forward pass without gradients, as a number of copies of the hidden state.
_INFERENCE_COPIES = 16


def memory(size: Size, kept: Kept, work: Work, setting: Setting, device: Device) -> Memory:
    """Estimates the memory of one process. `kept` must be computed for `work.largest`."""
    n = setting.processes
    spread = n if setting.sharding in ("zero3", "fsdp") else 1
    weights, gradients = size.weight_bytes, size.trainable_bytes
    moments = _moments(setting.optimizer) * gradients
    deepspeed = setting.sharding in ("zero2", "zero3") and setting.bf16
    if deepspeed:
        # DeepSpeed computes in bfloat16 and keeps float32 weights alongside the moments.
        weights, gradients = 2 * size.parameters, 2 * size.trainable
        moments = 4 * size.trainable * (1 + _moments(setting.optimizer))
    gathered = 0
    if spread > 1:  # one gathered layer is in use while the next one is gathered
        gathered = 2 * 2 * size.matrix // size.layers
    elif setting.bf16 and not deepspeed and size.weight_bytes > 3 * size.parameters:
        gathered = 2 * size.matrix  # autocast keeps a bfloat16 copy of float32 weights
    over = n if setting.sharding != "none" else 1
    sampled = work.sampled_at_once
    # For sampling, TRL gathers the whole model if it is sharded.
    whole = 2 * size.parameters if spread > 1 and sampled else 0
    kept_bytes = kept.checkpoints if setting.checkpointing else kept.kept
    tile = min(work.largest_scored, _TILE_TOKENS) * min(size.vocabulary, _TILE_WORDS)
    element = 2 if setting.bf16 or weights < 3 * size.parameters else 4
    return Memory(
        weights=weights // spread + gathered,
        reference=weights // spread if setting.reference else 0,
        gradients=gradients // over,
        optimizer=round(moments / over),
        # The gradients of a layer are in memory at the same time as its activations.
        activations=kept_bytes + kept.layer * (2 if setting.checkpointing else 1),
        head=tile * 4 * _TILE_COPIES + work.largest_scored * size.hidden * 8,
        cache=whole
        + round(sampled * work.sampled_length) * size.cache_bytes
        + sampled * size.vocabulary * 4 * 4,
        judging=work.judged_at_once * size.hidden * element * _INFERENCE_COPIES,
        resident=device.resident,
    )


def _moments(optimizer: str) -> float:
    """Returns the size of the optimizer state as a multiple of the trainable weights."""
    name = optimizer.lower()
    if "8bit" in name or "bnb" in name:
        return 0.5
    if "adafactor" in name or name.startswith("sgd"):
        return 0.0
    return 2.0

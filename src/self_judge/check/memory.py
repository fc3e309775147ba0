"""What a run needs: memory and time of an optimizer step, from sizes and rates.

Plain arithmetic over a model's `Size`, the work of a step and a device. What it says of time rests
on the constants below, each with its origin. It does not know data or run files.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from self_judge.check.model_size import FourBits, Kept, Size

Sharding = Literal["none", "zero2", "zero3", "fsdp"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """What computes.

    Attributes:
        memory: bytes.
        flops: dense FLOP/s of matrix products in the precision of the run.
        bandwidth: bytes/s between memory and cores.
        update, judge: the share of `flops` that training and judging reach.
        layer_seconds: what one layer costs at every decoded token beside its memory traffic.
        resident: bytes that are taken before any tensor is there.
        measured: whether these were measured on the machine that they describe.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    update: float = 0.35
    judge: float = 0.45
    layer_seconds: float = 7e-4
    resident: int = GIB
    measured: bool = False


def _gpu(name: str, gib: int, tflops: float, gb_per_s: float) -> Device:
    return Device(name, gib * GIB, tflops * 1e12, gb_per_s * 1e9)


# From the vendor's data sheets: bfloat16 tensor cores with float32 accumulation, without sparsity.
# The shares and the time of a layer are guesses from experience, not measured by this project.
GPUS: dict[str, Device] = {
    "rtx-3090": _gpu("RTX 3090", 24, 71, 936),
    "rtx-4090": _gpu("RTX 4090", 24, 165, 1008),
    "a10": _gpu("A10", 24, 125, 600),
    "l4": _gpu("L4", 24, 121, 300),
    "l40s": _gpu("L40S", 48, 362, 864),
    "a100-40gb": _gpu("A100 40 GB", 40, 312, 1555),
    "a100-80gb": _gpu("A100 80 GB", 80, 312, 2039),
    "h100": _gpu("H100 80 GB", 80, 989, 3350),
    "h200": _gpu("H200", 141, 989, 4800),
}


def gpu_like(name: str, total_memory: int) -> Device:
    """The GPU of the table that a driver's name stands for; an unknown one as an A100."""
    flat = name.lower().replace(" ", "").replace("-", "")
    # The longest first: an A100 is no A10.
    for key, known in sorted(GPUS.items(), key=lambda item: -len(item[0])):
        if key.removesuffix("-40gb").removesuffix("-80gb").replace("-", "") in flat:
            return dataclasses.replace(known, name=name, memory=total_memory)
    return dataclasses.replace(GPUS["a100-80gb"], name=f"{name} (as A100)", memory=total_memory)


def this_cpu(dtype: torch.dtype) -> Device:
    """This machine without a GPU, its rate of matrix products measured in a fraction of a second.

    The shares, and what the process itself takes, are those measured with SmolLM2-135M on two cores
    (benchmarks/RESULTS.md).
    """
    left, right = torch.randn(512, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    flops = 2 * 512 * 1024 * 1024 / statistics.median(seconds[1:])
    return Device(
        "this CPU", _ram(), flops, 10e9, 0.6, 0.64, 2e-4, int(1.1 * GIB), measured=True
    )  # fmt: skip


def _ram(meminfo: Path = Path("/proc/meminfo")) -> int:
    if not meminfo.is_file():
        return 0  # unknown
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemTotal"))
    return int(line.split()[1]) * 1024


# -- a step ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """How a run trains.

    Attributes:
        adapter: LoRA: the frozen weights get no gradients.
        reference: a second, frozen copy of all weights is held (full fine-tuning with a judge).
        checkpointing: gradient checkpointing.
        bf16: computing is under autocast to bfloat16.
        optimizer: as `training_args.optim` names it.
        processes, sharding: over how many processes what is spread.
        four_bits: how the weights below the adapter are kept.
    """

    adapter: bool
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
        tokens: that training computes in the step, each shared one once.
        scored: positions of them that the LM head scores.
        length: of a typical sequence or tree among them, for attention.
        largest: (rows, tokens) of the largest micro-batch, whose activations are held at once.
        largest_scored: positions of it that the head scores.
        responses, prompt, response: how many are sampled, after prompts of which length, and how
            long they become at most.
        at_once: responses that are sampled together.
        judged: tokens of judge prompts, each shared one once.
        judge_prompts, judge_length: how many judge prompts there are, and their length.
        judge_at_once: tokens of one pass of the judge.
    """

    tokens: float
    scored: float
    length: float
    largest: tuple[int, int]
    largest_scored: int
    responses: int = 0
    prompt: float = 0.0
    response: float = 0.0
    at_once: int = 1
    judged: float = 0.0
    judge_prompts: int = 0
    judge_length: float = 0.0
    judge_at_once: int = 0


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
        return self.weights + self.reference + self.gradients + self.optimizer + self.resident

    @property
    def peak(self) -> int:
        """The largest phase: update, sampling or judging."""
        return self.held + max(self.activations + self.head, self.cache, self.judging)

    @property
    def largest_phase(self) -> str:
        phases = {
            "update": self.activations + self.head,
            "sampling": self.cache,
            "judging": self.judging,
        }
        return max(phases, key=lambda name: phases[name])


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one optimizer step."""

    sampling: float
    judging: float
    update: float

    @property
    def step(self) -> float:
        return self.sampling + self.judging + self.update


# TRL's fused head works in tiles of so many tokens and words, each a few times in float32.
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
    # TRL gathers a sharded model whole to sample from it.
    whole = 2 * size.parameters if spread > 1 and work.responses else 0
    kept_bytes = kept.checkpoints if setting.checkpointing else kept.kept
    words = min(size.vocabulary, _TILE_WORDS)
    element = 2 if setting.bf16 or weights < 3 * size.parameters else 4
    return Memory(
        weights=weights // spread + gathered,
        reference=weights // spread if setting.reference else 0,
        gradients=gradients // over,
        optimizer=round(moments / over),
        # The gradients of a layer stand beside what was kept of it.
        activations=kept_bytes + kept.layer * (2 if setting.checkpointing else 1),
        head=min(work.largest_scored, _TILE_TOKENS) * words * 4 * _TILE_COPIES
        + work.largest_scored * size.hidden * 8,
        cache=whole
        + round(min(work.at_once, work.responses) * (work.prompt + work.response))
        * size.cache_bytes
        + min(work.at_once, work.responses) * size.vocabulary * 4 * 4,
        judging=work.judge_at_once * size.hidden * element * _INFERENCE_COPIES,
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


def seconds(size: Size, work: Work, setting: Setting, device: Device) -> Seconds:
    """Of one step: FLOPs over the device's rate, and bytes over its bandwidth where one decodes."""
    forward = _forward(size, work.tokens, work.length, work.scored)
    # Backward: the gradients of activations cost one forward pass, those of weights another.
    passes = 1 + (1 if setting.adapter else 2) + (1 if setting.checkpointing else 0)
    passes += 1 if work.responses else 0  # the reference's pass
    update = passes * forward / (device.flops * device.update)
    judging = _forward(size, work.judged, work.judge_length, work.judge_prompts) / (
        device.flops * device.judge
    )
    return Seconds(_sampling(size, work, setting, device), judging, update)


def _forward(size: Size, tokens: float, length: float, scored: float) -> float:
    # Scores and values, over a dense mask: 2 · 2 · hidden for every pair of tokens in a row.
    attention = 4 * size.layers * size.hidden * length
    return tokens * (2 * size.matrix + attention) + 2 * size.head * scored


def _sampling(size: Size, work: Work, setting: Setting, device: Device) -> float:
    if not work.responses:
        return 0.0
    calls = -(-work.responses // work.at_once)
    together = work.responses / calls
    prefill = _forward(size, work.responses * work.prompt, work.prompt, work.responses)
    bytes_read = size.weight_bytes + together * size.cache_bytes * (work.prompt + work.response / 2)
    computed = together * _forward(size, 1, work.prompt + work.response / 2, 1)
    token = max(bytes_read / device.bandwidth, computed / (device.flops * device.judge))
    token += size.layers * device.layer_seconds
    return prefill / (device.flops * device.judge) + calls * work.response * token

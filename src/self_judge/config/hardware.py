"""Adapts a run to its machine, so that the same file works on a laptop and on 8 GPUs.

`detect_machine` describes the machine, and `fit_to_machine` adapts a run to this description. This
module does not import torch; the caller says whether there is a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from self_judge.config.schema import JSFTRun, SelfJudgeRun

Run = TypeVar("Run", JSFTRun, SelfJudgeRun)

# Tracker names for `report_to` and their modules. A tracker needs at least one of its modules.
_TRACKER_MODULES = {
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
_FLASH_MODULES = ("flash_attn", "flash_attn_interface", "flash_attn_3")


@dataclass(frozen=True)
class Machine:
    """The capabilities of a machine.

    Attributes:
        cuda: whether there is a CUDA GPU.
        bf16: whether the compute device (the GPU if there is one, or else the CPU) supports bf16 in
            hardware.
        flash_attn, deepspeed: whether the package is installed.
        trackers: the installed trackers, by their `report_to` names.
        cpu_count: the number of CPU cores that this process may use.
        processes: the number of processes in this run, over all machines.
        sharded_by_launcher: whether the launcher's configuration already enables FSDP or DeepSpeed.
    """

    cuda: bool = False
    bf16: bool = False
    flash_attn: bool = False
    deepspeed: bool = False
    trackers: frozenset[str] = frozenset()
    cpu_count: int = 1
    processes: int = 1
    sharded_by_launcher: bool = False


def detect_machine(
    cuda: bool,
    bf16: bool | None = None,
    installed: Callable[[str], bool] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Machine:
    """Describes this machine from installed packages and the launcher's environment variables.

    Args:
        cuda: `torch.cuda.is_available()`.
        bf16: `torch.cuda.is_bf16_supported(including_emulation=False)`. Without a GPU, this is
            determined from the CPU's flags instead.
        installed: returns whether a top-level module can be imported. Tests replace it.
    """
    # `accelerate launch --cpu` disables the GPU.
    on_gpu = cuda and not _is_true(environ, "ACCELERATE_USE_CPU")
    has = installed or (lambda name: importlib.util.find_spec(name) is not None)
    return Machine(
        cuda=on_gpu,
        bf16=bf16 if on_gpu and bf16 is not None else cpu_has_bf16(),
        flash_attn=any(map(has, _FLASH_MODULES)),
        deepspeed=has("deepspeed"),
        trackers=frozenset(
            name for name, modules in _TRACKER_MODULES.items() if any(map(has, modules))
        ),
        cpu_count=_cpu_count(),
        processes=int(environ.get("WORLD_SIZE", "1")),
        sharded_by_launcher=_is_true(environ, "ACCELERATE_USE_FSDP")
        or _is_true(environ, "ACCELERATE_USE_DEEPSPEED"),
    )


def fit_to_machine(run: Run, machine: Machine) -> tuple[Run, list[str]]:
    """Replaces features that this machine lacks and returns the new run and one warning per change.

    flash-attn is replaced by SDPA, bf16 by float32, and fp16 on a CPU by bf16 (or by float32 if the
    CPU lacks bf16). DeepSpeed and FSDP are replaced by plain data parallelism, and missing trackers
    are removed. `run` itself is not modified.
    """
    training = dict(run.training_args)
    model = run.model
    warnings: list[str] = []
    on_gpu = machine.cuda and not training.get("use_cpu", False)
    if not on_gpu:
        training["use_cpu"] = True
        training.setdefault("dataloader_pin_memory", False)

    attention = model.attn_implementation or ""
    if attention.startswith("flash_attention") and not (on_gpu and machine.flash_attn):
        reason = "flash-attn is not installed" if on_gpu else "flash-attn needs a CUDA GPU"
        warnings.append(f"{reason}: using SDPA attention instead")
        model = dataclasses.replace(model, attn_implementation="sdpa")
    if attention == "flex_attention" and not on_gpu:
        warnings.append("FlexAttention has no backward pass on a CPU: using SDPA attention instead")
        model = dataclasses.replace(model, attn_implementation="sdpa")

    dtype = _fit_precision(training, model.dtype, on_gpu, machine.bf16, warnings)
    model = dataclasses.replace(model, dtype=dtype)
    _fit_sharding(training, on_gpu, machine, warnings)
    _fit_trackers(training, machine.trackers, warnings)
    return dataclasses.replace(run, model=model, training_args=training), warnings


def _fit_precision(
    training: dict[str, Any], dtype: Any, on_gpu: bool, bf16: bool, warnings: list[str]
) -> Any:
    """Sets `bf16`, `fp16` and `tf32` in `training` and returns the dtype of the weights."""
    if not on_gpu and training.pop("tf32", None):
        warnings.append("tf32 needs a CUDA GPU: tf32 is disabled")
    if not on_gpu and (training.get("fp16") or dtype == "float16"):
        instead = "bf16" if bf16 else "float32"
        warnings.append(f"fp16 needs a CUDA GPU: using {instead} on this CPU instead")
        training.update(fp16=False, bf16=bf16)
        if dtype == "float16":
            dtype = "bfloat16" if bf16 else "float32"
    if bf16:
        return dtype
    if training.get("bf16") or training.get("bf16_full_eval") or dtype == "bfloat16":
        device = "GPU" if on_gpu else "CPU"
        warnings.append(f"this {device} does not support bf16: using float32 instead")
    # Set bf16 explicitly, because TRL enables it by default.
    training["bf16"] = False
    training.pop("bf16_full_eval", None)
    # "auto" uses the checkpoint's dtype, and most checkpoints are saved in bfloat16.
    return "float32" if dtype in ("bfloat16", "auto") else dtype


def _fit_sharding(
    training: dict[str, Any], on_gpu: bool, machine: Machine, warnings: list[str]
) -> None:
    """Removes DeepSpeed and FSDP from `training` if they cannot work or are not needed."""
    if training.get("deepspeed") and machine.sharded_by_launcher:
        del training["deepspeed"]
        warnings.append("the launcher configures sharding: ignoring training_args.deepspeed")
    elif training.get("deepspeed"):
        reason = (
            "DeepSpeed needs CUDA GPUs"
            if not on_gpu
            else "DeepSpeed is not installed"
            if not machine.deepspeed
            else "DeepSpeed needs several processes, but this run has only one"
            if machine.processes == 1
            else None
        )
        if reason:
            del training["deepspeed"]
            warnings.append(f"{reason}: using plain data parallelism instead")
    if training.get("fsdp") and not on_gpu:
        del training["fsdp"]
        training.pop("fsdp_config", None)
        warnings.append("FSDP needs CUDA GPUs: using plain data parallelism instead")


def _fit_trackers(training: dict[str, Any], trackers: frozenset[str], warnings: list[str]) -> None:
    wanted = training.get("report_to") or "none"
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    missing = [name for name in names if name in _TRACKER_MODULES and name not in trackers]
    for name in missing:
        warnings.append(f"the tracker {name} is not installed: not reporting to it")
    if missing:
        training["report_to"] = [name for name in names if name not in missing] or "none"


def launch_over_gpus(
    argv: Sequence[str], gpus: int, environ: Mapping[str, str] = os.environ
) -> list[str] | None:
    """Returns the command that restarts this program with one process per GPU, if needed.

    No `accelerate launch` configuration means "one process per GPU, or one process without GPUs".
    Without GPUs, `num_processes: auto` starts one process per CPU core. Therefore, the included
    configurations start one process, which relaunches itself with `os.execv(command[0], command)`.

    Args:
        argv: `sys.argv`.
        gpus: the number of visible CUDA GPUs.

    Returns:
        The command, or `None` if there is at most one GPU or a launcher already started several
        processes.
    """
    launched = "WORLD_SIZE" in environ or "LOCAL_RANK" in environ
    if gpus < 2 or launched or _is_true(environ, "ACCELERATE_USE_CPU"):
        return None
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={gpus}", *argv]


def threads_for(machine: Machine, environ: Mapping[str, str] = os.environ) -> int | None:
    """Returns the number of CPU threads for a run without GPUs, or `None` to leave it unchanged.

    `accelerate launch` sets `OMP_NUM_THREADS=1` unless the variable is already set. This leaves all
    cores but one idle. Because this value looks the same as a user's own `OMP_NUM_THREADS=1`, use
    `taskset` to limit a run to one core.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in environ and environ.get("OMP_NUM_THREADS") == "1"
    if machine.cuda or machine.processes > 1 or not launched:
        return None
    return machine.cpu_count


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Returns whether the CPU multiplies bf16 in hardware (x86 AVX512-BF16 or AMX, ARM bf16).

    Returns `False` if the flags cannot be read or the system is not Linux. The run then uses
    float32.
    """
    if not cpuinfo.is_file():
        return False
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.lower().startswith(("flags", "features")):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(line.split())
    return False


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("true", "1")


def _cpu_count() -> int:
    # A container or taskset may allow fewer cores than the machine has. Only Linux reports this.
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""What is here, and what it does at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess

import torch
from measuring import Check, ceilings, gib
from project import ROOT

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "triton", "numpy")


def versions(check: Check) -> None:
    """Versions, the device, and its two ceilings."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    check.say(
        versions=found, python=platform.python_version(), cores=os.cpu_count(), commit=_tree()
    )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        check.say(
            gpu=properties.name,
            memory_gib=gib(properties.total_memory),
            multiprocessors=properties.multi_processor_count,
            cudnn=torch.backends.cudnn.version(),
            cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled(),
        )
    best = ceilings(check)
    check.say(tflops=round(best.flops / 1e12, 1), copy_tb_s=round(best.bytes / 1e12, 3))


def _tree() -> str | None:
    """The commit, where git and its folder are there."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None

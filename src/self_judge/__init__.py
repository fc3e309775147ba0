"""self_judge: align a language model with its own pairwise judgments (arXiv 2402.11253).

The public names are imported lazily, so that `import self_judge` is fast and lightweight modules do
not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES_OF = {
    "datatypes": ("Comparison", "PreferenceRecord", "Response", "Verdict"),
    "prompting.chat_encoder": ("ChatEncoder",),
    "prompting.judge_json": ("save_judge_settings",),
    "prompting.judge_templates": ("JudgeTemplates",),
    "config.self_training": ("SamplingSettings",),
    "data.sources": ("load_preferences", "to_self_judge_rows"),
    "models": ("load_model", "load_tokenizer"),
    "inference.sampling": ("TransformersSampler",),
    "judging.choice": ("JudgeChoice", "resolve_judge"),
    "judging.judge": ("Judge",),
    "judging.panel": ("Panel",),
    "judging.tournament": ("Bracket", "tournament_rejection_sampling"),
    "judging.reward": ("PairwiseReward",),
    "judging.voting": ("aggregate",),
    "training.jsft.examples": ("JudgeAugmentedSFTCollator", "jsft_dataset"),
    "training.jsft.trainer": ("JSFTTrainer",),
    "training.self_training.config": ("SelfJudgeConfig",),
    "training.self_training.prompts": ("SelfJudgeCollator",),
    "training.self_training.trainer": ("SelfJudgeTrainer",),
    "reporting.page": ("write_report",),
    "commands.compare": ("ComparisonJob", "run_compare"),
    "commands.eval": ("JudgeEvaluation", "run_eval"),
    "commands.judge": ("run_judge",),
    "commands.tournament": ("TournamentJob", "run_tournament"),
}
_HOME_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'self_judge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"self_judge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})

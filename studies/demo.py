"""The demo on seeds that were drawn after its code was final."""

from __future__ import annotations

from typing import Any

from self_judge.commands.demo.run import from_jsft_on
from study import Study
from world import World


def demo(world: World) -> dict[str, Any]:
    """What `self-judge demo --seed N` writes to summary.json, without the examples."""
    model, seconds = world.taught("shared")
    summary = from_jsft_on(world.shared, model)
    return {k: summary[k] for k in ("judge", "gold", "win_rate_vs_jsft")} | {
        "jsft_seconds": seconds
    }


STUDY = Study(
    "demo",
    "Does the whole method work on every seed: JSFT, self-training and self-rejection?",
    {"demo": demo},
    "On all ten seeds, the gold score rises with intervals apart, the win rate is at least 0.70, "
    "and with the prior, the best of 16 is at least as good as the best of 4. By the judge alone, "
    "the best of 16 is worse on all ten.",
)

"""Who should judge: the model itself, frozen or current, another seed, a larger model, or a panel.

Every arm trains the JSFT model of its seed on its own responses, with the same loss, learning rate
and number of steps. Only the judge differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

from learning import CountingTrainer, JudgedByThePolicy, jsft, self_trained
from self_judge.data import synthetic
from self_judge.judging.judge import Judge
from self_judge.judging.panel import AnyJudge, Panel
from study import Study
from world import World, right

_OTHER = 1000  # added to a seed
_LARGER = {"hidden_size": 192, "layers": 8}


def frozen(world: World) -> dict[str, Any]:
    return _judged_by(world, "frozen", None)


def current(world: World) -> dict[str, Any]:
    return self_trained(world, "current", JudgedByThePolicy)


def other_seed(world: World) -> dict[str, Any]:
    return _judged_by(world, "other-seed", _of_other_seed(world))


def larger(world: World) -> dict[str, Any]:
    return _judged_by(world, "larger", _larger(world))


def panel(world: World) -> dict[str, Any]:
    """The model itself, the one of another seed and the larger one, which vote."""
    members = {"self": world.judge, "other": _of_other_seed(world), "larger": _larger(world)}
    return _judged_by(world, "panel", Panel(members))


def _of_other_seed(world: World) -> Judge:
    """A JSFT model with other initial weights and other data of the same world."""
    other = World(world.seed + _OTHER, world.settings, world.folder.parents[1])
    return world.shared.judge(other.jsft())


def _larger(world: World) -> Judge:
    """A JSFT model with four times as many weights, taught with the same records."""
    made = partial(synthetic.tiny_model, **_LARGER)
    with patch.object(synthetic, "tiny_model", made):
        return world.shared.judge(world.taught("larger")[0])


def _judged_by(world: World, arm: str, judge: AnyJudge | None) -> dict[str, Any]:
    judging = (judge or world.judge).compare(world.shared.held_out_pairs())
    trainer: Any = partial(CountingTrainer, judge=judge)
    return {**self_trained(world, arm, trainer), "judge_right": right(judging)}


STUDY = Study(
    "judges",
    "Does a policy learn more from another judge than from its own initial model?",
    {
        "JSFT": jsft,
        "self, frozen": frozen,
        "self, current": current,
        "other seed": other_seed,
        "larger": larger,
        "panel": panel,
    },
)

"""Chooses who judges in self-training: the frozen initial model, another judge, or a panel.

The reference of the loss is the initial model in any case. This module does not depend on how pairs
are sampled or trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from self_judge.errors import CheckpointError, require_type
from self_judge.inference.letter_scoring import LetterScorer, TransformersScorer
from self_judge.inference.lockstep import LockstepPacking
from self_judge.judging.judge import Judge
from self_judge.judging.panel import INITIAL, AnyJudge, InitialModel, Panel
from self_judge.prompting.judge_json import (
    JudgeSettings,
    has_judge_settings,
    load_judged_by,
    resolve_settings,
    save_judge_settings,
    save_judged_by,
)
from self_judge.prompting.judge_templates import JudgeTemplates

# What identifies a judge. Other settings, such as its dtype, may change when a run resumes.
_WHO = ("model", "weights", "revision", "endpoint", "templates", "principles", "thought_tokens")

Given = Judge | Panel | InitialModel | LetterScorer | None


def is_scorer(judge: object) -> bool:
    """Returns whether a judge is a `LetterScorer`, which judges under the templates of the run."""
    return callable(getattr(judge, "letter_probabilities", None)) and not isinstance(judge, Judge)


def check_judge_type(judge: object) -> None:
    """Raises `TypeError` if the trainer's argument is not a judge."""
    if not is_scorer(judge):
        types = (Judge, Panel, InitialModel, type(None))
        require_type("judge", judge, types, "a Judge, a Panel or a LetterScorer")


def needs_initial(judge: Given) -> bool:
    """Returns whether the frozen initial model judges, alone or in a panel."""
    members = judge.members.values() if isinstance(judge, Panel) else (judge,)
    return any(member is None or isinstance(member, InitialModel) for member in members)


def own_settings(
    judge: Given,
    name: str,
    templates: JudgeTemplates | Mapping[str, Any] | None,
    token_id_a: int | None,
    token_id_b: int | None,
    revision: str | None,
) -> JudgeSettings | None:
    """Returns the settings of the initial model as a judge.

    They are `None` if another judge judges and the model has no templates.

    Raises:
        ValueError: the initial model judges, but has no templates.
    """
    asked = needs_initial(judge) or is_scorer(judge)
    if templates is None and not asked and not has_judge_settings(name, revision):
        return None
    return resolve_settings(
        name,
        templates,
        token_id_a,
        token_id_b,
        revision=revision,
        remedy="pass judge_templates, or start from a model trained with JSFT",
    )


def judge_in_training(
    trainer: Any, given: Given, tokens: int | None
) -> tuple[AnyJudge, LockstepPacking | None]:
    """Returns the judge of a `SelfJudgeTrainer`, and the packing of a judge that is sharded.

    Args:
        given: the judge that was passed to the trainer.
        tokens: the maximum number of tokens in a packed pass.

    Raises:
        ValueError: the model is sharded, but the initial model thinks or is in a panel.
    """
    if isinstance(given, Judge | Panel) and not needs_initial(given):
        return given, None
    if given is not None and not isinstance(given, Judge | Panel | InitialModel):
        length = trainer.args.max_length
        return Judge(given, trainer.encoder, trainer.judge_templates, max_length=length), None
    assert not isinstance(given, Judge)
    sharded = trainer.max_over_ranks is not None
    if sharded and given is not None:
        raise ValueError(
            "the model is sharded over processes, so the initial model can only judge alone and "
            "without thoughts: choose another judge, or do not shard"
        )
    if not isinstance(given, Panel):
        own = _initial(trainer, None if given is None else given.thought_tokens, tokens)
        scorer = own.scorer
        if not (sharded and isinstance(scorer, TransformersScorer)):
            return own, None
        # All processes must run the same number of passes.
        scorer.packing = lockstep = LockstepPacking(
            scorer.model,
            trainer.args.packing,
            batch_rows=trainer.args.judge_batch_size,
            max_over_ranks=trainer.max_over_ranks,
            batch_tokens=tokens,
        )
        return own, lockstep
    return given.with_initial(
        {
            name: _initial(trainer, member.thought_tokens, tokens)
            for name, member in given.members.items()
            if isinstance(member, InitialModel)
        }
    ), None


def _initial(trainer: Any, thought_tokens: int | None, tokens: int | None) -> Judge:
    # The judge is the frozen reference: a separate model, or the policy's own base. In the latter
    # case, `active_reference` disables the adapter while the judge runs.
    here = trainer.ref_model if trainer.ref_model is not None else trainer.model
    engine = trainer.vllm is not None and trainer.vllm.judges
    judge = Judge(
        trainer.vllm.scorer() if engine else here,
        trainer.encoder,
        trainer.judge_templates,
        token_id_a=trainer.letters[0],
        token_id_b=trainer.letters[1],
        batch_size=trainer.args.judge_batch_size,
        max_length=trainer.args.max_length,
        packing=trainer.args.packing,
        batch_tokens=tokens,
        thought_tokens=thought_tokens,
    )
    judge.identity["model"] = INITIAL
    return judge


def judged_by(trainer: Any) -> dict[str, Any] | None:
    """Returns what identifies the judge of a trainer; `None` for the initial model alone."""
    return None if trainer.given_judge is None else trainer.judge.identity


def save_judge(trainer: Any, folder: Path) -> None:
    """Writes `judge.json`: how the saved model judges, and who judged in its training."""
    who = judged_by(trainer)
    if trainer.letters is not None:
        templates = trainer.judge_templates
        save_judge_settings(folder, trainer.encoder, templates, trainer.letters, who)
    elif who is not None:
        save_judged_by(folder, who)


def check_same_judge(trainer: Any, checkpoint: Path) -> None:
    """Raises `CheckpointError` if another judge judged the pairs before a checkpoint."""
    before, now = _who(load_judged_by(checkpoint)), _who(judged_by(trainer))
    if before == now:
        return
    names = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    shown = "; ".join(f"{k} was {before.get(k)!r}, and is {now.get(k)!r}" for k in names)
    raise CheckpointError(
        f"cannot resume from {checkpoint}: another judge judged before it ({shown}). Restore the "
        "judge, or use another output_dir"
    )


def _who(identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what tells two judges apart, by names such as `panel.jsft.weights`."""
    if identity is None:
        return {"model": INITIAL}
    found = {key: identity[key] for key in _WHO if identity.get(key) is not None}
    if "weights" in found:
        found.pop("model", None)  # the same weights may be in another folder
    for name, member in identity.get("panel", {}).items():
        found |= {f"panel.{name}.{key}": value for key, value in _who(member).items()}
    return found

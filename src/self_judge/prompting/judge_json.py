"""The settings of a judge, and the file judge.json that stores them with a model.

`resolve_settings` selects the templates, letters and chat template. Values that the caller passes
override those that the model was trained with.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_judge.errors import ModelError, in_a_line, is_missing
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.atomic import loads, write_json
from self_judge.storage.repository import not_on_hub, repository_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JUDGE_FILE = "judge.json"


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """The templates, letters and chat template of a judge, saved in checkpoints as `judge.json`.

    If a letter id is `None`, the id derived from the tokenizer is not checked.
    """

    templates: JudgeTemplates
    token_id_a: int | None = None
    token_id_b: int | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def save_judge_settings(
    directory: str | os.PathLike[str],
    encoder: ChatEncoder | PreTrainedTokenizerBase,
    templates: JudgeTemplates | Mapping[str, Any],
    letter_ids: Sequence[int],
    judged_by: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the judge's templates, letter ids and chat template to `directory/judge.json`.

    The file is written atomically.

    Args:
        judged_by: the judge in the self-training of this model, if it was another one than the
            initial model.
    """
    encoder = ChatEncoder.of(encoder)
    content = {
        **JudgeTemplates.of(templates).to_dict(),
        "token_id_a": int(letter_ids[0]),
        "token_id_b": int(letter_ids[1]),
        "chat_template": encoder.chat_template,
        "chat_template_kwargs": encoder.chat_template_kwargs,
        **({} if judged_by is None else {"judged_by": judged_by}),
    }
    path = Path(directory) / JUDGE_FILE
    write_json(path, content)
    return path


def save_judged_by(directory: str | os.PathLike[str], judged_by: Mapping[str, Any]) -> None:
    """Writes who judged in self-training to the `judge.json` of a model that has no templates."""
    write_json(Path(directory) / JUDGE_FILE, {"judge": None, "judged_by": judged_by})


def load_judged_by(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Returns who judged in the self-training of a model in a folder; `None`: its initial model."""
    path = Path(directory) / JUDGE_FILE
    try:
        found = loads(path.read_bytes()).get("judged_by")
    except (AttributeError, FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def load_judge_settings(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> JudgeSettings | None:
    """Reads `judge.json` from a model's folder or the Hub, or returns `None` if there is none."""
    path = repository_file(name_or_path, JUDGE_FILE, revision)
    if path is None:
        return None
    try:
        saved = loads(path.read_bytes())
        if saved.get("judge") is None and saved.get("judged_by"):
            return None  # another judge judged, and this model was not trained to judge
        return JudgeSettings(
            JudgeTemplates.from_dict(saved),
            int(saved["token_id_a"]),
            int(saved["token_id_b"]),
            saved.get("chat_template"),
            dict(saved.get("chat_template_kwargs") or {}),
        )
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        why = in_a_line(error)
        raise ModelError(f"{path} is not a judge file written by JSFT: {why}") from error


def has_judge_settings(name_or_path: str | os.PathLike[str], revision: str | None = None) -> bool:
    """Returns whether a model in a folder or on the Hub has a `judge.json`."""
    return bool(name_or_path) and load_judge_settings(name_or_path, revision) is not None


def resolve_settings(
    name_or_path: str | os.PathLike[str] | None,
    templates: JudgeTemplates | Mapping[str, Any] | None = None,
    token_id_a: int | None = None,
    token_id_b: int | None = None,
    *,
    revision: str | None = None,
    remedy: str = "pass the judge templates",
) -> JudgeSettings:
    """Returns the judge's settings: the given templates, or else those saved with the model.

    Args:
        name_or_path: the judge's folder or model ID on the Hub; `None` or empty for no model.
        templates: templates that replace the saved templates and letter ids.
        token_id_a, token_id_b: ids that replace the saved letter ids.
        revision: the revision of the model on the Hub.
        remedy: the end of the error message, which says how to pass templates.

    Returns:
        The settings, including the saved chat template and its arguments, if any.

    Raises:
        ValueError: no templates are given or saved.
        ModelError: the folder does not exist, or its `judge.json` is damaged.
    """
    saved = load_judge_settings(name_or_path, revision) if name_or_path else None
    if templates is None:
        if saved is None:
            if name_or_path and is_missing(name_or_path):
                raise ModelError(f"{name_or_path}: there is no such folder: {remedy}")
            absent = name_or_path and not Path(name_or_path).exists()
            lacks = f"has no {JUDGE_FILE} (JSFT writes this file)"
            if absent and name_or_path:
                lacks = not_on_hub(name_or_path, revision) or f"is not a folder here, and {lacks}"
            raise ValueError(f"{name_or_path or 'the model'} {lacks}: {remedy}")
        return dataclasses.replace(
            saved,
            token_id_a=saved.token_id_a if token_id_a is None else token_id_a,
            token_id_b=saved.token_id_b if token_id_b is None else token_id_b,
        )
    chat = (saved.chat_template, saved.chat_template_kwargs) if saved else ()
    return JudgeSettings(JudgeTemplates.of(templates), token_id_a, token_id_b, *chat)


def encoder_as_taught(
    tokenizer: PreTrainedTokenizerBase,
    saved: JudgeSettings | None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    markers: tuple[str | None, str | None] = (None, None),
) -> ChatEncoder:
    """Returns the encoder that a model was trained with, unless arguments override its settings.

    Args:
        saved: the settings saved with the model, if any.
        chat_template, chat_template_kwargs: values that override the saved ones.
        markers: see `ChatEncoder`.
    """
    if saved is not None:
        chat_template = chat_template or saved.chat_template
        chat_template_kwargs = {**saved.chat_template_kwargs, **(chat_template_kwargs or {})}
    return ChatEncoder(tokenizer, chat_template, *markers, chat_template_kwargs)

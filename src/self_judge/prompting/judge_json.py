"""What lies beside a model that was taught to judge: judge.json, and the encoder that goes with it.

Whoever judges later, in training or after it, asks with the templates, the chat template and the
letters that the model learned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_judge.errors import ModelError, in_a_line
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.whole_file import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JUDGE_FILE = "judge.json"


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """What a model was taught to judge with; saved beside its checkpoint as `judge.json`."""

    templates: JudgeTemplates
    token_id_a: int
    token_id_b: int
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def save_judge_settings(
    directory: str | os.PathLike[str],
    encoder: ChatEncoder,
    templates: JudgeTemplates,
    letter_ids: Sequence[int],
) -> Path:
    """Writes the judge's templates, letter ids, and chat template into `directory/judge.json`.

    The lead-in of each template is its decision prefix. The file is written whole or not at all.
    """
    content = {
        **templates.to_dict(),
        "token_id_a": int(letter_ids[0]),
        "token_id_b": int(letter_ids[1]),
        "chat_template": encoder.chat_template,
        "chat_template_kwargs": encoder.chat_template_kwargs,
    }
    path = Path(directory) / JUDGE_FILE
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def load_judge_settings(directory: str | os.PathLike[str]) -> JudgeSettings | None:
    """Reads what `save_judge_settings` wrote; `None` when the folder has no such file."""
    path = Path(directory) / JUDGE_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return JudgeSettings(
            JudgeTemplates.from_dict(saved),
            int(saved["token_id_a"]),
            int(saved["token_id_b"]),
            saved.get("chat_template"),
            dict(saved.get("chat_template_kwargs") or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        why = in_a_line(error)
        raise ModelError(f"{path} is not a judge file written by JSFT: {why}") from error


def encoder_as_taught(
    tokenizer: PreTrainedTokenizerBase,
    saved: JudgeSettings | None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    markers: tuple[str | None, str | None] = (None, None),
) -> ChatEncoder:
    """The encoder that a model was taught with, where nothing else is asked for.

    Args:
        saved: what lies beside the model, if anything does.
        chat_template, chat_template_kwargs: win over what was saved.
        markers: see `ChatEncoder`.
    """
    if saved is not None:
        chat_template = chat_template or saved.chat_template
        chat_template_kwargs = {**saved.chat_template_kwargs, **(chat_template_kwargs or {})}
    return ChatEncoder(tokenizer, chat_template, *markers, chat_template_kwargs)

"""Reads the judged answers of a comparison of policies for the report.

The command `compare` writes them. This module does not compute any results.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from self_judge.prompting.judge_templates import dialogue_text
from self_judge.storage.jsonl import entries_of, read_lines


def compared_pairs(file: Path, most: int, characters: int) -> list[dict[str, Any]]:
    """Returns the first answers of both policies with their verdicts.

    Args:
        file: the pairs of a comparison; without this file, there are none.
        most: the maximum number of pairs.
        characters: the maximum number of characters in a text.
    """
    if not file.is_file():
        return []
    with entries_of(file):
        return [_pair(line, characters) for line in itertools.islice(read_lines(file), most)]


def _pair(line: dict[str, Any], characters: int) -> dict[str, Any]:
    verdict = line["verdict"]
    told = ("preferred", "margin", "orders_agree", "undecidable_because")
    return {
        "index": line["index"],
        "context": cut(dialogue_text(line["prompt"]), characters),
        **{side: cut(line[f"response_{side}"], characters) for side in "ab"},
        "finished": line["finished"],
        **{name: verdict[name] for name in told},
        "principles": list(verdict["probabilities"]),
        "probabilities": list(verdict["probabilities"].values()),
    }


def cut(text: str, most: int) -> str:
    """Cuts a text, and adds the number of missing characters."""
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]} … [{left:,} more characters]"

"""Names the files in a folder of `self-judge init`, and the commands that continue there.

`init` prints these commands, and `align` runs them. This module does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from self_judge.config.schema import JSFTRun, SelfJudgeRun, load_run
from self_judge.errors import ConfigError
from self_judge.storage.atomic import writable_to
from self_judge.storage.run_dir import RESULTS

TEMPLATES, JSFT, SELF_JUDGE, PROMPTS, PAIRS = (
    *("templates.yaml", "jsft.yaml", "self_judge.yaml", "held_out.jsonl"),
    "held_out_pairs.jsonl",
)
FILES = (TEMPLATES, JSFT, SELF_JUDGE, PROMPTS, PAIRS)
BEST, PAGE = "best.jsonl", "report.html"
EVALUATED, COMPARED = "evaluated", "compared"
REPORT = "report"
MOST = 200  # pairs and prompts in evaluations, which then have intervals of about ±7 points
MOST_TOURNAMENTS, RESPONSES = 16, 8
_OF = {"jsft_args": "jsft", "self_judge_args": "self_judge"}  # other sections are in both files
_FIXED = {
    "model.model_name_or_path": "pass --model",
    "training_args.output_dir": "pass --output",
    "dataset.sources": "pass --data",
    "templates": f"edit {TEMPLATES}",
}


@dataclass(frozen=True)
class Stage:
    """One command of the method.

    Attributes:
        title: the name of the stage.
        words: the command's arguments.
        output: a file or folder that the command writes.
        inputs: files, and folders of models, that the result depends on.
        run: the settings of training.
    """

    title: str
    words: list[str]
    output: Path
    inputs: tuple[Path, ...]
    run: JSFTRun | SelfJudgeRun | None = None


def stages(folder: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """Returns the stages of the method in a folder of `init`, in order.

    Args:
        overrides: `key.path=value` for the run files that have this section.

    Raises:
        ConfigError: a run file or an override cannot be used.
    """
    given: dict[str, list[str]] = {kind: [] for kind in _OF.values()}
    for override in overrides:
        key = override.partition("=")[0]
        for fixed, instead in _FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise ConfigError(f"{override}: {instead} instead")
        for kind in [_OF[s]] if (s := key.partition(".")[0]) in _OF else _OF.values():
            given[kind].append(override)
    jsft = load_run(folder / JSFT, given["jsft"], "jsft")
    train = load_run(folder / SELF_JUDGE, given["self_judge"], "self_judge")
    judge, policy = (
        _output(folder, name, run) for name, run in ((JSFT, jsft), (SELF_JUDGE, train))
    )
    if Path(train.model.model_name_or_path).resolve() != judge.resolve():
        raise ConfigError(
            f"{folder / SELF_JUDGE}: model.model_name_or_path must be {judge}, the output of {JSFT}"
        )
    prompts, pairs, best = folder / PROMPTS, folder / PAIRS, folder / BEST
    compared, evaluated = folder / COMPARED, folder / EVALUATED
    tokens = ["--max-new-tokens", str(train.self_judge_args.max_new_tokens)]
    revision = ["--revision", jsft.model.revision] if jsft.model.revision else []
    code = ["--trust-remote-code"] if jsft.model.trust_remote_code else []
    results = (evaluated / RESULTS, compared / RESULTS, best)
    return [
        Stage("JSFT", ["jsft", str(folder / JSFT), *given["jsft"]], judge, (), jsft),
        Stage(
            "judge evaluation",
            [
                *("eval", str(pairs), "--model", str(judge)),
                *("--compare", jsft.model.model_name_or_path, "--templates", str(folder / JSFT)),
                *revision,
                *code,
                *("--max-pairs", str(MOST), "--output", str(evaluated)),
            ],
            evaluated,
            (judge, pairs),
        ),
        Stage(
            "self-training",
            ["train", str(folder / SELF_JUDGE), *given["self_judge"]],
            policy,
            (judge,),
            train,
        ),
        Stage(
            "comparison",
            [
                *("compare", str(policy), str(judge), "--judge", str(judge)),
                *("--prompts", str(prompts), "--max-prompts", str(MOST), *tokens, *code),
                *("--output", str(compared)),
            ],
            compared,
            (judge, policy, prompts),
        ),
        Stage(
            "self-rejection",
            [
                *("tournament", str(prompts), str(best), "--model", str(judge)),
                *("--policy", str(policy), "--n", str(RESPONSES)),
                *("--max-prompts", str(MOST_TOURNAMENTS), *tokens, *code, "--brackets"),
            ],
            best,
            (judge, policy, prompts),
        ),
        Stage(
            REPORT,
            ["report", *map(str, (folder, evaluated, compared))],
            folder / PAGE,
            results,
        ),
    ]


def next_words(output: Path) -> list[str] | None:
    """Returns the command that follows the training of a model in a folder of `init`, if it is."""
    folder = output.parent
    if not all((folder / name).is_file() for name in FILES):
        return None
    with suppress(ConfigError):
        for stage, following in pairwise(stages(folder)):
            if stage.output.resolve() == output.resolve():
                return following.words
    return None


def refuse_existing(folder: Path) -> None:
    """Raises `ConfigError` if `init` cannot write to a folder, or would overwrite a file."""
    there = writable_to(folder, ConfigError)
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{there}: is not writable: choose another folder")
    for name in FILES:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists: choose another folder, or remove it")


def absolute(name: str) -> str:
    """Returns the absolute path of a model or of data, or the name if there is no such path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _output(folder: Path, name: str, run: JSFTRun | SelfJudgeRun) -> Path:
    output = Path(str(run.training_args["output_dir"]))
    if not output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{folder / name}: training_args.output_dir is {output}, which is not in {folder}: run "
            "the command in the working folder of self-judge init, or change it"
        )
    return output

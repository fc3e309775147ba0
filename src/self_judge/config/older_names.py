"""Reads run files with the keys of the method's original repository or of older libraries.

The original repository is https://github.com/oddqueue/self-judge. Its scripts fix some values that
its run files do not contain, and the same values are used here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from self_judge.errors import ConfigError

# Keys with a new name and the same values.
_MOVED = {
    "model.pretrained_model_name_or_path": "model.model_name_or_path",
    "model.torch_dtype": "model.dtype",
    "training_args.warmup_ratio": "training_args.warmup_steps",
    "training_args.evaluation_strategy": "training_args.eval_strategy",
    "training_args.no_cuda": "training_args.use_cpu",
    "self_judge_args.judge_templates": "templates.judge",
}
OLD_NAMES = {new: old for old, new in _MOVED.items()}
_HH = "Anthropic/hh-rlhf"
_ULTRAFEEDBACK = "openbmb/UltraFeedback"


def read_older_names(
    tree: dict[str, Any], say: Callable[[str], None], *, overridden: bool = False
) -> None:
    """Replaces older keys in the tree of a run file by the keys of this package.

    Args:
        say: gets one line per key that is read in another way.
        overridden: whether the tree contains overrides. An older key then takes precedence over the
            file's key of the new name.

    Raises:
        ConfigError: a file has an older key and its new name, or a value that cannot be kept.
    """
    problems: list[str] = []
    original = _base_of_adapter(tree, say) or "pretrained_model_name_or_path" in _in(tree, "model")
    ratio = _in(tree, "training_args").get("warmup_ratio")
    if isinstance(ratio, int | float) and not 0 <= ratio < 1:
        problems.append(
            f"training_args.warmup_ratio must be in [0, 1), got {ratio}: for a number of steps, "
            "use training_args.warmup_steps"
        )
    for old, new in _MOVED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if key not in _in(tree, section):
            continue
        if not isinstance(tree.setdefault(new_section, {}), dict):
            continue  # the wrong section is reported
        value = tree[section].pop(key)
        if new_key in tree[new_section] and not overridden:
            problems.append(f"{old} is the older name of {new}: set only one of them")
        tree[new_section][new_key] = value
        say(f"{old}: read as {new}")
    if problems:
        raise ConfigError(*problems)
    if original and "dtype" not in tree["model"]:
        tree["model"]["dtype"] = "bfloat16"
        say("model.dtype: not set; bfloat16, as in the method's scripts")
    if isinstance(tree.get("dataset"), str):
        _name_sources(tree, say)
    _join_decision(tree, say)
    _keep_accumulation(tree, say)


def _in(tree: dict[str, Any], section: str) -> dict[str, Any]:
    """Returns a section, or an empty one if it is missing or not a mapping."""
    found = tree.get(section)
    return found if isinstance(found, dict) else {}


def _base_of_adapter(tree: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Starts from an adapter, whose own configuration names its base model."""
    model = _in(tree, "model")
    if "peft_model_name_or_path" not in model:
        return False
    model["model_name_or_path"] = model.pop("peft_model_name_or_path")
    model.pop("pretrained_model_name_or_path", None)
    say(
        "model.peft_model_name_or_path: read as model.model_name_or_path; its base model is the "
        "one that its adapter_config.json names"
    )
    return True


def _name_sources(tree: dict[str, Any], say: Callable[[str], None]) -> None:
    """Expands the name or path of the data. The method's scripts train on all of it."""
    path = tree["dataset"]
    dataset: dict[str, Any] = {"sources": [{"path": path}], "held_out": 0.0}
    local = Path(path)
    if path == _HH or (local / "helpful-base").is_dir():
        source = {"path": path, "kind": "hh", "data_dir": "helpful-base"}
        dataset["sources"] = [source]
        say(
            "templates.judge: its system messages are in judge prompts only; the method's scripts "
            "add them to the dialogues of HH too"
        )
        online = path == _HH or (local / "helpful-online").is_dir()
        if online and "self_judge_args" not in tree:
            dataset["sources"] += [{**source, "data_dir": "helpful-online", "pairs": False}]
    elif path == _ULTRAFEEDBACK:
        dataset["sources"][0]["kind"] = "ultrafeedback"
    if _in(tree, "templates").get("decision_rationale") and "self_judge_args" not in tree:
        dataset["principles"] = True
    tree["dataset"] = dataset
    sources = ", ".join(s.get("data_dir") or s["path"] for s in dataset["sources"])
    principles = ", principles: true" if "principles" in dataset else ""
    say(f"dataset: read as dataset.sources ({sources}), held_out: 0.0{principles}")


def _join_decision(tree: dict[str, Any], say: Callable[[str], None]) -> None:
    """Joins `decision` to the lead-in, and writes the rationales of both letters as one text."""
    templates = _in(tree, "templates")
    parts, judge = templates.get("decision_rationale"), templates.get("judge")
    names = {"decision", "rationale"}
    if not isinstance(parts, dict) or not isinstance(judge, dict):
        return
    if set(parts) != names or set(judge) == names:
        return
    if not all(isinstance(text, str) for text in parts.values()):
        raise ConfigError("templates.decision_rationale: decision and rationale must be text")
    for template in judge.values():
        if isinstance(template, dict) and isinstance(template.get("assistant"), str):
            template["assistant"] += parts["decision"]
    texts = [
        f"{parts['rationale'].replace('{position}', x.upper())} {{rationale_{x}}}" for x in "ab"
    ]
    templates["decision_rationale"] = "\n" + "".join(texts)
    say(
        "templates.decision_rationale: decision read as the end of templates.judge's assistant, "
        "rationale read as a text with {rationale_a} and {rationale_b}"
    )


def _keep_accumulation(tree: dict[str, Any], say: Callable[[str], None]) -> None:
    """Lets the accumulation steps in a file determine the batch, unless it sets the batch too."""
    steps = _in(tree, "training_args").get("gradient_accumulation_steps")
    for section in ("jsft_args", "self_judge_args"):
        own = tree.get(section, {}) or {}
        if steps is None or section not in tree or not isinstance(own, dict):
            continue
        if "global_batch_size" not in own:
            tree[section] = {**own, "global_batch_size": None}
            say(
                f"training_args.gradient_accumulation_steps: sets the batch, {section}."
                "global_batch_size is null"
            )

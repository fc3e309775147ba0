"""Writes the model card of a trained model: its base, data, method and judge, and how to use them.

A card states only what the trainer and the files of the run know.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from self_judge.console import masked
from self_judge.prompting.judge_json import JUDGE_FILE, load_judge_settings, load_judged_by
from self_judge.runtime import unwrapped
from self_judge.storage.atomic import loads
from self_judge.storage.repository import same_path
from self_judge.storage.run_dir import DATA, RESULTS, SUMMARY

CARD = "README.md"
_VERSIONS = ("self-judge", "trl", "transformers", "torch", "datasets", "tokenizers")

_JUDGING = """```python
from self_judge import Comparison, Judge

judge = Judge.from_pretrained({name!r})
pair = Comparison("What is the capital of France?", "Paris.", "It is Rome.")
print(judge.compare([pair])[0])
```"""

_CITATIONS = """```bibtex
@inproceedings{lee2024aligning,
  title     = {Aligning Large Language Models by On-Policy Self-Judgment},
  author    = {Lee, Sangkyu and Kim, Sungdong and Yousefpour, Ashkan and Seo, Minjoon and
               Yoo, Kang Min and Yu, Youngjae},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  url       = {https://arxiv.org/abs/2402.11253},
  year      = {2024}
}

@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and
             Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and
             Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}
```"""


def model_card(
    trainer: Any,
    folder: Path,
    saved_as: Path,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """Returns the card of a trainer's model.

    Args:
        trainer: a `JSFTTrainer` or `SelfJudgeTrainer`.
        folder: the folder of the model, with its `judge.json`, if any.
        saved_as: the final name of this folder.
        model_name, dataset_name, tags: see `create_model_card` of TRL's trainers.
    """
    args: Any = trainer.args
    inner: Any = unwrapped(trainer.model)
    output = Path(str(args.output_dir))
    hub_id = trainer.hub_model_id or args.hub_model_id
    adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    adapter = adapter and (folder / "adapter_config.json").is_file()
    base = str(masked(inner.config.name_or_path))
    sources = _sources(trainer.run_log.run_file)
    hub_data = [dataset_name] if dataset_name else [s for s in sources if _on_hub(s)]
    card = ModelCardData(
        base_model=base if _on_hub(base) else _base_of(base),
        datasets=list(dict.fromkeys(filter(_on_hub, hub_data))) or None,
        library_name="peft" if adapter else "transformers",
        model_name=model_name or (hub_id or saved_as.resolve().name).split("/")[-1],
        pipeline_tag="text-generation",
        tags=sorted({"generated_from_trainer", *trainer._tag_names, *tags}),
    )
    parts = [
        f"# {card.model_name}",
        f"{'An adapter' if adapter else 'A model'} trained with {trainer._name} "
        "([paper](https://arxiv.org/abs/2402.11253)) by "
        "`self_judge`, from "
        f"{_linked(base) if base else f'a {type(inner).__name__} in memory'}"
        f"{_and_its_base(base, card.base_model)}.",
        "## Data",
        _data(output, dataset_name, sources),
        "## Judge",
        *_judged_by(folder),
        *_judge(folder, hub_id or str(saved_as), trainer.judge_folder or str(saved_as)),
        *_measured(output),
        "## Versions",
        "\n".join(f"- {name}: {_version(name)}" for name in _VERSIONS),
        "## Citations",
        _CITATIONS,
    ]
    return f"---\n{card.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def pairs_card(trainer: Any) -> str:
    """Returns the card of the dataset of pairs that a run of self-training sampled and judged."""
    header = DatasetCardData(
        task_categories=["text-generation"],
        tags=["preference", "dpo", "self-judge"],
        configs=[{"config_name": "default", "data_files": "step-*.jsonl"}],
    )
    parts = [
        f"# Pairs sampled by {trainer.hub_model_id}",
        "Each line is a pair of responses that the policy sampled in self-training "
        f"([paper](https://arxiv.org/abs/2402.11253)) and that {_judge_of(trainer)} judged in both "
        "orders: `context`, `chosen`, `rejected`, and the judge's `probabilities`. The policy is "
        f"{_linked(str(trainer.hub_model_id))}.",
        "## Citations",
        _CITATIONS,
    ]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _judge_of(trainer: Any) -> str:
    """Returns who judges in self-training."""
    if trainer.given_judge is None:
        return "the initial model"
    return _code(trainer.judge.identity["model"])


def _judged_by(folder: Path) -> Iterator[str]:
    """Yields who judged in self-training, if it was another judge than the initial model."""
    if judge := load_judged_by(folder):
        where = f" at {_code(judge['endpoint'])}" if judge.get("endpoint") else ""
        votes = ", ".join(map(str, judge.get("principles", ())))
        yield f"{_code(judge['model'])}{where} judged in self-training, by {votes}."


def _judge(folder: Path, name: str, judge_folder: str) -> Iterator[str]:
    settings = load_judge_settings(folder)
    if settings is None:
        yield f"No {JUDGE_FILE} is saved with this model, so it has no judge templates."
        return
    yield (
        f"`{JUDGE_FILE}` has the templates of {len(settings.templates)} principle(s): "
        f"{', '.join(settings.templates.principles)}. The model judges pairs of responses:"
    )
    yield _JUDGING.format(name=str(masked(name)))
    for results in judge_results(Path(judge_folder)):
        data = ", ".join(_code(source["path"]) for source in results["data"])
        accuracy = _share(results["overall"]["accuracy"])
        yield f"Accuracy of the judge {_code(judge_folder)} on {data}: {accuracy}."


def _measured(output: Path) -> Iterator[str]:
    """Yields the accuracy that the run measured on held-out pairs, if it did."""
    try:
        judge = loads((output / SUMMARY).read_bytes())["judge"]
        shown = [_share(judge[side]["accuracy"]) for side in ("before", "after")]
    except (LookupError, OSError, TypeError, ValueError):
        return
    yield f"Accuracy on held-out pairs before training: {shown[0]}; after training: {shown[1]}."


def _share(accuracy: Mapping[str, Any]) -> str:
    low, high = accuracy["ci95"]
    return (
        f"{accuracy['value']:.1%} (95% interval {low:.1%} to {high:.1%}, {accuracy['n']:,} pairs)"
    )


def judge_results(model: Path) -> list[Mapping[str, Any]]:
    """Returns the evaluations in or beside a judge's folder that are newer than its weights."""
    weights = [path.stat().st_mtime for path in model.glob("*.safetensors")]
    found = []
    beside = model.resolve().parent.glob(f"*/{RESULTS}")  # as in a folder of `init`
    for path in sorted({*model.glob(RESULTS), *model.glob(f"*/{RESULTS}"), *beside}):
        try:
            results = loads(path.read_bytes())
            own = results["kind"] == "judge evaluation" and results["overall"]["accuracy"]
            if own and weights and same_path(results["judge"]["model"], model):
                found += [results] if path.stat().st_mtime >= max(weights) else []
        except (LookupError, OSError, TypeError, ValueError):
            continue
    return found


def _data(output: Path, dataset_name: str | None, sources: list[str]) -> str:
    if dataset_name:
        return _linked(dataset_name)
    try:
        counts = loads((output / DATA).read_bytes())
        lines = [
            f"- {_code(masked(label))}: {own['records']:,} records, {own['pairs']:,} labeled pairs"
            for label, own in counts.items()
        ]
    except (AttributeError, LookupError, OSError, TypeError, ValueError):
        lines = [f"- {_code(source)}" for source in sources]
    return "\n".join(lines) or "The data was passed in Python, so its name is not known."


def _sources(run_file: Mapping[str, Any] | None) -> list[str]:
    listed = (run_file or {}).get("dataset", {}).get("sources", ())
    return [str(masked(str(source["path"]))) for source in listed]


def _base_of(folder: str) -> str | None:
    """Returns the model on the Hub from which a model in a folder was trained, by its card."""
    from huggingface_hub import metadata_load

    card = Path(folder) / CARD
    named = (metadata_load(card) or {}).get("base_model") if folder and card.is_file() else None
    return named if isinstance(named, str) and _on_hub(named) else None


def _and_its_base(base: str, known: Any) -> str:
    return f", which was trained from {_linked(known)}" if known and known != base else ""


def _on_hub(name: str) -> bool:
    """Returns whether a name can only be an ID on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _on_hub(name) else _code(name)


def _code(text: Any) -> str:
    return f"`{' '.join(str(text).replace('`', ' ').split())}`"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

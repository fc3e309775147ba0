"""JSFT examples of real HH records: `jsft_dataset` against the tokenizer alone.

The baseline encodes the same prompts (a dialogue and both orders of its pair), one at a time, with
`apply_chat_template`, and builds nothing from them. Both run in turn in one process on one core.
`jsft_dataset` starts with a new `ChatEncoder`, which remembers nothing.

    python benchmarks/preparation.py [--model path/to/smollm2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import tokenizers
import transformers

from self_judge import ChatEncoder, Comparison
from self_judge.config.schema import load_run
from self_judge.data.records import judge_context
from self_judge.data.sources import load_preferences
from self_judge.models import load_tokenizer
from self_judge.training.jsft.examples import jsft_dataset

ROOT = Path(__file__).parents[1]


def prompts_of(records: Any, templates: Any) -> list[Any]:
    """The messages of every dialogue, and of every pair in both orders."""
    chats: list[Any] = []
    for record in records:
        chats.append([*record.prompt, {"role": "assistant", "content": record.demonstration}])
        for pair in record.pairs:
            given = Comparison(judge_context(record), pair.chosen, pair.rejected)
            chats += [templates.render(p, c) for p in templates for c in (given, given.swapped())]
    return chats


def main() -> None:
    """Records per second of CPU time, median of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "outputs/real/smollm2"), help="a folder")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/hh-rlhf")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(given.model)
    templates = load_run(ROOT / "configs/hh_jsft.yaml", [], "jsft").templates.judge_templates()
    assert templates is not None
    files = [str(given.data / f"{name}_train.jsonl.gz") for name in ("base", "online", "rs")]
    records = [r for file in files for r in load_preferences(file).records]
    chats = prompts_of(records, templates)

    def ours() -> Any:
        encoder = ChatEncoder(tokenizer)
        return jsft_dataset(records, encoder, templates, encoder.letter_ids(templates))

    def theirs() -> Any:
        return [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]

    sides = {"jsft_dataset": ours, "apply_chat_template": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        for name, work in sides.items():
            started = time.process_time()
            work()
            speeds[name].append(len(records) / (time.process_time() - started))
    print(f"{len(records)} records, {len(chats)} prompts, {Path(given.model).name}")
    print(f"  {platform.machine()}, Python {platform.python_version()}, tokenizers "
          f"{tokenizers.__version__}, transformers {transformers.__version__}, "
          f"datasets {datasets.__version__}")  # fmt: skip
    for name, found in speeds.items():
        print(f"  {name:<22}{statistics.median(found):8.0f} records a second of CPU time "
              f"({min(found):.0f}–{max(found):.0f})")  # fmt: skip
    a, b = (statistics.median(found) for found in speeds.values())
    print(f"  ratio {a / b:.2f}")


if __name__ == "__main__":
    main()

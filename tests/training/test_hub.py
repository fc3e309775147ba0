"""What leaves the machine: the card, and the folder on the Hub, which is that of the run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import snapshot_download

from bad_input import JSFT, TRAIN, Place
from conftest import Make
from fake_hub import USER, FakeHub, hub_on_this_machine
from self_judge import Comparison, Judge
from self_judge.cli import main
from self_judge.prompting.judge_json import load_judge_settings

TOKEN = "hf_" + "s3cr3t" * 5


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_on_this_machine(monkeypatch, tmp_path / "cache") as running:
        yield running


def run(place: Place, config: str, *more: str, model: Path | None = None) -> Path:
    pushed = ["training_args.save_steps=1", "training_args.push_to_hub=true",
              f"training_args.hub_token={TOKEN}", "training_args.hub_model_id=mine"]  # fmt: skip
    given = [f"model.model_name_or_path={model}"] if model else []
    assert main(place.run(*pushed, *given, *more, config=config)) == 0
    return place.folder / "run"


def same_files(folder: Path, remote: dict[str, bytes]) -> bool:
    """Whether a repository has the files of a folder, and no others."""
    local = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not str(path.relative_to(folder)).startswith(("_", "checkpoint-", ".", "rollouts/"))
    }
    remote = {name: content for name, content in remote.items() if name != ".gitattributes"}
    assert sorted(local) == sorted(remote)
    return local == remote


def judged_by_the_card(card: str) -> str:
    """What the lines of Python on a card print."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    printed: list[str] = []
    exec(code, {"print": lambda verdict: printed.append(str(verdict))})
    return printed[0]


def describes_the_run(card: str, folder: Path, place: Place, base: Path, method: str) -> None:
    assert "None" not in card
    assert f"from `{base}`" in card
    assert method in card
    data = str(place.data["hh"])
    counts = json.loads((folder / "data.json").read_text())[data]
    assert f"- `{data}`: {counts['records']} records, {counts['pairs']} labeled pairs" in card
    for paper in ("2402.11253", "Lee, Sangkyu", "vonwerra2020trl"):
        assert paper in card
    assert "Accuracy" not in card  # not known


def test_a_merged_model_is_pushed_whole_and_without_the_adapter_of_its_checkpoints(
    hub: FakeHub, place: Place
) -> None:
    folder = run(place, JSFT, "jsft_args.merge_adapter=true",
                 "peft_config={r: 2, target_modules: [q_proj]}")  # fmt: skip
    remote = hub.files[f"{USER}/mine"]
    assert hub.commits == ["Training in progress, step 1", "End of training"]
    assert {"model.safetensors", "judge.json", "README.md", "chat_template.jinja"} <= set(remote)
    assert not [name for name in remote if name.startswith("adapter_")]
    assert same_files(folder, remote)
    # No access token leaves the machine, not even in the pickled arguments.
    assert not [name for name, content in remote.items() if TOKEN.encode() in content]
    assert not [body for body in hub.said if TOKEN.encode() in body]
    # Whoever downloads it has the same judge.
    there = Path(snapshot_download(f"{USER}/mine"))
    assert load_judge_settings(there) == load_judge_settings(folder)
    pair = Comparison("What is the capital of France?", "Paris.", "It is Rome.")
    (here,), (downloaded,) = (Judge.from_pretrained(f).compare([pair]) for f in (folder, there))
    assert here == downloaded
    card = (there / "README.md").read_text()
    assert f"Judge.from_pretrained('{USER}/mine')" in card
    assert "library_name: transformers" in card
    assert judged_by_the_card(card) == str(here)
    describes_the_run(card, folder, place, place.base, "JSFT")


def test_a_policy_is_pushed_with_its_adapter_its_judge_and_every_checkpoint(
    hub: FakeHub, place: Place
) -> None:
    folder = run(place, TRAIN, "peft_config={r: 2, target_modules: [q_proj]}",
                 "training_args.hub_strategy=all_checkpoints")  # fmt: skip
    remote = hub.files[f"{USER}/mine"]
    checkpoint = {n: remote.pop(n) for n in list(remote) if n.startswith("checkpoint-1/")}
    assert {"adapter_model.safetensors", "judge.json", "README.md"} <= set(remote)
    assert same_files(folder, remote)
    assert "checkpoint-1/optimizer.pt" in checkpoint
    assert not [n for n, c in {**remote, **checkpoint}.items() if TOKEN.encode() in c]
    card = remote["README.md"].decode()
    assert "library_name: peft" in card
    describes_the_run(card, folder, place, place.saved, "SELF-JUDGE")
    assert judged_by_the_card(card).startswith("Verdict(preferred=")


def test_sampled_pairs_are_pushed_as_a_dataset_where_asked(hub: FakeHub, place: Place) -> None:
    words = ("training_args.max_steps=2", "self_judge_args.push_pairs=true")
    folder = run(place, TRAIN, *words)
    remote = hub.files[f"{USER}/mine-pairs"]
    card = remote.pop("README.md").decode()
    remote.pop(".gitattributes")
    assert sorted(remote) == ["step-000001.jsonl", "step-000002.jsonl"]
    for name, content in remote.items():
        assert content == (folder / "rollouts" / name).read_bytes()
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"] == "step-*.jsonl"
    assert f"https://huggingface.co/{USER}/mine" in card
    assert "lee2024aligning" in card
    pairs = load_dataset("json", data_files=str(folder / "rollouts" / "step-*.jsonl"))["train"]
    assert {"context", "chosen", "rejected", "probabilities"} <= set(pairs.column_names)
    assert not [
        name for name, c in {**remote, "card": card.encode()}.items() if TOKEN.encode() in c
    ]


def test_pairs_are_not_pushed_without_a_push(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.run("self_judge_args.push_pairs=true", config=TRAIN)) == 2
    assert "push_pairs requires push_to_hub and save_rollouts" in capsys.readouterr().err


def test_the_card_of_a_policy_has_its_judges_accuracy_where_it_was_evaluated(
    place: Place, make: Make, tokenizer: Any
) -> None:
    judge = place.saved
    words = ["eval", str(place.data["hh"]), "--model", str(judge), "--output", str(judge / "eval")]
    assert main([*words, "--max-pairs", "6"]) == 0
    trainer = make(model=str(judge), judge_templates=None)
    trainer.save_model()
    written = Path(trainer.args.output_dir) / "README.md"
    card = written.read_text()
    accuracy = json.loads((judge / "eval" / "results.json").read_text())["overall"]["accuracy"]
    low, high = accuracy["ci95"]
    assert f"{accuracy['value']:.1%} (95% interval {low:.1%} to {high:.1%}, 6 pairs)" in card
    assert f"from `{judge}`" in card
    assert judged_by_the_card(card).startswith("Verdict(preferred=")
    # Other weights: the numbers are not theirs.
    weights = judge / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    trainer.create_model_card()
    assert "Accuracy" not in written.read_text()


def test_a_trainer_in_python_writes_and_pushes_a_card_with_the_names_it_is_given(
    hub: FakeHub, make: Make, tmp_path: Path
) -> None:
    trainer: Any = make(max_steps=1)
    trainer.train()
    trainer.push_to_hub(dataset_name="org/pairs", tags="tiny", token=TOKEN)
    remote = hub.files[f"{USER}/run"]
    assert same_files(tmp_path / "run", remote)
    card = remote["README.md"].decode()
    assert "[org/pairs](https://huggingface.co/org/pairs)" in card
    assert "- tiny\n" in card
    assert "a LlamaForCausalLM in memory" in card
    assert "None" not in card


@pytest.mark.parametrize("private", [True, False])
def test_the_model_and_its_pairs_are_as_private_as_push_to_hub_says(
    hub: FakeHub, make: Make, private: bool
) -> None:
    trainer: Any = make(max_steps=1, push_to_hub=True, push_pairs=True, hub_token=TOKEN)
    trainer.hub_model_id = None  # `push_to_hub` creates the repository, as for a trainer without it
    trainer.train()
    hub.said.clear()
    trainer.push_to_hub(private=private)
    created = [json.loads(b) for b in hub.said if b.startswith(b'{"name"')]
    expected = "private" if private else "public"
    assert [(c["name"], c["visibility"]) for c in created] == [
        ("run", expected),
        ("run-pairs", expected),
    ]

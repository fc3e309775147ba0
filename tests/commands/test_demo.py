"""The demo, made small: every phase runs and the summary has the promised form."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from self_judge.commands.demo.run import PRIOR_WEIGHT, run_demo
from self_judge.commands.demo.steps import DemoSettings
from self_judge.config.self_training import SamplingSettings
from self_judge.data import synthetic
from self_judge.data.toy_world import gold_reasons, gold_score
from self_judge.datatypes import stable_seed
from self_judge.inference.sampling import TransformersSampler
from self_judge.models import load_model
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import BRACKETS, rollout_files

TINY = DemoSettings(
    base_steps=2,
    jsft_records=60,
    prompts_per_step=4,
    steps=2,
    max_new_tokens=6,
    held_out_pairs=6,
    held_out_prompts=5,
)


@pytest.fixture(scope="module")
def printed() -> Console:
    return Console(record=True, width=80, file=io.StringIO())


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, printed: Console) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(3, folder, TINY, printed)
    return folder


def test_the_summary_has_the_promised_form(output: Path) -> None:
    summary = json.loads((output / "summary.json").read_text())
    parts = {"seed", "seconds", "judge", "gold", "prior_weight", "win_rate_vs_jsft"}
    parts |= {"rubric", "examples"}
    assert set(summary) == parts
    assert summary["seed"] == 3
    assert set(summary["judge"]) == {"accuracy", "order_agreement", "n"}
    assert summary["judge"]["n"] == 6
    gold = summary["gold"]
    assert set(gold) == {"jsft", "self_judge", "self_judge_rejection", "without_prior"}
    assert set(gold["self_judge_rejection"]) == {"1", "4", "16"}
    assert set(gold["without_prior"]) == {"4", "16"}
    means = [gold["jsft"], gold["self_judge"]]
    means += [*gold["self_judge_rejection"].values(), *gold["without_prior"].values()]
    for entry in means:
        low, high = entry["ci95"]
        assert 0 <= low <= entry["mean"] <= high <= 1
    assert gold["self_judge_rejection"]["1"] == gold["self_judge"]
    assert 0 <= summary["win_rate_vs_jsft"]["value"] <= 1


def test_the_first_held_out_prompts_are_shown_with_rated_answers(
    output: Path, printed: Console
) -> None:
    examples = json.loads((output / "summary.json").read_text())["examples"]
    assert [e["prompt"] for e in examples] == synthetic.instructions(TINY.held_out_prompts, 3)[:3]
    text = " ".join(printed.export_text(clear=False).split())
    for example in examples:
        assert [a["by"] for a in example["answers"]] == ["JSFT", "self-trained", "best of 16"]
        assert f"prompt {example['prompt']} JSFT " in text
        for answer in example["answers"]:
            score = gold_score(example["prompt"], answer["text"])
            assert answer["gold_score"] == score
            assert f"gold {score:.2f}: {answer['gold_reasons']}" in text


def test_sampled_pairs_and_brackets_have_gold_scores(output: Path) -> None:
    (_, path), *_ = rollout_files(output / "self_judge")
    for pair in read_lines(path):
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_gold_score"] == gold_score(pair["context"], pair[side])
            assert pair[f"{side}_gold_reasons"] == gold_reasons(pair["context"], pair[side])
    for line in read_lines(output / BRACKETS):
        told = [gold_reasons(line["context"], text) for text in line["responses"]]
        assert line["gold_reasons"] == told


def test_the_prior_of_the_tournaments_is_that_of_the_model_before_self_training(
    output: Path,
) -> None:
    encoder = ChatEncoder(synthetic.tiny_tokenizer())
    settings = SamplingSettings(max_new_tokens=TINY.max_new_tokens)
    jsft, policy = (
        TransformersSampler(load_model(output / name), encoder, settings)
        for name in ("jsft", "self_judge")
    )
    lines = list(read_lines(output / BRACKETS))
    prompts = [encoder.encode_prompt([{"role": "user", "content": x["context"]}]) for x in lines]
    seeds = [stable_seed(3, "held-out", i) for i in range(len(lines))]
    sampled = policy.sample(prompts, 16, seeds)
    assert [[r.text for r in own] for own in sampled] == [x["responses"] for x in lines]
    for model, matches in ((jsft, True), (policy, False)):
        for line, means in zip(lines, model.mean_log_probs(prompts, sampled), strict=True):
            prior = pytest.approx([PRIOR_WEIGHT * mean for mean in means], abs=1e-4)
            assert (line["prior"] == prior) == matches


def test_both_models_are_kept_with_what_they_judge_by(output: Path) -> None:
    for name in ("jsft", "self_judge"):
        assert (output / name / "model.safetensors").is_file()
        assert load_judge_settings(output / name) is not None
    assert len(list((output / "self_judge" / "rollouts").iterdir())) == 2
    assert not list(output.glob("*.part"))


def test_the_same_seed_gives_the_same_numbers(output: Path, tmp_path: Path) -> None:
    again = run_demo(3, tmp_path, TINY, Console(quiet=True))
    first = json.loads((output / "summary.json").read_text())
    for summary in (first, again):
        summary.pop("seconds")
    assert first == json.loads(json.dumps(again))

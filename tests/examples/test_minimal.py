"""The method in one file: what it computes is what the package computes on the same inputs."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import minimal
from conftest import ROOT, SMALL
from self_judge import ChatEncoder, Comparison, Judge, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.data import synthetic
from self_judge.judging.tournament import knockouts
from self_judge.training.self_training.rollouts import preference_batch

TEMPLATES = synthetic.judge_templates(principles=False, overall=True)


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """A tokenizer, and a model after a few steps of JSFT, whose letters have probabilities."""
    tokenizer = synthetic.tiny_tokenizer()
    model = synthetic.tiny_model(tokenizer, 1, hidden_size=64, layers=2)
    random.seed(0)
    examples = minimal.jsft_examples(tokenizer, synthetic.records(200, 3, writers=2))
    minimal.jsft(model, examples, steps=40, batch=16, lr=2e-3)
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def judge(taught: tuple[Any, Any]) -> Judge:
    tokenizer, model = taught
    return Judge(model, ChatEncoder(tokenizer), TEMPLATES)


def questions_and_answers(count: int, seed: int) -> list[tuple[str, str, str]]:
    records = synthetic.records(count, seed, "test", writers=2)
    return [(r.prompt[0]["content"], r.pairs[0].chosen, r.pairs[0].rejected) for r in records]


def test_the_file_is_short_enough_to_be_read_in_ten_minutes() -> None:
    text = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200


def test_its_examples_are_those_of_jsft(taught: tuple[Any, Any]) -> None:
    from self_judge.training.jsft.examples import ExampleEncoder

    tokenizer, _ = taught
    encoder = ChatEncoder(tokenizer)
    encode = ExampleEncoder(encoder, TEMPLATES, encoder.letter_ids(TEMPLATES))
    for record in synthetic.records(20, random.SystemRandom().randrange(10**6), writers=2):
        general = copy.copy(record)
        object.__setattr__(general, "pairs", record.pairs[:1])
        expected = [(list(e.input_ids), list(e.labels)) for e in encode.examples(general)]
        assert minimal.jsft_examples(tokenizer, [record]) == expected


def test_its_judge_gives_the_scores_of_the_packages_judge(
    taught: tuple[Any, Any], judge: Judge
) -> None:
    tokenizer, model = taught
    pairs = questions_and_answers(40, random.SystemRandom().randrange(10**6))
    expected = [(v.score_a, v.score_b) for v in judge.compare([Comparison(*p) for p in pairs])]
    found = minimal.judge(model, tokenizer, pairs)
    assert found.min() > 0.01  # letters are likely enough for the comparison to say something
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_its_loss_and_gradient_are_those_of_the_trainer(
    taught: tuple[Any, Any], tmp_path: Path
) -> None:
    tokenizer, model = taught
    draw = random.Random(random.SystemRandom().randrange(10**6))
    pairs = questions_and_answers(6, draw.randrange(10**6))
    prompts = [minimal.prompt_ids(tokenizer, x) for x, _, _ in pairs]
    chosen, rejected = ([tokenizer.encode(p[k]) for p in pairs] for k in (1, 2))
    decided = [draw.random() < 0.8 for _ in pairs]
    policy = synthetic.tiny_model(tokenizer, 2, hidden_size=64, layers=2)  # another than the judge
    ours = copy.deepcopy(policy)
    reference = copy.deepcopy(model).requires_grad_(False)
    loss = minimal.dpo_loss(
        ours, reference, prompts * 2, chosen + rejected, torch.tensor(decided).float()
    )
    loss.backward()

    trainer = SelfJudgeTrainer(
        policy,
        ref_model=reference,
        args=SelfJudgeConfig(str(tmp_path), **SMALL, max_steps=1, beta=0.1),
        processing_class=tokenizer,
        judge_templates=TEMPLATES,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Why?"}]}]),
    )
    batch = preference_batch(
        list(zip(prompts, chosen, rejected, decided, strict=True)), tokenizer.pad_token_id
    )
    trainer.model.train()
    theirs = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [
        torch.cat([p.grad.double().flatten() for p in m.parameters()])  # type: ignore[union-attr]
        for m in (ours, trainer.model)
    ]
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_its_knockout_has_the_winner_of_the_packages_knockout(
    count: int, taught: tuple[Any, Any], judge: Judge
) -> None:
    tokenizer, model = taught
    draw = random.Random(random.SystemRandom().randrange(10**6))
    for seed in range(4):
        told = questions_and_answers(count, draw.randrange(10**6))
        answers = [a for _, a, _ in told]
        answers[-1] = answers[0]  # equal answers meet by lot
        question = told[0][0]
        (bracket,) = knockouts(judge.compare, [question], [answers], seeds=[seed])
        assert minimal.tournament(model, tokenizer, question, answers, seed) == bracket.winner


@pytest.mark.slow
def test_the_file_runs_and_every_step_of_the_method_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    minimal.main(seed=0)
    printed = capsys.readouterr().out.splitlines()
    accuracy, jsft, trained, best = (float(line.split()[-1][-5:]) for line in printed)
    assert accuracy > 0.75
    assert jsft < trained < best

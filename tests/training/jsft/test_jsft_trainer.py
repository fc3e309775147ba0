"""JSFTTrainer: both orders of a pair in one batch, and TRL's loss on packed rows."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from conftest import DEVICE, placed, tiny_llama
from families import FUSED
from self_judge import ChatEncoder, JudgeAugmentedSFTCollator, JudgeTemplates
from self_judge.datatypes import LabeledPair, Message, PreferenceRecord
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.jsft.trainer import JSFTTrainer, PairSampler


@pytest.fixture
def examples(tokenizer: Any, templates: JudgeTemplates) -> Dataset:
    records = [
        PreferenceRecord(
            prompt=(Message(role="user", content=f"what is {i} and {i}?"),),
            demonstration=f"it is {2 * i}",
            pairs=(LabeledPair(f"it is {2 * i}", "who knows"),),
            source="made up",
            index=i,
        )
        for i in range(6)
    ]
    encoder = ChatEncoder(tokenizer)
    return jsft_dataset(records, encoder, templates, encoder.letter_ids(templates))[0]


def make(kind: Any, model: Any, tokenizer: Any, examples: Dataset, folder: Path, **own: Any) -> Any:
    return kind(
        model=model,
        args=SFTConfig(
            str(folder),
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=5,
        ),
        data_collator=JudgeAugmentedSFTCollator(tokenizer),
        train_dataset=examples,
        processing_class=tokenizer,
        **own,
    )


def test_twins_follow_each_other_and_every_example_is_drawn_once() -> None:
    twins = [False, False, True, False, True, False]
    sampler = PairSampler(twins, seed=3)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(sampler)))
        assert all(order[order.index(i) - 1] == i - 1 for i in (2, 4))
        orders.append(tuple(order))
    assert len(set(orders)) > 1
    assert list(PairSampler(twins, seed=3)) == list(orders[0])


def test_the_second_order_of_a_pair_is_marked_as_twin(examples: Dataset) -> None:
    assert sum(examples["swapped"]) == sum(kind == "judge" for kind in examples["kind"]) / 2
    for before, example in itertools.pairwise(examples):
        if example["swapped"]:
            assert before["kind"] == example["kind"] == "judge"
            assert not before["swapped"]


@FUSED
def test_batches_keep_twins_together(tokenizer: Any, examples: Dataset, tmp_path: Path) -> None:
    def sampler(**own: Any) -> Any:
        model = tiny_llama(len(tokenizer))
        return make(JSFTTrainer, model, tokenizer, examples, tmp_path, **own)._get_train_sampler()

    assert isinstance(sampler(), PairSampler)
    assert not isinstance(sampler(packing="off"), PairSampler)


@FUSED
@pytest.mark.parametrize("packing", ["auto", "cache", "padding"])
def test_the_loss_and_its_gradient_are_those_of_trl(
    packing: str, tokenizer: Any, examples: Dataset, tmp_path: Path
) -> None:
    model = tiny_llama(len(tokenizer))
    batch = JudgeAugmentedSFTCollator(tokenizer)([examples[i] for i in range(7)])
    losses, gradients = [], []
    for kind, own in ((JSFTTrainer, {"packing": packing}), (SFTTrainer, {})):
        trainer = make(kind, copy.deepcopy(model), tokenizer, examples, tmp_path, **own)
        trainer.model.train()
        loss = trainer.compute_loss(
            trainer.model, placed(batch), num_items_in_batch=torch.tensor(40, device=DEVICE)
        )
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()

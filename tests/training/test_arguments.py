"""Habits of users of TRL: what they pass works as there, or one line gives the right name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from conftest import SMALL, TEMPLATES, Make, history, same, tiny_llama, weights
from self_judge import (
    ChatEncoder,
    Comparison,
    JSFTTrainer,
    Judge,
    JudgeAugmentedSFTCollator,
    SelfJudgeConfig,
    SelfJudgeTrainer,
    jsft_dataset,
    load_preferences,
    to_self_judge_rows,
    tournament_rejection_sampling,
)

ASKED = [{"role": "user", "content": "what?"}]


@pytest.fixture
def it(
    make: Make, model: Any, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> Any:
    """What the habits below need."""
    rows = Dataset.from_list(queries)

    def jsft(**changes: Any) -> JSFTTrainer:
        args = {k: v for k, v in SMALL.items() if k not in ("max_new_tokens", "max_length")}
        limit = changes.pop("max_length", None)
        config = SFTConfig(str(tmp_path / "jsft"), max_steps=1, max_length=limit, **args)
        data = (
            changes.pop("data", None)
            or jsft_dataset(load_preferences(rows), tokenizer, TEMPLATES)[0]
        )
        given = {"model": model, "args": config, "train_dataset": data, **changes}
        collator = JudgeAugmentedSFTCollator(tokenizer)
        return JSFTTrainer(**{"processing_class": tokenizer, "data_collator": collator, **given})

    return SimpleNamespace(
        make=make,
        jsft=jsft,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        folder=tmp_path,
        row=lambda **row: Dataset.from_list([row]),
        play=lambda *given, **named: tournament_rejection_sampling(
            *given,
            **{"model": model, "tokenizer": tokenizer, "judge_templates": TEMPLATES, **named},
        ),
    )


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "model_init": (
        lambda t: t.make(model_init=lambda: t.model),
        "SelfJudgeTrainer has no argument 'model_init': pass model",
    ),
    "model_init of JSFT": (
        lambda t: t.jsft(model_init=lambda: t.model),
        "JSFTTrainer has no argument 'model_init': pass model",
    ),
    "reward functions": (
        lambda t: t.make(reward_funcs=[len]),
        "'reward_funcs': pass judge_templates",
    ),
    "a tokenizer for JSFT": (lambda t: t.jsft(tokenizer=t.tokenizer), "pass processing_class"),
    "GRPO's length": (
        lambda t: SelfJudgeTrainer(t.model, max_completion_length=8),
        "max_completion_length: unknown key; it is now max_new_tokens",
    ),
    "GRPO's length as a setting": (
        lambda t: SelfJudgeConfig("x", max_completion_length=8),
        "max_completion_length: unknown key; it is now max_new_tokens",
    ),
    "a misspelled setting": (
        lambda t: SelfJudgeConfig("x", max_new_tokenz=8),
        "did you mean max_new_tokens?",
    ),
    "a setting as an argument": (
        lambda t: t.jsft(learning_rate=1.0),
        "args=SFTConfig(..., learning_rate=",
    ),
    "settings of GRPO": (
        lambda t: t.make(args=GRPOConfig(str(t.folder), bf16=False)),
        "args must be SelfJudgeConfig or DPOConfig or TrainingArguments, got GRPO",
    ),
    "settings of self-training for JSFT": (
        lambda t: t.jsft(args=SelfJudgeConfig(str(t.folder))),
        "args must be SFTConfig or",
    ),
    "settings as a dict": (lambda t: t.make(args={}), "args must be SelfJudgeConfig"),
    "the order of Transformers": (
        lambda t: SelfJudgeTrainer(t.model, TrainingArguments("x")),
        "TRL's order: model, ref_model, args",
    ),
    "the order of the method's trainer": (
        lambda t: SelfJudgeTrainer(t.model, t.tokenizer),
        "TRL's order: model, ref_model, args",
    ),
    "no model": (lambda t: t.make(model=None), "model must be a model, a folder or a model ID"),
    "a tokenizer by name": (
        lambda t: t.make(processing_class="x"),
        "processing_class must be a tok",
    ),
    "another collator": (
        lambda t: t.make(data_collator=list),
        "data_collator must be a SelfJudgeCo",
    ),
    "truncation": (
        lambda t: t.make(truncation_mode="keep_end"),
        "truncation_mode must be keep_start",
    ),
    "grouping by length": (
        lambda t: t.make(train_sampling_strategy="group_by_length"),
        "train_sampling_strategy must be random or sequential",
    ),
    "label smoothing of Transformers": (
        lambda t: t.make(label_smoothing_factor=0.1),
        "label_smoothing_factor must be 0: set label_smoothing",
    ),
    "no rows": (lambda t: t.make(train_dataset=t.rows.select([])), "the train dataset has no rows"),
    "no rows to evaluate": (
        lambda t: t.make(eval_dataset=t.rows.select([])),
        "eval dataset has no rows",
    ),
    "a list to evaluate": (
        lambda t: t.make().evaluate([{}]),
        "the eval dataset must be a datasets.D",
    ),
    "no content": (
        lambda t: t.make(train_dataset=t.row(prompt=[{**ASKED[0], "content": None}])),
        "record 0 of the train dataset: 'prompt' has a message whose content is NoneType",
    ),
    "a context in messages": (
        lambda t: t.make(train_dataset=t.row(query="x", context=ASKED)),
        "record 0 of the train dataset: 'context' must be text, got list",
    ),
    "a response without messages": (
        lambda t: t.make(eval_dataset=t.row(prompt=ASKED, chosen=[], rejected=[])),
        "record 0 of the eval dataset: 'chosen' must be text or a non-empty list",
    ),
    "an optimizer of the frozen base": (
        lambda t: t.make(
            optimizers=(torch.optim.SGD(t.model.parameters(), 0.1), None),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        ).train(),
        "has none of the trained parameters",
    ),
    "pairs for JSFT": (lambda t: t.jsft(data=t.rows), "pass the examples of jsft_dataset("),
    "examples longer than JSFT's limit": (
        lambda t: t.jsft(max_length=20),
        "longer than args.max_length 20",
    ),
    "a length for the collator": (
        lambda t: JudgeAugmentedSFTCollator(t.tokenizer, 2048),
        "ignore_index must be below 0, got 2048",
    ),
    "a length for the collator by name": (
        lambda t: JudgeAugmentedSFTCollator(t.tokenizer, max_length=8),
        "pass max_length to jsft_data",
    ),
    "raw rows for the collator": (
        lambda t: JudgeAugmentedSFTCollator(t.tokenizer)([{"text": "x"}]),
        "requires examples of jsft_dataset",
    ),
    "rows for JSFT's dataset": (
        lambda t: jsft_dataset(t.rows, t.tokenizer, TEMPLATES),
        "records[0] must be a record of load_preferences, got dict",
    ),
    "a split": (lambda t: load_preferences("x", split="test"), "pass {'path': ..., 'split': ...}"),
    "the trainer's names for a judge": (
        lambda t: Judge(t.model, tokenizer=t.tokenizer),
        "Judge has no argument 'tokenizer': pass encoder",
    ),
    "a judge by name": (
        lambda t: Judge("x", t.tokenizer, TEMPLATES),
        "use Judge.from_pretrained('x')",
    ),
    "an encoder by name": (lambda t: ChatEncoder("x"), "pass load_tokenizer('x')"),
    "one comparison": (
        lambda t: Judge(t.model, t.tokenizer, TEMPLATES).compare(Comparison("", "", "")),
        "pass [comparison]",
    ),
    "a response without text": (
        lambda t: Judge(t.model, t.tokenizer, TEMPLATES).compare([Comparison("", None, "")]),
        "response_a of comparison 0 must be text, got NoneType",
    ),
    "the judge's names for a tournament": (
        lambda t: t.play(templates=TEMPLATES),
        "pass judge_templates",
    ),
    "a tournament of one text": (
        lambda t: t.play(contexts="what?", responses=["a", "b"]),
        "requires contexts, a list of texts",
    ),
    "a tournament of nothing": (lambda t: t.play(), "requires contexts, a list of texts"),
    "an entrant without text": (
        lambda t: t.play(contexts=["what?"], responses=[["a", None]]),
        "responses[0][1] must be text, got NoneType",
    ),
    "an entrant in messages": (
        lambda t: t.play(contexts=["what?"], responses=[[ASKED[0], "a"]]),
        "responses[0][0] must be text, got dict",
    ),
}


@pytest.mark.parametrize("habit", REFUSED)
def test_another_librarys_argument_is_refused_in_one_line_with_the_right_name(
    habit: str, it: Any
) -> None:
    does, said = REFUSED[habit]
    with pytest.raises((TypeError, ValueError)) as refused:
        does(it)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_predictions_are_those_of_an_evaluation(it: Any) -> None:
    trainer = it.make()
    predicted = trainer.predict(it.rows)
    assert predicted.metrics["test_loss"] == trainer.evaluate(it.rows)["eval_loss"]
    assert len(predicted.predictions) == 2 * len(it.rows)
    assert "test_loss" in it.jsft().predict(it.jsft().train_dataset).metrics


def test_datasets_for_evaluation_may_be_named_or_streamed(it: Any) -> None:
    trainer = it.make(eval_dataset={"a": it.rows})
    streamed = it.rows.to_iterable_dataset()
    named = trainer.evaluate(DatasetDict(b=it.rows))
    assert trainer.evaluate()["eval_a_loss"] == named["eval_b_loss"]
    assert trainer.evaluate(streamed)["eval_loss"] == named["eval_b_loss"]


def test_a_reference_by_its_folder_is_the_judge_and_brings_its_templates(
    it: Any, saved_judge: Path
) -> None:
    policy = tiny_llama(len(it.tokenizer), 7)
    trainer = it.make(
        model=copy.deepcopy(policy), ref_model=saved_judge, judge_templates=None, max_steps=1
    )
    assert trainer.judge.model is trainer.ref_model
    assert same(weights(trainer.ref_model), weights(it.model))
    assert same(weights(trainer.model), weights(policy))
    assert list(trainer.judge_templates) == list(TEMPLATES)
    trainer.train()
    assert len(history(trainer, "loss")) == 1


def test_the_trainers_take_a_model_by_its_path(it: Any, saved_judge: Path) -> None:
    for trainer in (it.make(model=saved_judge, judge_templates=None), it.jsft(model=saved_judge)):
        assert same(weights(trainer.model), weights(it.model))


def test_an_adapter_by_name_is_trained_further_where_peft_config_is_none(
    it: Any, saved_judge: Path
) -> None:
    first = it.jsft(model=saved_judge, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    first.save_model(str(it.folder / "adapter"))
    trainer = it.jsft(model=str(it.folder / "adapter"), peft_config=None)
    assert any("lora_A" in n for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_a_tournament_takes_the_arguments_in_the_order_of_the_method(it: Any) -> None:
    letters = ChatEncoder(it.tokenizer).letter_ids(
        Judge(it.model, it.tokenizer, TEMPLATES).templates
    )
    contexts, responses = ["what?", "why?"], [["a", "b", "c"], ["d", "e"]]
    by_place = tournament_rejection_sampling(
        it.model, it.tokenizer, TEMPLATES, *letters, contexts, iter(responses), 500, 4
    )
    assert by_place == it.play(contexts=contexts, responses=responses)


def test_preferences_come_from_a_path_records_or_a_dataset(
    it: Any, queries: list[dict[str, Any]]
) -> None:
    path = it.folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in queries))
    expected = to_self_judge_rows(load_preferences(str(path)))
    assert len(expected) == len(queries)
    for given in (path, [path], {"path": path}, queries, iter(queries), it.rows, [it.rows],
                  DatasetDict(train=it.rows)):  # fmt: skip
        assert to_self_judge_rows(load_preferences(given)) == expected

"""Self-training: what is trained on, against what, and that nothing else moves."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import processors
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from trl import DPOConfig, DPOTrainer

from conftest import (
    CHATML,
    SMALL,
    TEMPLATES,
    Make,
    byte_bpe,
    history,
    on_test_device,
    placed,
    same,
    tiny_llama,
    weights,
    wrap,
)
from families import FUSED
from self_judge import ChatEncoder, SelfJudgeCollator, SelfJudgeConfig, SelfJudgeTrainer
from self_judge.adapters import merged
from self_judge.models import load_model
from self_judge.packing.fused_head import FUSED_HEAD
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.training.identity.reference import active_reference
from self_judge.training.self_training.prompts import COLUMNS
from self_judge.training.self_training.rollouts import preference_batch

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("packing", ["off", "auto", "cache", "padding"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_loss_and_gradient_on_a_fixed_pair_are_those_of_trl(
    loss_type: str,
    packing: str,
    make: Make,
    tokenizer: Any,
    queries: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    policy, reference = tiny_llama(len(tokenizer), 1), tiny_llama(len(tokenizer), 2)
    ours = make(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        loss_type=loss_type,
        packing=packing,
    )
    theirs = DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(
            str(tmp_path / "dpo"),
            loss_type=loss_type,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(queries),
    )
    pair = ([5, 6, 7], [8, 9, 10, 11], [12, 13], True)
    batch = preference_batch([pair, ([20, 21], [22], [23, 24, 25], True)], tokenizer.pad_token_id)
    gradients = []
    for trainer in (ours, theirs):
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, placed(batch), return_outputs=False)
        loss.backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters()})
        trainer.last_loss = loss.detach()
    if packing == "off":
        torch.testing.assert_close(ours.last_loss, theirs.last_loss, rtol=0, atol=0)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0, msg=name)
        return
    # Packed, up to the order of additions.
    torch.testing.assert_close(ours.last_loss, theirs.last_loss, rtol=1e-5, atol=1e-6)
    flat = [torch.cat([g.double().flatten() for g in own.values()]) for own in gradients]
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[1].norm()


def log_probability(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π(response | prompt) in float64, token by token, unpadded."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = copy.deepcopy(model).double()(ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(response)), response]


@pytest.mark.parametrize(
    ("loss_type", "average"), [("ipo", False), ("ipo", True), ("sigmoid", True), ("hinge", False)]
)
def test_log_probabilities_are_summed_or_averaged_as_asked(
    loss_type: str, average: bool, make: Make, tokenizer: Any
) -> None:
    policy, reference = tiny_llama(len(tokenizer), 1), tiny_llama(len(tokenizer), 2)
    trainer = make(
        model=copy.deepcopy(policy), ref_model=reference, loss_type=loss_type,
        average_log_prob=average, beta=0.3,
    )  # fmt: skip
    prompt, chosen, rejected = [5, 6, 7], [8, 9, 10, 11], [12, 13]
    batch = preference_batch([(prompt, chosen, rejected, True)], tokenizer.pad_token_id)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, placed(batch), return_outputs=False)
    ratios = []
    for response in (chosen, rejected):
        ratio = log_probability(policy, prompt, response) - log_probability(
            reference, prompt, response
        )
        ratios.append(ratio.mean() if average else ratio.sum())
    delta = ratios[0] - ratios[1]
    expected = {
        "sigmoid": lambda: -torch.nn.functional.logsigmoid(0.3 * delta),
        "hinge": lambda: torch.relu(1 - 0.3 * delta),
        "ipo": lambda: (delta - 1 / (2 * 0.3)) ** 2,
    }[loss_type]()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    if not average:
        logged = trainer._metrics["train"]["rewards/margins"][-1]
        assert logged == pytest.approx(0.3 * delta.item(), rel=1e-3)


def test_exactly_the_sampled_ids_are_trained_on(make: Make, monkeypatch: Any) -> None:
    trainer = make(max_steps=1)
    sampled: list[tuple[int, ...]] = []
    trained: list[tuple[list[int], list[int]]] = []
    roll_out, compute_loss = trainer._roll_out, trainer._compute_loss

    def spy_on_rollouts(batches: Any) -> Any:
        rollouts = roll_out(batches)
        for r in (r for batch in rollouts for r in batch if r.decided):
            sampled.extend([(*r.prompt_ids, *r.chosen.ids), (*r.prompt_ids, *r.rejected.ids)])
        return rollouts

    def spy_on_loss(model: Any, inputs: Any, return_outputs: bool) -> Any:
        for ids, seen, completion in zip(
            inputs["input_ids"].tolist(),
            inputs["attention_mask"].tolist(),
            inputs["completion_mask"].tolist(),
            strict=True,
        ):
            length = sum(seen)
            assert not any(completion[length:])
            trained.append((ids[:length], completion[:length]))
        return compute_loss(model, inputs, return_outputs)

    monkeypatch.setattr(trainer, "_roll_out", spy_on_rollouts)
    monkeypatch.setattr(trainer, "_compute_loss", spy_on_loss)
    trainer.train()
    with_loss = [tuple(ids) for ids, mask in trained if any(mask)]
    assert len(with_loss) == len(sampled) > 0
    assert sorted(with_loss) == sorted(sampled)
    prompts = {tuple(ids) for ids in trainer.train_dataset["prompt_ids"]}
    for ids, mask in trained:
        if any(mask):
            assert tuple(i for i, m in zip(ids, mask, strict=True) if not m) in prompts


@FUSED
@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_the_references_log_probabilities_from_the_rollout_are_those_of_the_loss(
    lora: bool, packing: str, ld_alpha: float | None, make: Make, model: Any, monkeypatch: Any
) -> None:
    trainer = make(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, packing=packing,
        peft_config=LoraConfig(**LORA, init_lora_weights=False) if lora else None,
        ld_alpha=ld_alpha,
    )  # fmt: skip
    batches = [next(iter(trainer.get_train_dataloader())) for _ in range(2)]
    asked: list[int] = []
    compute = trainer.compute_ref_log_probs
    monkeypatch.setattr(
        trainer,
        "compute_ref_log_probs",
        lambda model, inputs: asked.append(len(inputs["input_ids"])) or compute(model, inputs),
    )
    trainer.model.train()
    trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
    given = trainer._prepare_inputs(batches[0])
    # Packing takes the step in one go; padded, a micro-batch is a pass.
    assert asked == ([8] if packing == "auto" else [4, 4])
    losses = []
    for left_out in ((), ("ref_chosen_logps", "ref_rejected_logps")):
        inputs = {k: v for k, v in given.items() if k not in left_out}
        losses.append(trainer._compute_loss(trainer.model, inputs, return_outputs=False).item())
        assert not trainer.precompute_ref_logps  # `evaluate` would take it for the data's
    if packing == "off":
        assert losses[0] == losses[1]
    else:
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_several_rollouts_of_a_prompt_are_several_pairs_in_its_batch(
    make: Make, monkeypatch: Any
) -> None:
    rolled: dict[int, list[Any]] = {}
    for times in (1, 3):
        trainer = make(rollouts_per_update=times, num_generations=2, temperature=3.0)
        roll_out = trainer._roll_out
        monkeypatch.setattr(
            trainer,
            "_roll_out",
            lambda batches, times=times, roll_out=roll_out: rolled.setdefault(
                times, roll_out(batches)
            ),
        )
        trainer.model.train()
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert len(batch["input_ids"]) == 2 * 4 * times
    (once,), (thrice,) = rolled[1], rolled[3]
    assert [r.record for r in thrice] == [r.record for r in once for _ in range(3)]
    for i, first in enumerate(once):
        own = thrice[3 * i : 3 * i + 3]
        # Sampling goes on where it was, and the first pair is the one of a single rollout.
        assert {own[0].chosen.ids, own[0].rejected.ids} == {first.chosen.ids, first.rejected.ids}
        assert len({x.ids for r in own for x in (r.chosen, r.rejected)}) > 2


def test_each_step_says_how_long_its_phases_took(make: Make) -> None:
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    # Without a fused head, TRL computes the reference's log-probabilities within the update.
    phases = ("sampling", "judging", *(("reference",) if FUSED_HEAD else ()), "update")
    steps = [entry for entry in trainer.state.log_history if "time/update" in entry]
    assert len(steps) == 2
    for entry in steps:
        assert all(entry[f"time/{phase}"] > 0 for phase in phases)
        assert entry["time/waiting"] >= 0
        tokens = 8 * entry["completions/mean_length"]
        rate = entry["tokens_per_second/sampling"]
        assert rate == pytest.approx(tokens / entry["time/sampling"], rel=1e-3)
        assert rate > entry["tokens_per_second/step"] > 0


def test_one_rollout_serves_all_micro_batches_of_an_optimizer_step(
    make: Make, monkeypatch: Any
) -> None:
    trainer = make(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    sizes: list[int] = []
    roll_out = trainer._roll_out
    monkeypatch.setattr(
        trainer, "_roll_out", lambda batches: sizes.append(len(batches)) or roll_out(batches)
    )
    trainer.train()
    assert sizes == [4, 4]


def test_accumulation_and_batch_size_can_be_traded(make: Make, model: Any) -> None:
    losses, ends = [], []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make(
            model=copy.deepcopy(model),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        losses.append(history(trainer, "loss"))
        ends.append(weights(trainer.model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(losses[2], abs=1e-5)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[2][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_and_judge_do_not_change_while_the_policy_does(
    lora: bool, make: Make, model: Any, encoder: Any
) -> None:
    start = weights(model)
    trainer = make(peft_config=LoraConfig(**LORA) if lora else None, max_steps=3)
    from self_judge import Comparison

    pair = [Comparison("what is honest?", "the capital of France", "no")]
    with active_reference(trainer):
        before = trainer.judge.compare(pair)
    policy_before = weights(trainer.model)
    trainer.train()
    with active_reference(trainer):
        after = trainer.judge.compare(pair)
    assert before == after
    assert not same(policy_before, weights(trainer.model))
    if lora:
        base = {
            name.replace(".base_layer", "").removeprefix("base_model.model."): value
            for name, value in weights(trainer.model).items()
            if "lora_" not in name
        }
        assert same(base, start)
    else:
        assert same(weights(trainer.ref_model), start)
        assert not any(p.requires_grad for p in trainer.ref_model.parameters())


def test_a_merged_adapter_in_memory_is_its_own_reference(
    make: Make, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    adapted = get_peft_model(loaded, LoraConfig(**LORA, init_lora_weights=False))
    changed = merged(adapted)
    assert not same(weights(changed), weights(load_model(tmp_path / "base")))
    expected = weights(on_test_device(changed))
    trainer = make(model=changed)
    trainer.train()
    assert same(weights(trainer.ref_model), expected)


def test_a_model_that_cannot_learn_is_refused(make: Make, model: Any) -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires gradients"):
        make(model=model.requires_grad_(False))


def test_training_goes_on_from_an_adapter_against_a_frozen_copy_of_it(
    make: Make, model: Any
) -> None:
    adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    start = {n: v for n, v in weights(adapted).items() if "lora_" in n}
    trainer = make(model=adapted, max_steps=2)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()
    end = weights(trainer.model)
    assert all(torch.equal(end[n.replace(".default.", ".ref.")], v) for n, v in start.items())
    assert not all(torch.equal(end[n], v) for n, v in start.items())
    assert history(trainer, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_reproduces_the_losses_and_pairs_of_an_undisturbed_one(
    lora: bool, make: Make, model: Any, tmp_path: Path
) -> None:
    def build(name: str) -> SelfJudgeTrainer:
        return make(
            model=copy.deepcopy(model),
            peft_config=LoraConfig(**LORA, lora_dropout=0.1) if lora else None,
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
        )

    whole = build("whole")
    whole.train()
    resumed = build("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key in ("loss", "grad_norm"):
        assert history(resumed, key)[-2:] == history(whole, key)[-2:]
    for step in (3, 4):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert same(weights(whole.model), weights(resumed.model))


def test_gradient_checkpointing_changes_nothing(make: Make, model: Any) -> None:
    losses = []
    for checkpointing in (False, True):
        trainer = make(model=copy.deepcopy(model), gradient_checkpointing=checkpointing)
        trainer.train()
        losses.append(history(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_training_keeps_from_cudnn_even_where_a_backward_pass_computes_again(
    make: Make, model: Any, reentrant: bool
) -> None:
    trainer = make(
        max_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    seen: set[tuple[bool, bool]] = set()

    def watch(*_: Any) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        seen.add((in_backward, torch.backends.cuda.cudnn_sdp_enabled()))

    model.model.layers[0].self_attn.register_forward_pre_hook(watch)
    trainer.train()
    assert seen == {(False, False), (True, False)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_undecidable_pairs_keep_their_row_without_gradient(make: Make, monkeypatch: Any) -> None:
    trainer = make(max_steps=1)
    start = weights(trainer.model)
    nan = torch.full((2,), float("nan"))
    monkeypatch.setattr(
        trainer.judge, "letter_probabilities", lambda prompts, **_: nan.expand(len(prompts), 2)
    )
    trainer.train()
    assert history(trainer, "judge/undecidable") == [1.0]
    assert history(trainer, "grad_norm") == [0.0]
    assert same(start, weights(trainer.model))


def test_more_than_two_samples_give_the_best_and_the_worst(make: Make) -> None:
    trainer = make(num_generations=4, max_steps=1, per_device_train_batch_size=2)
    trainer.train()
    (path,) = (Path(trainer.args.output_dir) / "rollouts").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["chosen"] != line["rejected"] for line in lines)


def test_it_logs_what_a_person_watches(make: Make) -> None:
    trainer = make(max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    for key in (
        "judge/margin", "judge/order_agreement", "judge/undecidable", "judge/win_rate/helpful",
        "judge/win_rate/honest", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/finished", "rewards/margins", "time/sampling",
    ):  # fmt: skip
        assert key in logged, key
    assert 1 <= logged["completions/min_length"] <= logged["completions/max_length"] <= 6


def test_evaluation_compares_the_given_pairs(make: Make, queries: list[dict[str, Any]]) -> None:
    trainer = make(eval_dataset=Dataset.from_list(queries))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # policy equals reference
    again = trainer.evaluate(Dataset.from_list(queries[:3]))  # prepared on the way
    assert again["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "eval_rewards/margins" in metrics


def test_evaluation_data_without_a_pair_is_an_error_that_names_the_record(
    make: Make, queries: list[dict[str, Any]]
) -> None:
    rows = [{"prompt": q["prompt"]} for q in queries]
    trainer = make(eval_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"record 0 of the evaluation data has no 'chosen'"):
        trainer.evaluate()


def test_the_methods_own_way_of_calling_works(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        query = f"<|im_start|>user\nwhat is {i}?<|im_end|>\n<|im_start|>assistant\n"
        rows.append(
            {
                "query": query,
                "context": f"what is {i}?",
                "chosen": query + "Paris<|im_end|>",  # query + response
                "rejected": "no",  # the response alone
            }
        )
    data = Dataset.from_list(rows)
    training_args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", per_device_train_batch_size=2
    )
    self_judge_args: dict[str, Any] = {
        "judge_templates": TEMPLATES,
        "token_id_a": None,
        "token_id_b": None,
        "ref_model": None,
        "peft_config": LoraConfig(**LORA),
        "disable_dropout": True,
        "judge_batch_size": 4,
        "max_length": 200,
        "max_new_tokens": 5,
        "top_p": 0.8,
        "temperature": 1.3,
        "loss_type": "hinge",
        "beta": 0.2,
        "average_log_prob": False,
        "ignore_index": -100,
    }
    trainer = SelfJudgeTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=SelfJudgeCollator(),
        args=training_args,
        train_dataset=data,
        eval_dataset=data,
        **self_judge_args,
    )
    assert (trainer.args.top_p, trainer.args.temperature, trainer.beta) == (0.8, 1.3, 0.2)
    assert trainer.loss_types == ["hinge"]
    prepared = trainer.eval_dataset[0]
    assert tokenizer.decode(prepared["prompt_ids"]) == rows[0]["query"]
    assert tokenizer.decode(prepared["chosen_ids"]) == "Paris<|im_end|>"
    assert tokenizer.decode(prepared["rejected_ids"]) == "no<|im_end|>"
    assert prepared["context"] == "what is 0?"
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("bos", [True, False])
def test_rows_by_query_are_trained_from_the_ids_of_rows_by_prompt(
    bos: bool, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = wrap(byte_bpe(), None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    template = ("{{ bos_token }}" if bos else "") + CHATML
    asked = [[{"role": "user", "content": f"what is {i}?\n\n"}] for i in range(4)]
    queries = [
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        for messages in asked
    ]
    prepared = [
        make(
            encoder=ChatEncoder(tokenizer, template),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
        ).train_dataset["prompt_ids"]
        for rows in ([{"prompt": x} for x in asked], [{"query": x} for x in queries])
    ]
    assert list(prepared[0]) == list(prepared[1])
    assert all((ids[0] == tokenizer.bos_token_id) == bos for ids in prepared[1])
    assert "queries are not as" not in caplog.text
    plain = Dataset.from_list([{"query": x} for x in [*queries, "Q: what?\nA:"]])
    trainer = make(
        encoder=ChatEncoder(tokenizer, template), processing_class=tokenizer, train_dataset=plain
    )
    assert "1 of 5 queries do not have the format of the chat template" in caplog.text
    assert trainer.train_dataset.column_names == list(COLUMNS)


def test_a_model_by_name_brings_its_tokenizer_and_judge_templates(
    make: Make, model: Any, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = make(max_steps=1)
    first.train()
    first.save_model(str(tmp_path / "saved"))
    settings = load_judge_settings(tmp_path / "saved")
    assert settings is not None
    assert settings.templates.to_dict() == first.judge_templates.to_dict()
    second = SelfJudgeTrainer(
        model=str(tmp_path / "saved"),
        args=SelfJudgeConfig(
            str(tmp_path / "second"), max_steps=1, max_new_tokens=4, max_length=200,
            report_to="none", save_strategy="no", per_device_train_batch_size=2,
        ),
        train_dataset=Dataset.from_list(queries),
    )  # fmt: skip
    assert second.judge.letter_ids == first.judge.letter_ids
    second.train()


def test_long_dialogues_lose_their_oldest_exchanges_and_hopeless_prompts_are_left_out(
    make: Make, encoder: Any, caplog: Any
) -> None:
    dialogue = [
        {"role": "user", "content": "the capital " * 60},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "and you?"},
    ]
    hopeless = [{"role": "user", "content": "the capital " * 60}]
    trainer = make(
        train_dataset=Dataset.from_list([{"prompt": dialogue}, {"prompt": hopeless}]),
        max_length=100,
    )
    assert trainer.train_dataset["prompt_ids"][:] == [encoder.encode_prompt(dialogue[2:])]
    assert "1 of 2 prompts do not fit" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 300}, r"max_new_tokens \(300\) must be below max_length \(256\)"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"num_generations": None}, "num_generations must be at least 2, got None"),
        ({"top_k": None}, "top_k must be at least 0, got None"),
        ({"use_vllm": True, "vllm_max_model_length": 0}, r"vllm_max_model_length \(0\) must be"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"sync_ref_model": True}, "the judge is the frozen reference"),
        ({"precompute_ref_log_probs": True}, "responses are sampled during training"),
        ({"ignore_index": 0}, "ignore_index must be -100"),
        ({"judge_batch_size": 0}, "judge_batch_size must be at least 1"),
        ({"pair_selection": "first"}, "pair_selection must be one of"),
        (
            {"loss_type": "nonsense", "max_steps": 1},
            "loss_type nonsense: unknown; valid names are",
        ),
        ({"loss_type": "robust", "average_log_prob": True}, "sigmoid, hinge or ipo alone"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes).train()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "record 0 of the train dataset has neither 'query' nor 'prompt'"),
        ({"query": " "}, "'query' is empty"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "a message from 'assistant'"),
        ({"prompt": [{"content": "x"}]}, "without a role and content"),
    ],
)
def test_rows_that_cannot_be_used_are_errors_that_name_the_record(
    row: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        make(train_dataset=Dataset.from_list([row]))


def test_without_templates_anywhere_it_says_what_to_pass(make: Make) -> None:
    with pytest.raises(ValueError, match="pass judge_templates"):
        make(judge_templates=None)


def test_letters_given_wrongly_are_refused_with_both_readings(make: Make) -> None:
    with pytest.raises(ValueError, match=r"token_id_a=5 is \[5 .*but after the judge's lead-in"):
        make(token_id_a=5)


@pytest.mark.parametrize("kind", [None, "FSDP"])
def test_the_frozen_copy_is_made_where_the_model_is_trained(
    kind: str | None, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(type(model), "to", lambda self, device: events.append("placed") or self)

    def copied(given: Any) -> Any:
        events.append("copied")
        raise KeyboardInterrupt  # what comes after is not looked at

    monkeypatch.setattr("self_judge.training.identity.reference.frozen_reference", copied)
    if kind is not None:  # as the launcher says it; these place the weights themselves
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(KeyboardInterrupt):
        make(model=model)
    assert events == (["copied"] if kind else ["placed", "copied"])


def test_every_step_samples_a_prompt_anew(make: Make, queries: list[dict[str, Any]]) -> None:
    # The weights do not move, so only the step's own seed can change what is sampled.
    trainer = make(
        max_steps=3, learning_rate=0.0, per_device_train_batch_size=1,
        train_dataset=Dataset.from_list(queries[:1]),
    )  # fmt: skip
    trainer.train()
    files = sorted((Path(trainer.args.output_dir) / "rollouts").iterdir())
    pairs = [json.loads(file.read_text().splitlines()[0]) for file in files]
    assert len({frozenset((pair["chosen"], pair["rejected"])) for pair in pairs}) == 3


@pytest.mark.parametrize("disabled", [True, False])
@pytest.mark.parametrize("given", ["as an argument", "in the configuration"])
def test_dropout_is_disabled_as_asked_for(
    given: str, disabled: bool, tokenizer: Any, queries: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=512)
    asked: dict[str, Any] = {"disable_dropout": disabled}
    trainer = SelfJudgeTrainer(
        model=GPT2LMHeadModel(config),
        args=SelfJudgeConfig(str(tmp_path), **SMALL, **(asked if "in" in given.split() else {})),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(queries),
        judge_templates=TEMPLATES,
        **(asked if "an" in given.split() else {}),
    )
    for model in (trainer.model, trainer.ref_model):
        shares = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert shares == ({0} if disabled else {0.1})

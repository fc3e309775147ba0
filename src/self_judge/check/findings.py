"""Finds mistakes that do not stop a run at its start: in settings, templates, models and data.

Each function checks one aspect and yields findings. The code that raises an error at the start of a
run also reports that error. This module does not load data or print.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from self_judge.check.cost import Cost
from self_judge.check.memory import GIB
from self_judge.check.model_size import Size
from self_judge.config.schema import DatasetArgs, JSFTRun, SelfJudgeRun
from self_judge.config.self_training import SelfJudgeArgs
from self_judge.data.records import first_question
from self_judge.data.sources import PreferenceData
from self_judge.datatypes import Message
from self_judge.inference.decoding import why_not_shared
from self_judge.packing.packing import Packing
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.chat_template import common_length
from self_judge.prompting.judge_json import load_judge_settings
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.prompting.template_source import CLOCK
from self_judge.runtime import device_of, unwrapped
from self_judge.storage.atomic import LAST, latest_complete
from self_judge.training.jsft.examples import CUT, NO_FIT, NO_ROOM
from self_judge.training.setup import nothing_held_out, refuse_own_inputs

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        level: `problem` if the run would go wrong, `warning` if the user should check the finding,
            or `note` if the setting is correct but may be surprising.
        about: the key in the run file, or another subject.
        text: what was found, its effect and the remedy.
    """

    level: Level
    about: str
    text: str


problem = partial(Finding, "problem")
warning = partial(Finding, "warning")
note = partial(Finding, "note")


def chat_findings(encoder: ChatEncoder) -> Iterator[Finding]:
    """Checks that prompts match the training format and that the ends of answers are trained."""
    tokenizer = encoder.tokenizer
    user, answer = Message(role="user", content="a"), Message(role="assistant", content="b")
    for asked in ([user], [user, answer, user]):
        prompt = encoder.encode_prompt(asked)
        whole = encoder.encode_dialogue([*asked, answer]).ids
        if whole[: len(prompt)] != prompt:
            same = common_length(prompt, whole)
            shown = [tokenizer.convert_ids_to_tokens(x[same : same + 4]) for x in (prompt, whole)]
            yield problem(
                "chat template",
                "a prompt is not a prefix of the same prompt with its answer: at token "
                f"{same}, sampling has {shown[0]}, but training has {shown[1]}. Prompts would be "
                "in a format that the model was not trained on. Set templates.chat to a template "
                "that starts answers the same way in training and sampling",
            )
            break
    bos = tokenizer.bos_token_id
    # Only the start of a sequence is checked, because with some tokenizers every ChatML turn begins
    # with BOS.
    if bos is not None and encoder.encode_prompt([user])[:2] == [bos, bos]:
        yield problem(
            "chat template",
            f"a prompt begins with {tokenizer.bos_token!r} twice: change templates.chat to write "
            "it only once",
        )
    encoded = encoder.encode_dialogue([user, answer])
    trained = [i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m]
    if not encoder.stop_token_ids:
        yield problem(
            "tokenizer",
            "there is no stop token: the tokenizer has no end-of-sequence token, and the template "
            "does not close turns with a control token. Sampling would never stop before "
            "max_new_tokens. Set tokenizer.eos_token",
        )
    elif not trained or trained[-1] not in encoder.stop_token_ids:
        yield problem(
            "chat template",
            "the end of an answer is not trained: the template writes no control token after an "
            "answer, so the model does not learn to stop. Change templates.chat to close answers "
            f"with {tokenizer.eos_token!r}",
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield note(
            "tokenizer",
            f"the padding token is the end-of-sequence token ({tokenizer.pad_token!r}). This is "
            "harmless here: masks do not depend on the padding token, and the ends of answers are "
            "trained",
        )


def judge_findings(
    templates: JudgeTemplates, encoder: ChatEncoder, name: str, revision: str | None = None
) -> Iterator[Finding]:
    """Checks whether judge settings for self-training differ from the model's judge.json."""
    saved = load_judge_settings(name, revision)
    if saved is None:
        yield warning(
            "templates.judge",
            f"{name} has no judge.json: it is unknown whether this model was trained to judge "
            "with these templates. Start from a model that was trained with JSFT",
        )
        return
    for principle, asked in templates.items():
        taught = saved.templates.get(principle)
        if taught is None:
            yield problem(
                "templates.judge",
                f"the model was not trained on the principle {principle!r}, only on "
                f"{', '.join(saved.templates)} (see its judge.json)",
            )
            continue
        for part in ("system", "user", "assistant"):
            ours, theirs = getattr(asked, part) or "", getattr(taught, part) or ""
            if ours != theirs:
                same = common_length(ours, theirs)
                shown = slice(max(0, same - 12), same + 24)
                yield problem(
                    "templates.judge",
                    f"{principle}.{part} differs from the model's judge.json: {ours[shown]!r} "
                    f"here, {theirs[shown]!r} in judge.json. Leave templates.judge null "
                    "to use the model's templates",
                )
    left = [p for p in saved.templates if p not in templates]
    if left:
        yield warning(
            "templates.judge",
            f"the model was also trained on {', '.join(left)}, but these principles do not vote, "
            "because templates.judge does not contain them",
        )
    if saved.chat_template is not None and saved.chat_template != encoder.chat_template:
        yield problem(
            "templates.chat",
            "differs from the chat template that the model was trained with (see its judge.json). "
            "Leave this key unset to use that template",
        )
    # The encoder has all saved values, updated with the values from the run file.
    given = encoder.chat_template_kwargs if saved.chat_template_kwargs else {}
    for key, value in given.items():
        theirs = saved.chat_template_kwargs.get(key)
        if value != theirs and (theirs is not None or key != CLOCK):
            yield problem(
                f"templates.chat_template_kwargs.{key}",
                f"is {value!r}, but was {theirs!r} in the model's training (see its judge.json). "
                "Leave this key unset to use the value from training",
            )


def model_findings(
    size: Size, run: JSFTRun | SelfJudgeRun, max_length: int, longest: int
) -> Iterator[Finding]:
    """Checks the model's trainable parameters, context length and dtype.

    Args:
        max_length: the maximum number of tokens in a sequence.
        longest: the number of tokens in the longest sequence.
    """
    if not size.trainable:
        yield problem(
            "peft_config" if run.peft_config else "model",
            "no parameter is trained: remove inference_mode or set target_modules",
        )
    if size.context is not None and max_length > size.context:
        beyond = f", and the longest sequence has {longest}" if longest > size.context else ""
        yield (problem if beyond else warning)(
            "max_length",
            f"sequences may have {max_length} tokens, but the model's context length is "
            f"{size.context}{beyond}: lower max_length",
        )
    half = size.weight_bytes < 3 * size.parameters
    if run.peft_config is None and half and size.trainable == size.parameters:
        yield warning(
            "model.dtype",
            "full fine-tuning of half-precision weights loses small updates to rounding: "
            "set model.dtype to float32 (training_args.bf16 still computes in bfloat16)",
        )


def packing_findings(model: nn.Module, run: JSFTRun | SelfJudgeRun, args: Any) -> Iterator[Finding]:
    """Checks whether packing and prompt sharing are exact for the run's model.

    Args:
        model: a `shallow_model` with weights in the run's dtype and with the run's adapter.
        args: the training arguments for this machine.
    """
    jsft = isinstance(run, JSFTRun)
    choice = run.jsft_args.packing if isinstance(run, JSFTRun) else run.self_judge_args.packing
    about = "jsft_args.packing" if jsft else "self_judge_args.packing"
    inner: Any = unwrapped(model)
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    autocast = torch.autocast(device_of(inner).type, dtype, enabled=args.bf16 or args.fp16)
    if args.gradient_checkpointing:
        # Older versions of Transformers have only the old name.
        enable = getattr(inner, "activation_checkpointing_enable", None)
        (enable or inner.gradient_checkpointing_enable)()
    with autocast:
        # A judge needs no gradients, so it can use packing modes that an update cannot use.
        for what, gradients in (("judging", False), ("the update", True))[int(jsft) :]:
            try:
                decision = Packing(model, choice, gradients=gradients).decision
            except ValueError as error:
                yield problem(about, str(error))
                return
            if decision.route not in ("padding", "off"):
                yield note(about, f"{what} shares prefixes ({decision.route}): {decision.reason}")
            elif choice == "auto":
                yield warning(about, f"{what} does not share prefixes: {decision.reason}")
        if isinstance(run, SelfJudgeRun) and not run.self_judge_args.use_vllm:
            why = why_not_shared(model)
            if why is not None:
                text = "the run uses generate, which computes the prompt again for each response"
                yield warning("sampling", f"{text}: {why}")


def setting_findings(run: JSFTRun | SelfJudgeRun, args: Any) -> Iterator[Finding]:
    """Checks for settings that are accepted but have no effect or an unexpected effect."""
    for key, why in {
        "padding_free": "TRL ignores it here, and `packing` shares prefixes instead",
        "use_liger_kernel": "it is deprecated in TRL, and its loss bypasses packing",
    }.items():
        if run.training_args.get(key):
            yield warning(f"training_args.{key}", f"{why}: leave it out")
    if str(args.eval_strategy) not in ("no", "IntervalStrategy.NO") and not (
        run.dataset.eval or run.dataset.held_out
    ):
        yield warning(
            "training_args.eval_strategy",
            "there is no evaluation data: dataset.eval is empty and dataset.held_out is 0",
        )
    yield from _output_findings(Path(str(args.output_dir)), run, args.resume_from_checkpoint)
    if isinstance(run, SelfJudgeRun):
        own = run.self_judge_args
        losses = [own.loss_type] if isinstance(own.loss_type, str) else own.loss_type
        if "ipo" in losses and own.average_log_prob is None:
            yield note(
                "self_judge_args.average_log_prob",
                "TRL's ipo loss averages log-probabilities over tokens, but the original method "
                "sums them: set this key to false to sum them",
            )


def _output_findings(
    output: Path, run: JSFTRun | SelfJudgeRun, resume: str | None
) -> Iterator[Finding]:
    key, resume_key = "training_args.output_dir", "training_args.resume_from_checkpoint"
    try:
        refuse_own_inputs(run)
    except ValueError as error:
        yield problem(key, str(error))
        return
    if output.is_dir() and resume in LAST:
        found, passed_over = latest_complete(output)
        for line in passed_over:
            yield warning(resume_key, line)
        if found is not None:
            yield note(resume_key, f"the run resumes from {found}")
    elif output.is_dir() and not resume and get_last_checkpoint(str(output)):
        yield warning(
            key,
            f"{output} has checkpoints from another run, and this run would add to them: set "
            f"{resume_key}=true to resume that run, or use another folder",
        )


def data_findings(
    train: PreferenceData, held_out: PreferenceData | None, dataset: DatasetArgs
) -> Iterator[Finding]:
    """Checks for an empty share of held-out prompts, shared prompts, and many skipped records."""
    if held_out is None and dataset.held_out:
        yield warning("dataset.held_out", nothing_held_out(dataset, train))
    if held_out is not None:
        seen = {first_question(r) for r in train.records}
        shared = sum(first_question(r) in seen for r in held_out.records)
        if shared:
            yield warning(
                "dataset.eval",
                f"{shared:,} of {len(held_out.records):,} evaluation prompts begin with a "
                "question from the training data, so the evaluation is too optimistic",
            )
    for label, counts in train.counts_by_source.items():
        for noun in ("record", "pair"):
            skipped = sum(n for what, n in counts.items() if what.startswith(f"skipped {noun}"))
            there = skipped + counts.get(f"{noun}s", 0)
            if skipped > there / 10:
                yield warning(
                    "dataset.sources",
                    f"{label}: {skipped:,} of {there:,} {noun}s are skipped, for the reasons above",
                )


def example_findings(counts: dict[str, int], letters: dict[str, int]) -> Iterator[Finding]:
    """Checks for JSFT examples that are truncated or skipped, and for unbalanced letters.

    Args:
        counts: the counts from `jsft_dataset`.
        letters: the number of examples with each letter as the answer.
    """
    about = "jsft_args.max_length"
    for kind, end in (
        ("sft", "the end of the answer is not trained"),
        ("judge", "rationales are cut off"),
    ):
        kept = counts.get(f"{kind} examples", 0)
        for why in (NO_FIT, NO_ROOM):
            lost = counts.get(f"{kind} examples: {why}", 0)
            text = f"{kind} examples are left out ({why}): raise max_length"
            if kept:
                yield from _share(about, lost, kept + lost, text, least=0.01)
            else:
                yield from _share(about, lost, lost, text, level="problem")
        cut = counts.get(f"{kind} examples: {CUT}", 0)
        text = f"{kind} examples are truncated ({end}): raise max_length"
        yield from _share(about, cut, kept, text, least=0.01)
    if len(set(letters.values())) > 1:
        counted = ", ".join(f"{n:,} {letter}" for letter, n in letters.items())
        yield warning(
            about,
            f"the letters are unbalanced ({counted}): some pairs appear in only one order, so the "
            "judge would learn to prefer one letter",
        )
    if not any(letters.values()):
        yield problem(
            "dataset.sources",
            "there are no judge examples: the model would learn to answer, but not to judge",
        )


def prompt_findings(kept: int, shorter: int, of: int, own: SelfJudgeArgs) -> Iterator[Finding]:
    """Checks for prompts that leave no room for a response (self-training).

    Args:
        kept, shorter, of: the number of prompts that fit, the number of those that fit only without
            their oldest exchanges, and the total number of prompts.
    """
    about, advice = "self_judge_args.max_new_tokens", "raise max_length or lower max_new_tokens"
    room = f"max_length {own.max_length} - max_new_tokens {own.max_new_tokens} = "
    room += f"{own.max_length - own.max_new_tokens} tokens"
    text = f"prompts are longer than {room} and are left out: {advice}"
    yield from _share(about, of - kept, of, text, level="warning" if kept else "problem")
    text = f"prompts lose their oldest exchanges to fit into {room}: {advice}"
    yield from _share(about, shorter, of, text, least=0.01)


def judge_prompt_findings(
    no_fit: int, tight: int, of: int, new: int, limit: int
) -> Iterator[Finding]:
    """Checks for judge prompts that do not fit (self-training).

    Args:
        no_fit: the number of pairs in the data that do not fit in a judge prompt.
        tight: the number of other pairs that would not fit with two responses of `new` tokens.
        of: the number of pairs.
        limit: the maximum number of tokens in a judge prompt.
    """
    yield from _share(
        "self_judge_args.max_length", no_fit, of,
        "pairs in the data do not fit in a judge prompt, so they are undecidable: raise max_length",
    )  # fmt: skip
    yield from _share(
        "self_judge_args.max_new_tokens", tight, of,
        f"prompts leave no room in a judge prompt for two responses of {new} tokens within "
        f"max_length {limit}. If responses are that long, the judge does not see the whole context "
        "or cannot decide: raise max_length or lower max_new_tokens", least=0.05,
    )  # fmt: skip


def memory_findings(cost: Cost) -> Iterator[Finding]:
    """Checks whether the run fits in memory. The estimate may be off by up to a quarter."""
    memory, there = cost.memory, cost.device_memory
    if memory.peak > 0.9 * there > 0:
        advice = {
            "update": "lower per_device_train_batch_size, turn on gradient_checkpointing, "
            "use LoRA, or shard the model (--sharding)",
            "sampling": "lower generation_batch_size or max_new_tokens",
            "judging": "lower max_length, or if packing is off, lower judge_batch_size",
        }[memory.largest_phase]
        yield (problem if memory.peak > 1.25 * there else warning)(
            "memory",
            f"each process needs about {memory.peak / GIB:.0f} GiB, but {cost.device} has "
            f"{there / GIB:.0f} GiB. Memory peaks in the {memory.largest_phase} phase: {advice}",
        )


def engine_findings(own: SelfJudgeArgs, cost: Cost, bf16: bool) -> Iterator[Finding]:
    """Checks whether a colocated vLLM engine fits on the GPU alongside training.

    Args:
        bf16: whether the engine stores two bytes per weight.
    """
    if not own.use_vllm or own.vllm_mode != "colocate":
        return
    total, memory, size = cost.device_memory, cost.memory, cost.size
    taken = own.vllm_gpu_memory_utilization * total
    weights = 2 * size.parameters if bf16 else size.weight_bytes
    # The engine starts before gradients and optimizer states are allocated.
    at_start = memory.weights + memory.reference + memory.resident
    asleep = own.vllm_enable_sleep_mode
    beside = max(at_start, memory.held + (0 if asleep else memory.phases["update"]))
    level: Level = "note"
    text = (
        f"the engine takes {taken / GIB:.1f} of the GPU's {total / GIB:.0f} GiB and cannot start "
        f"if less is free. Training uses about {at_start / GIB:.1f} GiB before the engine starts "
        f"and at most {beside / GIB:.1f} GiB while the engine holds its memory"
    )
    if weights > taken:
        level = "problem"
        text += f". The engine's copy of the weights alone needs {weights / GIB:.1f} GiB: raise it"
    elif at_start + taken > total:
        level, text = "problem", f"{text}: lower it"
    elif beside + taken > total:
        level = "warning"
        text += ": lower it" + ("" if asleep else ", or set vllm_enable_sleep_mode")
    yield Finding(level, "vllm_gpu_memory_utilization", text)
    yield note(
        "use_vllm",
        "the estimate does not include the engine's startup. Compiling kernels and capturing CUDA "
        "graphs take minutes and need memory beyond the engine's share",
    )


def _share(
    about: str, count: int, of: int, text: str, least: float = 0.0, level: Level = "warning"
) -> Iterator[Finding]:
    """Yields a finding if `count / of` is larger than `least`."""
    if of and count > least * of:
        share = f"{count:,} of {of:,} ({100 * count / of:.0f}%)"
        yield Finding(level, about, f"{share} {text}")

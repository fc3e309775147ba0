"""SelfJudgeTrainer: TRL's DPOTrainer whose batches are the policy's own judged responses.

It replaces where the batch comes from, and nothing else: losses, metrics, PEFT, distributed
preparation and checkpoints are inherited. Its forward passes share prefixes
(`packing/fused_head.py`) and give the same numbers in the same places. How pairs are sampled and
judged: `rollouts.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from self_judge.console import neutral
from self_judge.datatypes import Comparison, Response, stable_seed
from self_judge.inference.letter_scoring import TransformersScorer
from self_judge.inference.lockstep import LockstepPacking, check_processes, most_of
from self_judge.inference.sampling import Sampler, TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.models import (
    clamp_to_context,
    frozen_reference,
    keep_freed_memory,
    load_tokenizer,
    refuse_pickle,
    unwrapped,
)
from self_judge.packing.fused_head import BEFORE_FUSED_HEAD, pack_fused_head
from self_judge.packing.packing import Packing, needs_one_pass
from self_judge.packing.pass_size import settled_tokens
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import (
    encoder_as_taught,
    resolve_judge,
    save_judge_settings,
)
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.storage.run_dir import rollout_file, thin_rollouts
from self_judge.training.callbacks import RunLog, StepClock, kl_estimate
from self_judge.training.checkpointing import ResumableTraining
from self_judge.training.lora_layers import lighten
from self_judge.training.oom_retry import UpdateInParts
from self_judge.training.self_training.config import (
    SelfJudgeConfig,
    as_self_judge_config,
    with_values,
)
from self_judge.training.self_training.logprob_units import LogProbUnits
from self_judge.training.self_training.prompts import (
    COLUMNS,
    PromptPreparer,
    SelfJudgeCollator,
    fits,
)
from self_judge.training.self_training.rollouts import (
    BatchesAhead,
    Rollout,
    SamplesAhead,
    judged_rollouts,
    preference_batch,
    rollout_metrics,
    rollout_totals,
    write_rollouts,
)
from self_judge.training.self_training.vllm_sync import VLLMRollouts

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SelfJudgeTrainer(ResumableTraining, UpdateInParts, DPOTrainer):
    """On-policy self-training: sample, judge with the frozen initial model, update by DPO.

    Takes what `DPOTrainer` takes, and the method's own arguments (which win over `args`):

    Args:
        model: a name or folder, a model, or a `PeftModel` with the adapter to go on training.
        args: a `SelfJudgeConfig`, or a plain `TrainingArguments`.
        processing_class, tokenizer: the tokenizer, under either name.
        train_dataset: rows with `query` (text from which the model continues) and `context` (what
            the judge is shown; default: the query), or with a conversational `prompt`.
        eval_dataset: the same with `chosen` and `rejected`: the response alone, or query +
            response, or messages.
        judge_templates: `{principle: {system, user, assistant}}`; default: the `judge.json` that
            JSFT saved beside the model.
        token_id_a, token_id_b: checked against the ids derived from the tokenizer, if given.
        ref_model: the judge and reference; default: a frozen copy of the model as given, or the
            model with its new adapter off.
        encoder: a `ChatEncoder`, for a chat template other than the tokenizer's or the saved one.

    Raises:
        ValueError: settings, templates or data that cannot work; the message says which and why.
    """

    args: SelfJudgeConfig
    model: Any

    _tag_names = ["trl", "dpo", "self-judge"]  # noqa: RUF012  TRL declares it so
    _name = "SELF-JUDGE"
    _paper = {  # noqa: RUF012
        "title": "Aligning Large Language Models by On-Policy Self-Judgment",
        "id": "2402.11253",
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: SelfJudgeConfig | TrainingArguments | None = None,
        data_collator: SelfJudgeCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoder: ChatEncoder | None = None,
        judge_templates: JudgeTemplates | Mapping[str, Any] | None = None,
        token_id_a: int | None = None,
        token_id_b: int | None = None,
        peft_config: PeftConfig | None = None,
        disable_dropout: bool | None = None,
        judge_batch_size: int | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        num_generations: int | None = None,
        loss_type: str | list[str] | None = None,
        beta: float | None = None,
        average_log_prob: bool | None = None,
        ignore_index: int | None = None,
        **trainer_arguments: Any,
    ) -> None:
        if processing_class is not None and tokenizer is not None:
            raise ValueError("tokenizer and processing_class are two names of one argument")
        name = model if isinstance(model, str) else str(model.config.name_or_path)
        config = as_self_judge_config(args, name)
        given = {
            "disable_dropout": disable_dropout,
            "judge_batch_size": judge_batch_size,
            "max_length": max_length,
            "max_new_tokens": max_new_tokens,
            "top_p": top_p,
            "temperature": temperature,
            "num_generations": num_generations,
            "loss_type": [loss_type] if isinstance(loss_type, str) else loss_type,
            "beta": beta,
            "average_log_prob": average_log_prob,
            "ignore_index": ignore_index,
        }
        config = with_values(
            config, {key: value for key, value in given.items() if value is not None}
        )
        code = bool(getattr(config, "trust_remote_code", False))
        if isinstance(model, str):
            refuse_pickle(model)
            loading = {"use_safetensors": True, **(config.model_init_kwargs or {})}  # type: ignore[dict-item]
            config = with_values(config, {"model_init_kwargs": loading})
            about = AutoConfig.from_pretrained(
                model, trust_remote_code=code, revision=loading.get("revision") or "main"
            )
        else:
            about = model.config
        length = clamp_to_context(about, config.max_length)
        config = with_values(config, {"max_length": length})
        processing_class = (
            processing_class or tokenizer or load_tokenizer(name, trust_remote_code=code)
        )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token

        settings = resolve_judge(
            name,
            judge_templates,
            token_id_a,
            token_id_b,
            remedy="pass judge_templates, or start from a model that JSFT wrote",
        )
        self.judge_templates = settings.templates
        # All that the dataset's preparation needs must stand before TRL's constructor runs it.
        self.encoder = encoder or encoder_as_taught(processing_class, settings)
        letters = self.encoder.letter_ids(
            settings.templates, settings.token_id_a, settings.token_id_b
        )
        in_memory = not isinstance(model, (str, PeftModel))
        if ref_model is None and peft_config is None and in_memory:
            if is_deepspeed_zero3_enabled():
                # Sharded parameters cannot be copied: TRL loads the reference by the model's name.
                if not name:
                    raise ValueError(
                        "under ZeRO-3 the judge is loaded by the model's name, and this model has "
                        "none: pass a ref_model, or the folder of the model"
                    )
                logger.warning("ZeRO-3: the judge is loaded from %s, not copied from memory", name)
            else:
                _place(model, config)
                ref_model = frozen_reference(model)  # type: ignore[type-var, assignment]
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=config,
            data_collator=data_collator or SelfJudgeCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **trainer_arguments,
        )
        check_processes(self.accelerator)
        lighten(self.model)
        keep_freed_memory(self.accelerator.device)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "no parameter of the model takes gradients (PEFT leaves a merged model frozen): "
                "call model.requires_grad_(True), or pass a peft_config"
            )
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)
        self.output_dir = str(config.output_dir)
        self.max_skipped_steps = config.max_skipped_steps
        self.on_saved = self._save_judge_settings
        tokens = None
        if config.packing != "off":
            tokens = settled_tokens(unwrapped(self.model), self.output_dir)
        one_pass = needs_one_pass(self.accelerator.distributed_type)
        self.vllm = self._vllm_rollouts() if config.use_vllm else None
        here = self.ref_model if self.ref_model is not None else self.model
        self.judge = Judge(
            self.vllm.scorer() if self.vllm is not None and self.vllm.judges else here,
            self.encoder,
            self.judge_templates,
            token_id_a=letters[0],
            token_id_b=letters[1],
            batch_size=config.judge_batch_size,
            max_length=config.max_length,
            packing=config.packing,
            batch_tokens=tokens,
        )
        self.packing: Packing | None = None
        for own in (self.ref_model, self.model):
            if own is not None:
                self.packing = pack_fused_head(
                    own, config.packing, one_pass=one_pass, batch_tokens=tokens
                )
        self.most = most_of(self.accelerator)
        scorer = self.judge.scorer
        self._lockstep: LockstepPacking | None = None
        if self.most is not int and isinstance(scorer, TransformersScorer):
            self._lockstep = LockstepPacking(
                scorer.model,
                config.packing,
                batch_rows=config.judge_batch_size,
                most=self.most,
                batch_tokens=tokens,
            )
            scorer.packing = self._lockstep
        self.clock = StepClock(self.accelerator, self._metrics["train"])
        self.add_callback(self.clock)
        self._batches_ahead, self._samples_ahead = BatchesAhead(), SamplesAhead()
        self._next_batches: list[Any] = []
        self._step_batches: list[Any] = []
        self._step_inputs: list[dict[str, torch.Tensor]] | None = None
        self._sampled_tokens = 0
        self._shown: list[Rollout] = []
        self._log_prob_hooks = LogProbUnits.attach(self)
        self.run_log = RunLog("self_judge", {"judge_templates": dict(self.judge_templates)})
        self.add_callback(self.run_log)

    # -- data ------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Adds the ids of each prompt and the judge's context; leaves a prepared dataset alone."""
        if {"record", "prompt_ids", "context"} <= set(next(iter(dataset))):
            return dataset
        prepare = PromptPreparer(
            self.encoder,
            args.max_length,
            args.max_new_tokens,
            dataset_name,
            with_responses=dataset_name != "train",  # the name under which TRL prepares it
        )
        with PartialState().main_process_first():
            if isinstance(dataset, IterableDataset):
                return dataset.map(
                    prepare, with_indices=True, remove_columns=dataset.column_names
                ).filter(fits)
            described = {"num_proc": args.dataset_num_proc}
            prepared = dataset.map(
                prepare,
                with_indices=True,
                remove_columns=dataset.column_names,
                desc=f"Encoding {dataset_name} prompts",
                **described,
            )
            kept = prepared.filter(fits, **described)
        dropped = len(prepared) - len(kept)
        if not len(kept):
            raise ValueError(
                f"no prompt of the {dataset_name} dataset fits: max_length {args.max_length} less "
                f"max_new_tokens {args.max_new_tokens} leaves too few tokens"
            )
        if dropped:
            logger.warning(
                "%s dataset: %d of %d prompts do not fit into max_length - max_new_tokens and are "
                "left out",
                dataset_name,
                dropped,
                len(prepared),
            )
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(COLUMNS)  # type: ignore[assignment]

    # -- the step --------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Remembers all micro-batches of the coming optimizer step.

        They are rolled out at the first of them (in `_prepare_inputs`), not here: resuming from a
        checkpoint restores the random state only after this prefetch.
        """
        if self.args.rollouts_ahead:
            source, number = args[0], args[1]
            now, self._next_batches = self._batches_ahead.take(source, number)
            args = (iter(now), *args[1:])
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._step_inputs = batches, None
        return batches, count

    def _prepare_inputs(self, inputs: Any) -> Any:
        if "input_ids" in inputs:
            return inputs  # prepared already
        if not self.model.training:
            return super()._prepare_inputs(self._evaluation_batch(inputs))
        place = next((i for i, b in enumerate(self._step_batches) if b is inputs), None)
        if place is None:  # called from outside the training loop
            self._step_batches, self._step_inputs, place = [inputs], None, 0
        if self._step_inputs is None:
            self._step_inputs = self._rolled_out(self._step_batches)
        return super()._prepare_inputs(dict(self._step_inputs[place]))

    def _rolled_out(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """TRL's batch for each micro-batch of the step, with the reference's log-probabilities."""
        with self.vllm.awake() if self.vllm is not None else nullcontext():
            rollouts = self._roll_out(batches)
        inputs = [self._preference_batch(own) for own in rollouts]
        if not BEFORE_FUSED_HEAD and self._log_prob_hooks is None:
            with self.clock.phase("reference"):
                self._add_reference(rollouts, inputs)
        self.clock.rolled_out(self._sampled_tokens)
        self._record([r for own in rollouts for r in own])
        return inputs

    def _preference_batch(self, rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
        return preference_batch(
            [(r.prompt_ids, r.chosen.ids, r.rejected.ids, r.decided) for r in rollouts],
            self._tokenizer.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,  # type: ignore[arg-type]
        )

    def _add_reference(
        self, rollouts: Sequence[Sequence[Rollout]], inputs: Sequence[dict[str, torch.Tensor]]
    ) -> None:
        """Puts the reference's log-probabilities into the batches, where TRL's loss looks for them.

        Packing lays out what it is given in passes of its own size, so it gets the whole step at
        once. Without it a micro-batch is a pass, and so it is for a model that processes share.
        """
        together = self.packing is not None and not self.packing.shape.one_pass
        asked = [self._preference_batch([r for own in rollouts for r in own])]
        reference = self.ref_model if self.ref_model is not None else self.model
        found = [
            self.compute_ref_log_probs(reference, super(SelfJudgeTrainer, self)._prepare_inputs(b))
            for b in (asked if together else inputs)
        ]
        chosen, rejected = (torch.cat(side).cpu() for side in zip(*found, strict=True))
        sizes = [len(own) for own in rollouts]
        for batch, c, r in zip(inputs, chosen.split(sizes), rejected.split(sizes), strict=True):
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = c, r

    def _evaluation_batch(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        for side in ("chosen", "rejected"):
            missing = next((i for i, ids in enumerate(inputs[f"{side}_ids"]) if not ids), None)
            if missing is not None:
                raise ValueError(
                    f"record {int(inputs['record'][missing])} of the evaluation data has no "
                    f"{side!r} response: evaluation compares given pairs"
                )
        columns = (inputs["prompt_ids"], inputs["chosen_ids"], inputs["rejected_ids"])
        return preference_batch(
            [(p, c, r, True) for p, c, r in zip(*columns, strict=True)],
            self._tokenizer.pad_token_id,
            max_length=self.args.max_length,
            pad_to_multiple_of=self.args.pad_to_multiple_of,  # type: ignore[arg-type]
        )

    def _roll_out(self, batches: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        """Samples and judges all prompts of the step at once; one list per micro-batch."""
        records = [int(r) for batch in batches for r in batch["record"]]
        contexts = [context for batch in batches for context in batch["context"]]
        prompts, _, seeds = asked = self._asked(batches, self.state.global_step)
        times, k = self.args.rollouts_per_update, self.args.num_generations
        with self.clock.phase("sampling"):
            ahead = self._samples_ahead.take(batches)
            responses = self._sampled(*asked) if ahead is None else ahead
        self._metrics["train"]["rollouts/steps_behind"].append(float(ahead is not None))
        self._sampled_tokens = sum(len(r.ids) for own in responses for r in own)
        # Every rollout of a prompt has samples and lots of its own.
        each = [(i, t) for i in range(len(prompts)) for t in range(times)]
        # The matches of a tournament have contexts and responses in common, a single one has not.
        rounds = self.judge.remembering() if k > 2 else nullcontext()
        with self.clock.phase("judging"), self._reference(), rounds:
            if self._lockstep is not None:
                self._lockstep.decision  # noqa: B018  trying it is for all processes at once
            rollouts = judged_rollouts(
                self.judge.compare,
                [records[i] for i, _ in each],
                [prompts[i] for i, _ in each],
                [contexts[i] for i, _ in each],
                [responses[i][t * k : (t + 1) * k] for i, t in each],
                [stable_seed(seeds[i], "again", t) if t else seeds[i] for i, t in each],
                self.args.pair_selection,
            )
            if self._lockstep is not None:
                self._lockstep.finish()
        self._begin_next()
        own = iter(rollouts)
        return [[next(own) for _ in range(times * len(b["record"]))] for b in batches]

    def _asked(
        self, batches: Sequence[dict[str, Any]], step: int
    ) -> tuple[list[list[int]], int, list[int]]:
        """The prompts of a step, how many responses each gets, and their seeds."""
        prompts = [ids for batch in batches for ids in batch["prompt_ids"]]
        # A record's samples depend on the seed, the step and the record alone: not on the batch it
        # is in, the number of processes or a resume in between.
        records = [int(r) for batch in batches for r in batch["record"]]
        seeds = [stable_seed(self.args.seed, step, r) for r in records]
        return prompts, self.args.rollouts_per_update * self.args.num_generations, seeds

    def _sampled(
        self, prompts: Sequence[Sequence[int]], n: int, seeds: Sequence[int]
    ) -> list[list[Response]]:
        with self._sampler() as sampler:
            responses = sampler.sample(prompts, n, seeds)
            if isinstance(sampler, TransformersSampler):  # less, if memory was full
                self.args.generation_batch_size = sampler.batch_size
        return responses

    def _begin_next(self) -> None:
        """Has servers sample for the next step while this one updates, if asked to."""
        batches, last = self._next_batches, self.state.global_step + 1 >= self.state.max_steps
        if not self.args.rollouts_ahead or self.vllm is None or last:
            return
        with self.clock.phase("sampling"):
            # No process may still sample from the policy that is replaced.
            self.accelerator.wait_for_everyone()
            sampler = self.vllm.sampler(self._reference())
        if not batches:  # an epoch ends
            return
        asked = self._asked(batches, self.state.global_step + 1)
        self._samples_ahead.start(batches, lambda: sampler.sample(*asked))

    @contextmanager
    def _sampler(self) -> Iterator[Sampler]:
        """What samples from the policy as it is at this step."""
        if self.vllm is not None:
            yield self.vllm.sampler(self._reference())
            return
        with self._policy() as policy:
            yield TransformersSampler(
                policy,
                self.encoder,
                self.args.sampling(),
                self.args.generation_batch_size,
                batch_tokens=self.args.generation_batch_tokens,
                most=self.most,
            )

    def _vllm_rollouts(self) -> VLLMRollouts:
        principle = self.judge_templates.principles[0]
        asked = Comparison("Where does the otter live?", "In the river.", "In the sky.")
        orders = self.encoder.encode_orders(self.judge_templates, principle, asked, None)
        assert orders is not None  # without a limit every prompt fits
        return VLLMRollouts(
            self.model,
            self.args,
            self.accelerator,
            self.encoder,
            probe=orders[0],
            separate_judge=self.ref_model is not None,
        )

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        # Generating in training mode under gradient checkpointing would silently drop the cache.
        checkpointing: dict[str, Any] = {}
        if not BEFORE_FUSED_HEAD:  # the TRL before takes no such argument
            checkpointing["gradient_checkpointing_kwargs"] = self.args.gradient_checkpointing_kwargs
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=True, **checkpointing
        ) as policy:
            yield policy

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """Puts the judge's weights in force: TRL's own rule for the reference of a `PeftModel`."""
        if self.ref_model is not None:
            yield
            return
        unwrapped = self.accelerator.unwrap_model(self.model)
        with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
            yield

    # -- what people see -------------------------------------------------------------------------

    def _record(self, rollouts: list[Rollout]) -> None:
        totals = rollout_totals(rollouts, self.judge_templates.principles)
        lengths = [float(len(x.ids)) for r in rollouts for x in (r.chosen, r.rejected)]
        device = self.accelerator.device
        summed = self.accelerator.reduce(
            torch.tensor(list(totals.values()), device=device, dtype=torch.float32), "sum"
        )
        extremes = self.accelerator.gather(
            torch.tensor([[min(lengths), max(lengths)]], device=device)
        )
        over_all = dict(zip(totals, summed.tolist(), strict=True))
        self.nothing_judged = over_all["broken"] == over_all["pairs"]
        metrics = rollout_metrics(over_all)
        metrics["completions/min_length"] = extremes[:, 0].min().item()
        metrics["completions/max_length"] = extremes[:, 1].max().item()
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)
        self._shown = rollouts
        if self.args.save_rollouts and self.accelerator.is_main_process:
            step = self.state.global_step + 1
            folder = Path(self.output_dir)
            write_rollouts(
                rollout_file(folder, step),
                rollouts[: self.args.rollout_pairs],
                step,
                self.judge_templates.principles,
                self._tokenizer.decode,
            )
            thin_rollouts(folder, step, self.args.rollout_files)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.log_completions and self._shown and self.model.training:
            if self.accelerator.is_main_process:
                Console().print(_pairs_table(self._shown[:4], self.state.global_step))
            self._shown = []
        # Averaged or reweighted log-probabilities are none of a response.
        if self.model.training and self.args.ld_alpha is None and not self._averages():
            own = self._metrics["train"]
            kl = kl_estimate(
                own.get("rewards/chosen", ()),
                own.get("rewards/rejected", ()),
                own.get("judge/undecidable", ()),
                self.beta,
            )
            if kl is not None:
                own["objective/kl"].append(kl)
        super().log(logs, start_time)

    def _averages(self) -> bool:
        return self._log_prob_hooks is not None and self._log_prob_hooks.average

    def _send_telemetry(self) -> None:
        """Sends nothing: TRL would tell its authors what kind of model and machine this is."""

    def _save_judge_settings(self, folder: Path) -> None:
        save_judge_settings(folder, self.encoder, self.judge_templates, self.judge.letter_ids)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        # In the rollout phase the reference was asked already; evaluation asks it here.
        self.precompute_ref_logps = "ref_chosen_logps" in inputs
        try:
            result = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = False
        if self._log_prob_hooks is not None:
            self._log_prob_hooks.correct_metrics(self)
        return result


def _place(model: Any, config: SelfJudgeConfig) -> None:
    """Moves a model to where it is trained, so that its copy is made there and not in host memory.

    Sharded models are placed by FSDP and DeepSpeed, others by their device map or in 4 bits.
    """
    asked = (os.environ.get(f"ACCELERATE_USE_{kind}", "") for kind in ("FSDP", "DEEPSPEED"))
    sharded = config.fsdp or config.deepspeed or any(a.lower() in ("1", "true") for a in asked)
    placed = sharded or any(
        getattr(model, name, None) for name in ("hf_device_map", "quantization_method")
    )
    if config.place_model_on_device is not False and not placed:
        model.to(config.device)


def _pairs_table(rollouts: Sequence[Rollout], step: int) -> Table:
    table = Table(title=f"sampled pairs at step {step}", show_lines=True)
    for heading in ("context", "chosen", "rejected"):
        table.add_column(heading, ratio=1, overflow="fold")
    table.add_column("margin", justify="right", no_wrap=True)
    for r in rollouts:
        margin = f"{r.verdict.margin:+.3f}" if r.decided and r.verdict else "undecidable"
        shown = (r.context[-400:], r.chosen.text[:400], r.rejected.text[:400])
        # Text, not markup: brackets in a response are just brackets.
        table.add_row(*(Text(neutral(s)) for s in shown), margin)
    return table

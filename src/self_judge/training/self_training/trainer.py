"""SelfJudgeTrainer is TRL's DPOTrainer with batches of the policy's own judged responses.

It replaces only the source of the batches. Losses, metrics, PEFT, distributed preparation and
checkpoints are inherited. Its forward passes compute shared prefixes once and return the same
results (`packing/fused_head.py`). `rollouts.py` samples and judges the pairs.
"""

# One optimizer step with gradient_accumulation_steps 2. TRL's own methods are in brackets:
#
#   get_batch_samples           prompts of micro-batches 0 and 1, numbered
#   [training_step] 0
#     _prepare_inputs           first call in the step: samples and judges for both,
#       _rolled_out             then computes the reference's log-probabilities of all pairs
#     [_compute_loss]           TRL's DPO loss on micro-batch 0
#   [training_step] 1
#     _prepare_inputs           returns the second batch, which was prepared above
#     [_compute_loss]
#   [optimizer step]

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import DPOTrainer

from self_judge.errors import require_type
from self_judge.inference.letter_scoring import LetterScorer
from self_judge.inference.lockstep import check_processes, max_over_ranks
from self_judge.judging.judge import Judge
from self_judge.judging.panel import InitialModel, Panel
from self_judge.models import load_tokenizer
from self_judge.packing.fused_head import FUSED_HEAD, pack_fused_head
from self_judge.packing.packing import Packing, needs_one_pass
from self_judge.packing.pass_size import pinned_tokens_per_pass
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_json import encoder_as_taught, has_judge_settings
from self_judge.prompting.judge_templates import JudgeTemplates
from self_judge.runtime import keep_freed_memory, unwrapped
from self_judge.storage.run_dir import ROLLOUTS
from self_judge.training.arguments import (
    check_has_rows,
    check_names,
    check_tokenizer,
    model_or_name,
    name_of,
)
from self_judge.training.callbacks import RunLog, StepClock
from self_judge.training.fault_tolerance import FaultToleranceMixin
from self_judge.training.identity.reference import (
    ReferenceCheck,
    active_reference,
    given_logits,
    load_by_name,
    reference_in_memory,
    reference_logits,
    start_logits,
)
from self_judge.training.lora_layers import lighten
from self_judge.training.oom_retry import MICRO_BATCH, OOMRetryMixin
from self_judge.training.self_training.config import (
    SelfJudgeConfig,
    as_self_judge_config,
    for_model,
    hub_options,
    with_values,
)
from self_judge.training.self_training.judges import (
    check_judge_type,
    check_same_judge,
    judge_in_training,
    judged_by,
    needs_initial,
    own_settings,
    save_judge,
)
from self_judge.training.self_training.logprob_averaging import LogProbAveraging
from self_judge.training.self_training.policy import policy_sampler
from self_judge.training.self_training.prompts import COLUMNS, SelfJudgeCollator, prepare_dataset
from self_judge.training.self_training.rollout_log import (
    add_kl_estimate,
    keep_rollouts,
    metrics_over_processes,
    show_pairs,
)
from self_judge.training.self_training.rollouts import (
    Rollout,
    RolloutPipeline,
    evaluation_batch,
    preference_batch,
)
from self_judge.training.self_training.vllm_sync import VLLMSync, probe_prompt

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class SelfJudgeTrainer(FaultToleranceMixin, OOMRetryMixin, DPOTrainer):
    """Samples responses, judges them with the frozen initial model, and trains with DPO.

    It accepts the arguments of `DPOTrainer` and the method's settings, which override `args`.

    Args:
        model: a model ID on the Hub, a folder, a model, or a `PeftModel` whose adapter is trained
            further.
        args: a `SelfJudgeConfig` or a plain `TrainingArguments`.
        processing_class, tokenizer: the tokenizer; pass only one of them.
        train_dataset: rows with `query` (the text that the model continues) and `context` (the
            judge's context; default: the query), or with a conversational `prompt`.
        eval_dataset: like `train_dataset`, with `chosen` and `rejected`, each given as the response
            alone, as query + response, or as messages.
        judge_templates: `{principle: {system, user, assistant}}`; default: the `judge.json` that
            JSFT saved with the model.
        token_id_a, token_id_b: expected letter ids, which are compared with the tokenizer's ids.
        judge: who judges; default: the frozen initial model. The reference stays the same.
        ref_model: the reference, and the judge if `judge` is unset; default: a frozen copy of the
            given model, or the model with its new adapter disabled.
        encoder: a `ChatEncoder`, for a chat template other than the tokenizer's or the saved one.

    Raises:
        ValueError: settings, templates or data are invalid. The message gives the reason.
    """

    args: SelfJudgeConfig
    model: Any

    _tag_names = ["trl", "dpo", "self-judge"]  # noqa: RUF012  as TRL declares it
    _name = "on-policy self-training (SELF-JUDGE)"

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
        judge: Judge | Panel | InitialModel | LetterScorer | None = None,
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
            raise ValueError("pass either tokenizer or processing_class, not both")
        check_names(type(self).__name__, DPOTrainer, SelfJudgeConfig, trainer_arguments)
        model = model_or_name("model", model)
        check_judge_type(judge)
        if ref_model is not None:
            ref_model = model_or_name("ref_model", ref_model)
        name, judge_name = name_of(model), name_of(model if ref_model is None else ref_model)
        config = with_values(
            as_self_judge_config(args, name),
            disable_dropout=disable_dropout,
            judge_batch_size=judge_batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            temperature=temperature,
            num_generations=num_generations,
            loss_type=[loss_type] if isinstance(loss_type, str) else loss_type,
            beta=beta,
            average_log_prob=average_log_prob,
            ignore_index=ignore_index,
        )
        hub = hub_options(config)
        quantized = trainer_arguments.get("quantization_config")
        if isinstance(ref_model, str):
            ref_model = load_by_name(ref_model, config, quantized, merge=True)
        if isinstance(model, str):
            model = load_by_name(model, config, quantized, merge=peft_config is not None)
            config.model_init_kwargs = None  # TRL would warn that it ignores them
            trainer_arguments.pop("quantization_config", None)
        config = for_model(config, model)
        processing_class = processing_class or tokenizer or load_tokenizer(name, **hub)
        check_tokenizer(processing_class)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        taught = judge_name if has_judge_settings(judge_name) else name
        settings = own_settings(
            judge, taught, judge_templates, token_id_a, token_id_b, hub["revision"]
        )
        self.judge_templates = settings.templates if settings else None
        self.given_judge = judge
        # TRL's constructor prepares the dataset, which needs these attributes.
        self.encoder = ChatEncoder.of(encoder or encoder_as_taught(processing_class, settings))
        # The letters of the initial model as a judge, if it has templates
        self.letters = settings and self.encoder.letter_ids(
            settings.templates, settings.token_id_a, settings.token_id_b
        )
        given = given_logits(model, ref_model, config)
        self._own_reference = ref_model is None
        if ref_model is None and peft_config is None and not isinstance(model, PeftModel):
            ref_model = reference_in_memory(model, config)
        data_collator = data_collator or SelfJudgeCollator()
        require_type("data_collator", data_collator, SelfJudgeCollator, "a SelfJudgeCollator")
        check_has_rows("train", train_dataset)
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **trainer_arguments,
        )
        if given is not None:
            self.reference = ReferenceCheck(given, self.model, partial(reference_logits, self))
        self.judge_folder = judge_name
        self._set_up(config)

    def _set_up(self, config: SelfJudgeConfig) -> None:
        """Sets up the judge, packing and rollouts after TRL has placed the models."""
        check_processes(self.accelerator)
        lighten(self.model)
        keep_freed_memory(self.accelerator.device)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "no parameter of the model requires gradients (PEFT leaves a merged model frozen): "
                "call model.requires_grad_(True), or pass a peft_config"
            )
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False)
        self.output_dir = str(config.output_dir)
        self.pairs_folder = Path(self.output_dir) / ROLLOUTS if config.push_pairs else None
        self.max_skipped_steps = config.max_skipped_steps
        self.on_saved = partial(save_judge, self)
        self.on_resume = partial(check_same_judge, self)
        tokens = None
        if config.packing != "off":
            tokens = pinned_tokens_per_pass(unwrapped(self.model), self.output_dir)
        one_pass = needs_one_pass(self.accelerator.distributed_type)
        self.vllm: VLLMSync | None = None
        if config.use_vllm:
            self.vllm = VLLMSync(
                self.model,
                config,
                self.accelerator,
                self.encoder,
                probe=probe_prompt(self.encoder, self.judge_templates),
                separate_judge=self.ref_model is not None or not needs_initial(self.given_judge),
            )
        self.max_over_ranks = max_over_ranks(self.accelerator)
        self.judge, lockstep = judge_in_training(self, self.given_judge, tokens)
        # Both models use packing. The policy's packing, which is set last, determines whether a
        # whole step can be computed at once.
        self.packing: Packing | None = None
        for own in (self.ref_model, self.model):
            if own is not None:
                self.packing = pack_fused_head(
                    own, config.packing, one_pass=one_pass, batch_tokens=tokens
                )
        self.clock = StepClock(self.accelerator, self._metrics["train"])
        self.add_callback(self.clock)
        self.pipeline = RolloutPipeline(
            self.judge,
            config,
            self.clock,
            sampler=partial(policy_sampler, self),
            reference=partial(active_reference, self),
            lockstep=lockstep,
        )
        self._step_batches: list[Any] = []
        self._step_inputs: list[dict[str, torch.Tensor]] | None = None
        self._shown: list[Rollout] = []
        self._log_prob_hooks = LogProbAveraging.attach(self)
        about = {"judge_templates": dict(self.judge_templates or {}), "judge": judged_by(self)}
        self.run_log = RunLog("self_judge", about)
        self.add_callback(self.run_log)

    def _reference(self, resumed: bool) -> ReferenceCheck | None:
        # Only for a sharded model, whose weights are in place by now
        given = start_logits(self, other=resumed or not self._own_reference)
        rounds = self.accelerator.mixed_precision != "no"
        return ReferenceCheck(given, self.model, partial(reference_logits, self), rounds=rounds)

    # -- data ------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        return prepare_dataset(dataset, self.encoder, args, dataset_name)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns Transformers' predictions for rows with `chosen` and `rejected`."""
        prepared = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return super().predict(prepared, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(COLUMNS)  # type: ignore[assignment]

    # -- the step --------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Numbers all micro-batches of the next optimizer step.

        `_prepare_inputs` runs the rollout for all micro-batches when it receives the first one. The
        rollout cannot run here, because resuming from a checkpoint restores the random state only
        after this prefetch.
        """
        # With `rollouts_ahead`, the pipeline also reads the next step's prompts, and the servers
        # sample responses to them during this step's update.
        if self.args.rollouts_ahead:
            source, number, *rest = args
            args = (iter(self.pipeline.take(source, number)), number, *rest)
        batches, count = super().get_batch_samples(*args, **kwargs)
        for number, batch in enumerate(batches):
            batch[MICRO_BATCH] = number
        self._step_batches, self._step_inputs = batches, None
        return batches, count

    def _prepare_inputs(self, inputs: Any) -> Any:
        if "input_ids" in inputs:
            return inputs  # already prepared
        if not self.model.training:
            pad, multiple = self._tokenizer.pad_token_id, self.args.pad_to_multiple_of
            batch = evaluation_batch(inputs, pad, self.args.max_length, multiple)  # type: ignore[arg-type]
            return super()._prepare_inputs(batch)
        number = inputs.get(MICRO_BATCH)
        if number is None:  # called from outside the training loop
            self._step_batches, self._step_inputs, number = [inputs], None, 0
        if self._step_inputs is None:
            self._step_inputs = self._rolled_out(self._step_batches)
        return super()._prepare_inputs(dict(self._step_inputs[number]))

    def _rolled_out(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Returns TRL's batch for each micro-batch, with the reference's log-probabilities."""
        with self.vllm.awake() if self.vllm is not None else nullcontext():
            rollouts = self._roll_out(batches)
        inputs = [self._preference_batch(own) for own in rollouts]
        if FUSED_HEAD and self._log_prob_hooks is None:
            with self.clock.phase("reference"):
                self._add_reference(rollouts, inputs)
        self.clock.rolled_out(self.pipeline.sampled_tokens)
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
        """Adds the reference's log-probabilities to the batches, under the keys that TRL expects.

        Packing chooses the size of its forward passes, so it receives the whole step at once.
        Without packing, or if the model is sharded across processes, each micro-batch is one
        forward pass.
        """
        # If `together`, compute all pairs of the step at once, and split the results afterwards.
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

    def _roll_out(self, batches: Sequence[dict[str, Any]]) -> list[list[Rollout]]:
        step = self.state.global_step
        return self.pipeline.roll_out(batches, step, last=step + 1 >= self.state.max_steps)

    # -- logs ------------------------------------------------------------------------------------

    def _record(self, rollouts: list[Rollout]) -> None:
        metrics, self.nothing_judged = metrics_over_processes(
            rollouts, self.judge.principles, self.accelerator, self.pipeline.thought_tokens
        )
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)
        self._shown = rollouts
        if self.args.save_rollouts and self.accelerator.is_main_process:
            step, decode = self.state.global_step + 1, self._tokenizer.decode
            keep_rollouts(rollouts, step, self.judge.principles, self.args, decode)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.log_completions and self._shown and self.model.training:
            if self.accelerator.is_main_process:
                show_pairs(self._shown, self.state.global_step, self.args.report_to or ())
            self._shown = []
        # The KL divergence cannot be estimated from averaged or reweighted log-probabilities.
        if self.model.training and self.args.ld_alpha is None and not self._averages():
            add_kl_estimate(self._metrics["train"], self.beta)
        super().log(logs, start_time)

    def _averages(self) -> bool:
        return self._log_prob_hooks is not None and self._log_prob_hooks.average

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        self.precompute_ref_logps = "ref_chosen_logps" in inputs  # otherwise computed below
        hooks = self._log_prob_hooks
        try:
            with hooks.in_loss() if hooks else nullcontext():
                result = super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = False
        if hooks:
            hooks.correct_metrics(self)
        return result

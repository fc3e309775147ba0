"""The checks of judge and weights in a trainer, in all processes together.

This module does not decide when checkpoints are written or where a run continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled

from self_judge.errors import CheckpointError, ModelError
from self_judge.packing.exactness import as_called
from self_judge.storage.atomic import UNFINISHED, clear_unfinished
from self_judge.training.arguments import without_secrets
from self_judge.training.identity.reference import ReferenceCheck, perturbed, probe_logits
from self_judge.training.identity.resuming import (
    check_same_adapter,
    check_same_launch,
    data_fingerprint,
    resuming,
    same_data,
)
from self_judge.training.identity.saved_weights import (
    check_given,
    check_optimizer,
    check_start,
    difference,
    load_renamed,
    rehearse_saving,
    shard_difference,
    trained,
)
from self_judge.training.identity.shards import (
    SHARDS,
    check_sharding,
    from_all,
    is_fsdp,
    is_sharded,
    largest,
    saves_shards,
    saving_whole_weights,
)

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

logger = logging.getLogger(__name__)


class IdentityMixin(Base):
    """Checks the given model before training, and what is saved.

    Attributes:
        reference: compares the reference; `None` before a sharded model is in place, and in a full
            JSFT.
        on_resume: a function that is called with the checkpoint from which the run resumes.
    """

    on_resume: Callable[[Path], object] | None = None
    reference: ReferenceCheck | None = None
    _data: str | None = None

    def _before_training(self, checkpoint: Path | None) -> None:
        """Finds errors that would otherwise appear only at the first save, or not at all."""
        model: Any = self.model
        check_sharding(self.accelerator, adapter=isinstance(model, PeftModel))
        check_start(self.args, model)
        self._data = data_fingerprint(self.train_dataset)
        if checkpoint is not None and self.on_resume is not None:
            self.on_resume(checkpoint)
        if self.optimizer is not None:
            check_optimizer(self.optimizer, model)
        if checkpoint is not None:
            check_same_launch(checkpoint, self.accelerator)
            with resuming(checkpoint):
                check_same_adapter(model, checkpoint)
                if not same_data(checkpoint, self._data) and self.accelerator.is_main_process:
                    logger.warning("the training data has changed since %s was saved", checkpoint)
        if not is_sharded(self.args):
            self._check_identity(checkpoint)

    def _as_the_loop_begins(self, checkpoint: Path | None) -> None:
        """Checks the weights that are in place only now: sharded, or from a checkpoint."""
        if is_sharded(self.args):
            self._check_identity(checkpoint)
        if checkpoint is not None:
            self._check_loaded(checkpoint)

    def _check_identity(self, checkpoint: Path | None) -> None:
        """Checks the given weights and the reference, and rehearses saving."""
        model: Any = self.model
        check_given(model)
        self.reference = self.reference or self._reference(resumed=checkpoint is not None)
        if self.reference is not None:
            self.reference.before_training()
        if not is_sharded(self.args):
            rehearse_saving(model)
        elif isinstance(model, PeftModel):
            self._rehearse_adapter(model)
        if checkpoint is not None and self.reference is not None:
            with resuming(checkpoint):
                self.reference.check_saved(checkpoint)

    def _reference(self, resumed: bool) -> ReferenceCheck | None:
        model: Any = self.model
        called = as_called(model)
        if not isinstance(called, PeftModel):
            return None
        with called.disable_adapter():
            return ReferenceCheck(probe_logits(model), model)

    def _rehearse_adapter(self, model: Any) -> None:
        """Saves a sharded adapter with noise in it. Its base is too large to load it again."""
        config = model.active_peft_config
        if config.is_prompt_learning and (is_fsdp(model) or is_deepspeed_zero3_enabled()):
            raise ModelError(
                f"{config.peft_type.value} cannot be saved under FSDP or ZeRO-3, because PEFT "
                "computes the prompts from whole weights: use LoRA, or launch with "
                "configs/accelerate/ddp.yaml"
            )
        folder = Path(str(self.args.output_dir))
        with perturbed(model, trained(model)), saving_whole_weights(self.accelerator):
            self._write_weights(folder / UNFINISHED / "rehearsal")
        if self.args.should_save:
            clear_unfinished(folder)
        self.accelerator.wait_for_everyone()

    def _write_weights(self, folder: Path) -> None:
        """Writes the weights and compares them with those in memory.

        Raises:
            ModelError: they differ. All processes raise it.
        """
        with without_secrets(self.args):
            super().save_model(str(folder), _internal_call=True)
        model: Any = self.accelerator.unwrap_model(self.model)
        if not saves_shards(self.accelerator):
            self._check_written(folder, difference(model, folder, reads=self.args.should_save))
        elif isinstance(model, PeftModel) and self.args.should_save:
            model.active_peft_config.save_pretrained(str(folder))  # for a run that resumes

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # and the shards of the weights
        if saves_shards(self.accelerator):
            model: Any = self.accelerator.unwrap_model(self.model)
            folder = Path(output_dir)
            self._check_written(folder, shard_difference(model, folder / SHARDS))

    def _check_written(self, folder: Path, problem: str | None) -> None:
        for told in from_all([problem] if problem else []):
            raise ModelError(f"{folder} was not saved correctly: {told}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_renamed(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not self._load_renamed(best):
            super()._load_best_model()
        self._check_loaded(best)

    def _load_renamed(self, checkpoint: Path) -> bool:
        model: Any = self.model
        return not is_sharded(self.args) and load_renamed(model, checkpoint)

    def _check_loaded(self, checkpoint: Path) -> None:
        """Compares the weights in memory with those in the checkpoint.

        FSDP and DeepSpeed load files of their own, which repeat the weights.

        Raises:
            CheckpointError: they differ. All processes raise it.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if not largest(any(True for _ in checkpoint.glob("*.safetensors"))):
            return  # shards, which were read back when they were written
        problem = difference(model, checkpoint, reads=self.args.should_save)
        for told in from_all([problem] if problem else []):
            raise CheckpointError(f"cannot load {checkpoint}: {told}")

"""Fault tolerance for both trainers, so that a killed run can resume and log the same numbers.

Checkpoints are complete or absent (`storage/atomic.py`) and are checked before a run resumes.
Checkpoints also contain the metrics that have not been logged yet. SIGTERM ends a run after the
current step. A step whose gradient is NaN or infinite is skipped. A run without such events gives
the same results as without this module.
"""

# A checkpoint is written in these steps. If the run is killed during one of them, `checkpoint-20`
# is either absent or complete:
#
#   .unfinished/checkpoint-20/...           the staging folder: weights, optimizer, random state,
#                                           unlogged_0.json, ... (each process writes its files)
#   .unfinished/checkpoint-20/manifest.json seal: every file is on disk, and the manifest lists
#                                           their sizes
#   checkpoint-20/                          commit: one rename
#   .unfinished/checkpoint-10.old           `save_total_limit`: rename, then delete old checkpoints
#
# The next run deletes `.unfinished` and resumes from the last checkpoint that matches its manifest.
#
# A resumed run logs the same numbers, here with logging_steps 10 and a checkpoint at step 14:
#
#   steps     1 ........ 10 | 11 .. 14 # 15 .. 17 killed
#                       log            └ the checkpoint contains the sums for steps 11 to 14
#   resumed                              15 ........ 20     log at step 20: mean over steps 11 to
#                                                           20, as in an uninterrupted run

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from peft import PeftModel
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from self_judge.errors import CheckpointError
from self_judge.models import apply_umask
from self_judge.runtime import without_cudnn_attention
from self_judge.storage.atomic import (
    UNFINISHED,
    atomic_write,
    clear_unfinished,
    commit,
    integrity_error,
    latest_complete,
    loads,
    move_files,
    remove,
    seal,
)
from self_judge.storage.repository import same_path
from self_judge.storage.run_dir import only_training
from self_judge.training.callbacks import at_the_start, stopping
from self_judge.training.hub import HubMixin
from self_judge.training.identity.mixin import IdentityMixin
from self_judge.training.identity.resuming import (
    check_same_optimizer,
    check_state,
    resuming,
    save_fingerprints,
)
from self_judge.training.identity.saved_weights import (
    check_loading,
    not_finite,
    remove_old_adapter,
)
from self_judge.training.identity.shards import from_all, is_sharded, saving_whole_weights

logger = logging.getLogger(__name__)

SKIPPED = "skipped_steps"


@contextmanager
def only_job(folder: Path) -> Iterator[None]:
    """Locks a run's folder for all processes of this job; see `only_training`.

    All processes must call this function. The first one holds the lock. If it cannot, all raise its
    error, so that none waits for it.
    """
    state = PartialState()
    with ExitStack() as held:
        problem: list[Any] = [None]
        if state.is_main_process:
            try:
                held.enter_context(only_training(folder))
            except (CheckpointError, OSError) as error:
                problem = [error]
        if broadcast_object_list(problem)[0] is not None:
            raise problem[0]
        yield


class NotFiniteError(FloatingPointError):
    """Raised when gradients or weights contain NaN or infinity. The message names the step."""


class FaultToleranceMixin(IdentityMixin, HubMixin):
    """Adds fault tolerance to a Transformers trainer. List the mixin before the trainer class.

    Attributes:
        max_skipped_steps: training stops after this many skipped steps in a row. A step is skipped
            if its gradient is NaN or infinite, or if `nothing_judged` is set.
        on_saved: a function that is called with the folder of every saved model and can add files
            to it.
        nothing_judged: `True` if none of a step's pairs could be judged; set by `SelfJudgeTrainer`.
        stop_on_sigterm: whether SIGTERM makes the trainer finish the current step, save a
            checkpoint and stop, instead of ending the process immediately. The caller then checks
            `stopped_early`.
        stopped_early: whether SIGTERM ended the last call of `train`.
    """

    _metrics: Any  # defined by TRL
    max_skipped_steps = 3
    stop_on_sigterm = False
    stopped_early = False
    nothing_judged = False
    on_saved: Callable[[Path], object] | None = None
    _staging: Path | None = None
    _final_folder: Path | None = None
    _unsent: str | None = None
    _skipped = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = args[1] if len(args) > 1 else kwargs.get("args")
        if config is not None:
            set_seed(config.seed)  # TRL 1.14 does not seed a new adapter
        super().__init__(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Sends nothing. TRL would otherwise report the types of the model and the machine."""

    # -- resuming ----------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Checks the checkpoint from which the run resumes, and then runs Transformers' `train`.

        Args:
            resume_from_checkpoint: a checkpoint folder, or `True` for the last complete checkpoint
                in the output folder.

        Raises:
            CheckpointError: no checkpoint is found, or it is incomplete or does not fit this run.
            NotFiniteError: `max_skipped_steps` steps in a row were skipped, or trained weights
                contain NaN or infinity.
        """
        folder = Path(str(self.args.output_dir))
        with only_job(folder):
            found: str | None = None
            if resume_from_checkpoint:
                found = str(self._checked(resume_from_checkpoint))
            if self.is_world_process_zero():
                clear_unfinished(folder)
            self._skipped = 0
            with without_cudnn_attention():
                self._before_training(Path(found) if found else None)
            # Transformers sets the seed only in the constructor. Random numbers drawn since then
            # would change the run.
            set_seed(self.args.seed)
            begins = partial(self._as_the_loop_begins, Path(found) if found else None)
            with stopping(self), without_cudnn_attention(), at_the_start(self, begins):
                result = super().train(found, *args, **kwargs)
            self._check_weights()
            return result

    def _checked(self, asked: str | bool) -> Path:
        if asked is True:
            path, incomplete = latest_complete(Path(str(self.args.output_dir)))
            for line in incomplete if self.is_world_process_zero() else ():
                logger.warning(line)
            if path is None:
                raise CheckpointError(
                    f"{self.args.output_dir} contains no complete checkpoint: leave "
                    "resume_from_checkpoint unset to start from scratch"
                )
            return check_state(path)
        path = Path(str(asked))
        reason = "there is no such folder" if not path.is_dir() else integrity_error(path)
        if reason is not None:
            raise CheckpointError(f"cannot resume from {path}: {reason}")
        return check_state(path)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # After resuming from the last step's checkpoint, Transformers would run an extra step.
        if 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            if self.args.should_save:  # a killed run may not have done this yet
                self._remove_surplus(Path(self._get_output_dir(None)))
            return
        super()._run_epoch(*args, **kwargs)

    # -- metrics that are not logged yet -----------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        check_same_optimizer(Path(checkpoint), self.optimizer)
        with resuming(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_rng_state(checkpoint)
            return
        with resuming(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
            self._load_unlogged(self._unlogged_file(Path(checkpoint)))

    def _load_unlogged(self, path: Path) -> None:
        if not path.is_file():
            return
        kept = loads(path.read_bytes())
        if kept["processes"] != self.args.world_size:
            return  # each process has its own sums, so the number of processes must match
        self._tr_loss += kept["loss"]
        # Transformers reports the mean loss over the steps in this call of `train` only.
        self._total_loss_scalar -= kept["loss"]
        self._globalstep_last_logged = kept["last_logged_step"]
        self._skipped = kept[SKIPPED]
        for name, values in kept["metrics"].items():
            self._metrics["train"][name].extend(values)
        if kept["trained_tokens"] is not None:
            self._total_train_tokens = kept["trained_tokens"]

    def _save_unlogged(self, folder: Path) -> None:
        kept = {
            "processes": self.args.world_size,
            "loss": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            SKIPPED: self._skipped,
            "metrics": dict(self._metrics["train"]),
            "trained_tokens": getattr(self, "_total_train_tokens", None),
        }
        with atomic_write(self._unlogged_file(folder)) as file:
            json.dump(kept, file, default=float)

    def _unlogged_file(self, folder: Path) -> Path:
        return folder / f"unlogged_{self.args.process_index}.json"

    # -- saving ------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as Transformers does, but replaces files only with complete new files."""
        if _internal_call:  # the model is part of a checkpoint, which has its own staging folder
            self._write_model(output_dir)
            return
        target = Path(output_dir or str(self.args.output_dir))
        self._save_complete(target)
        if not self.args.push_to_hub:
            return
        message, revision = "Model save", self.args.hub_revision
        if not same_path(target, str(self.args.output_dir)):
            self.push_to_hub(message, revision=revision)
        elif self.is_world_process_zero():
            self.push_folder(message, revision=revision)

    def _save_complete(self, target: Path) -> None:
        staging = target / UNFINISHED / "model"
        if self.args.should_save:
            clear_unfinished(target)
        self.accelerator.wait_for_everyone()
        with _writing(target), saving_whole_weights(self.accelerator):
            self._final_folder = target
            self._write_model(str(staging))
        if self.args.should_save and not is_sharded(self.args):
            model: Any = self.accelerator.unwrap_model(self.model)
            check_loading(model, staging if isinstance(model, PeftModel) else None)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with _writing(target):
                move_files(staging, target)
                remove_old_adapter(self.accelerator.unwrap_model(self.model), target)
            clear_unfinished(target)
        self.accelerator.wait_for_everyone()

    def _write_model(self, output_dir: str | None) -> None:
        self._check_weights()
        folder = Path(output_dir or str(self.args.output_dir))
        self._write_weights(folder)
        if not self.args.should_save:
            return
        apply_umask(folder)
        if self.on_saved is not None:
            self.on_saved(folder)
        self.write_card(folder, self._final_folder or folder)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(staging / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # While `_staging` is set, `_get_output_dir` makes Transformers write its files there.
        self._staging = staging
        try:
            with _writing(run_folder):
                self._final_folder = run_folder / name
                super()._save_checkpoint(model, trial)
                self._save_unlogged(staging / name)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(run_folder / name)
        # Every process must write its files before the main process seals and renames the folder.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with _writing(run_folder):
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                save_fingerprints(staging / name, self._data, self.optimizer)
                if self.reference is not None:
                    self.reference.save(staging / name)
                seal(staging / name)
                commit(staging / name, run_folder / name)
            self._remove_surplus(run_folder)
            clear_unfinished(run_folder)
        self.accelerator.wait_for_everyone()
        if self._unsent is not None:
            self._unsent = None
            self._push_checkpoint(run_folder / name)

    def _remove_surplus(self, run_folder: Path) -> None:
        """Removes the checkpoints beyond `save_total_limit`, as Transformers does."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        there = [Path(p) for p in sort_checkpoints(str(run_folder), use_mtime=True)]
        kept = set(there[-1:])
        if self.state.best_model_checkpoint is not None:
            kept.add(Path(self.state.best_model_checkpoint))
        too_many = len(there) - max(limit, len(kept))
        for old in [path for path in there if path not in kept][: max(0, too_many)]:
            remove(old)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # A background upload must not start before the folder has its final name.
        self._unsent = checkpoint_folder

    # -- NaN and infinity --------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Skips a step that has no usable gradient. The weights and the optimizer do not change."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm)
        learned = math.isfinite(value) and not self.nothing_judged
        self._metrics["train"][SKIPPED].append(0.0 if learned else 1.0)
        if learned:
            self._skipped = 0
            return norm
        self._skipped += 1
        step = self.state.global_step + 1
        what = (
            f"the norm of its gradient is {value}"
            if not math.isfinite(value)
            else "no pair could be judged: responses are empty, or scores are NaN or infinite"
        )
        if self.is_world_process_zero():
            logger.warning("step %d is skipped: %s", step, what)
        if self._skipped >= self.max_skipped_steps:
            broken = from_all(not_finite(model))
            weights = (
                f"{len(broken)} trained weights also contain NaN or infinity (first: {broken[0]}): "
                "do not use these weights"
                if broken
                else f"Weights and checkpoints are unchanged since step {step - self._skipped}"
            )
            raise NotFiniteError(
                f"training stops at step {step}, the last of {self._skipped} skipped steps in a "
                f"row: {what}. {weights}. Try a smaller learning_rate, or a dtype with a larger "
                "range (the largest float16 value is 65,504)"
            )
        # DeepSpeed steps the optimizer itself and also skips such steps.
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            model.zero_grad(set_to_none=True)
        return norm

    def _check_weights(self) -> None:
        """Raises an error if weights contain NaN or infinity, or the reference has changed."""
        model: Any = self.model
        broken = from_all(not_finite(model))
        if broken:
            raise NotFiniteError(
                f"step {self.state.global_step}: {len(broken)} trained weights contain NaN or "
                f"infinity (first: {broken[0]}), so nothing is saved. Earlier checkpoints are valid"
            )
        if self.reference is not None:
            self.reference.check(self.state.global_step)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Converts all write errors, including those of torch and safetensors, into an `OSError`.

    Raises:
        OSError: writing failed. The message names the last complete checkpoint, if any.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        clear_unfinished(folder)
        last, _ = latest_complete(folder)
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"cannot write to {folder} ({why:.200}); "
            + (f"{last} is complete" if last else "the folder contains no complete checkpoint")
            + ". Free some disk space and run the same command again"
        ) from error

"""Pushes the output folder of a run to the Hub, complete and without other files of the model.

This module does not decide what is saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import create_repo, upload_file, upload_folder
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from self_judge.storage.atomic import MANIFEST, UNFINISHED, atomic_files, atomic_write
from self_judge.storage.run_dir import ROLLOUTS
from self_judge.training.model_card import CARD, model_card, pairs_card

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object

# The sampled pairs contain the prompts; `push_pairs` pushes them as a dataset.
_IGNORED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{UNFINISHED}/*", "*.part", f"{ROLLOUTS}/*"]
# Files on the Hub that a push removes if the folder does not have them: with the adapter of an
# earlier push, a merged model would load as an adapter.
_OF_A_MODEL = ["adapter_*", "model*.safetensors", "model.safetensors.index.json"]
# Files of a checkpoint from which a run resumes.
_STATE = ("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "trainer_state.json", MANIFEST,
          "unlogged_*", "data_fingerprint.json", "reference.json")  # fmt: skip


class HubMixin(Base):
    """Writes model cards and pushes the output folder of a Transformers trainer.

    Attributes:
        judge_folder: the folder of the judge, if it is another model than the one that is trained.
        pairs_folder: the folder of sampled pairs to push as a dataset, if any.
    """

    judge_folder: str | None = None
    pairs_folder: Path | None = None

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes the model card to the output folder; see `create_model_card` of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        given = [tags] if isinstance(tags, str) else tags or []
        self.write_card(folder, folder, model_name, dataset_name, given)

    def write_card(self, folder: Path, saved_as: Path, *named: Any) -> None:
        """Writes the card of a saved model to its folder; see `model_card`."""
        with atomic_write(folder / CARD) as file:
            file.write(model_card(self, folder, saved_as, *named))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Saves the model in the output folder, writes its card, and pushes the folder.

        Args:
            commit_message, blocking, token, revision, private: as in Transformers.
            card: arguments for `create_model_card`.

        Returns:
            The commit, or a future with `blocking=False`; `None` on other processes than the first.
        """
        if private is not None:  # also for the repository of the pairs
            self.args.hub_private_repo = private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self._save_complete(Path(str(self.args.output_dir)))
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        return self.push_folder(commit_message, blocking, token, revision)

    def push_folder(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Pushes the output folder as it is; see `push_to_hub`."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        if self.pairs_folder is not None:
            self._push_pairs(self.pairs_folder, token or self.args.hub_token)
        return self._upload(commit_message, not blocking, token, revision)

    def _push_pairs(self, folder: Path, token: str | None) -> None:
        """Pushes the pairs that self-training saved, and a card, as a dataset."""
        name = f"{self.hub_model_id}-pairs"
        private = self.args.hub_private_repo
        create_repo(name, repo_type="dataset", exist_ok=True, private=private, token=token)
        settings: Any = {"repo_id": name, "repo_type": "dataset", "token": token}
        upload_file(path_or_fileobj=pairs_card(self).encode(), path_in_repo=CARD, **settings)
        upload_folder(folder_path=folder, allow_patterns="step-*.jsonl", **settings)

    def _save_complete(self, target: Path) -> None:
        raise NotImplementedError

    def _upload(
        self,
        message: str | None,
        in_background: bool,
        token: str | None = None,
        revision: str | None = None,
        **changes: Any,
    ) -> Any:
        options = {
            "folder_path": str(self.args.output_dir),
            "ignore_patterns": _IGNORED,
            "delete_patterns": _OF_A_MODEL,
            **changes,
        }
        return upload_folder(
            repo_id=str(self.hub_model_id),
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            run_as_future=in_background,  # type: ignore[call-overload]
            **options,
        )

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Pushes the model of a complete checkpoint in the background, as `hub_strategy` says."""
        # Transformers' own method would also save the arguments with their access token.
        args = self.args
        running: Any = self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = running is not None and not running.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        with atomic_files(Path(str(args.output_dir))) as folder:
            for path in checkpoint.iterdir():
                if path.is_file() and not any(path.match(pattern) for pattern in _STATE):
                    shutil.copy(path, folder / path.name)
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(message, True)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            where = "last-checkpoint" if last else checkpoint.name
            jobs.append(
                self._upload(
                    f"{message}, checkpoint", True, path_in_repo=where,
                    folder_path=str(checkpoint), ignore_patterns=None, delete_patterns=None,
                )
            )  # fmt: skip
        if busy:
            running.jobs.extend(jobs)
        else:
            self.push_in_progress: Any = PushInProgress(jobs)  # type: ignore[arg-type]

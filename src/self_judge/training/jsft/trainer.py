"""JSFTTrainer extends TRL's SFTTrainer with packing that computes each shared token once.

The trainer keeps both orders of a pair together. It changes the order of examples and the layout of
forward passes, but not the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from self_judge.config.self_training import PackingChoice
from self_judge.errors import require_type
from self_judge.inference.lockstep import check_processes
from self_judge.packing.fused_head import pack_fused_head
from self_judge.packing.packing import Packing, needs_one_pass
from self_judge.packing.pass_size import pinned_tokens_per_pass
from self_judge.runtime import keep_freed_memory, unwrapped
from self_judge.training.arguments import check_args, check_has_rows, check_names, model_or_name
from self_judge.training.callbacks import RunLog
from self_judge.training.fault_tolerance import FaultToleranceMixin
from self_judge.training.identity.reference import load_by_name
from self_judge.training.lora_layers import lighten


class PairSampler(Sampler[int]):
    """Shuffles the examples, but keeps both orders of a judged pair together.

    Args:
        swapped: for each example, whether it is the previous example with the responses swapped.
        seed: determines the order, together with the epoch.
    """

    # The prompts of both orders share a prefix, which packing computes once. With the examples
    # 0 sft, 1 judge, 2 swapped, 3 judge, 4 swapped, the units are [0] [1 2] [3 4]. Seed 0 gives the
    # order 3 4 0 1 2.

    def __init__(self, swapped: Sequence[bool], seed: int) -> None:
        self.units: list[list[int]] = []
        for i, second in enumerate(swapped):
            if second and self.units:
                self.units[-1].append(i)
            else:
                self.units.append([i])
        self.length = len(swapped)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch. Accelerate's data loader calls this method before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for unit in torch.randperm(len(self.units), generator=generator).tolist():
            yield from self.units[unit]


def check_examples(dataset: Dataset, max_length: int | None) -> None:
    """Raises `ValueError` for preference pairs, and for examples that TRL would truncate."""
    columns = set(dataset.column_names)
    if "chosen" in columns and not columns & {"input_ids", "messages", "text", "completion"}:
        raise ValueError(
            "the dataset has preference pairs: pass the examples of jsft_dataset("
            "load_preferences(dataset), encoder, templates)[0]"
        )
    if max_length is None or not {"swapped", "length"} <= columns:
        return
    lengths = dataset["length"][:]
    if cut := sum(length > max_length for length in lengths):
        raise ValueError(
            f"{cut:,} of {len(lengths):,} examples are longer than args.max_length {max_length}, "
            "and TRL would cut off their letters: pass SFTConfig(..., max_length=None), and limit "
            "the examples with jsft_dataset(..., max_length=...)"
        )


class JSFTTrainer(FaultToleranceMixin, SFTTrainer):
    """TRL's `SFTTrainer` for a dataset from `jsft_dataset`, with additional arguments.

    Args:
        packing: see `Packing`. With `off`, batches are padded and drawn as in `SFTTrainer`.
        max_skipped_steps: see `FaultToleranceMixin`.
        on_saved: a function that is called with the folder of every saved model and can add files
            to it.

    Raises:
        ValueError: `packing` names a mode that is not exact for the model.
    """

    _tag_names = ["trl", "sft", "self-judge"]  # noqa: RUF012  as TRL declares it
    _name = "judge-augmented SFT (JSFT)"

    def __init__(
        self,
        *args: Any,
        packing: PackingChoice = "auto",
        max_skipped_steps: int = 3,
        on_saved: Callable[[Path], object] | None = None,
        **kwargs: Any,
    ) -> None:
        check_names(type(self).__name__, SFTTrainer, SFTConfig, kwargs)
        given, *rest = args or (kwargs.pop("model", None),)
        given = model_or_name("model", given)
        config = rest[0] if rest else kwargs.get("args")
        check_args(config, SFTConfig)
        if isinstance(given, str):
            if config is None:
                config = kwargs["args"] = SFTConfig(f"{given.rstrip('/').split('/')[-1]}-SFT")
            quantized = kwargs.pop("quantization_config", None)
            new_adapter = kwargs.get("peft_config") is not None
            given = load_by_name(given, config, quantized, merge=new_adapter)
            config.model_init_kwargs = None  # TRL would warn that it ignores them
        args = (given, *rest)
        check_has_rows("train", kwargs.get("train_dataset"))
        super().__init__(*args, **kwargs)
        self.max_skipped_steps = max_skipped_steps
        self.on_saved = on_saved
        check_processes(self.accelerator)
        model: Any = self.model
        lighten(model)
        keep_freed_memory(self.accelerator.device)
        one_pass = needs_one_pass(self.accelerator.distributed_type)
        self.packing: Packing | None = None
        if packing != "off":
            tokens = pinned_tokens_per_pass(unwrapped(model), str(self.args.output_dir))
            self.packing = pack_fused_head(model, packing, one_pass=one_pass, batch_tokens=tokens)
        self.run_log = RunLog("jsft")
        self.add_callback(self.run_log)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        kinds = (Dataset, IterableDataset)
        require_type("a dataset", dataset, kinds, "a datasets.Dataset or IterableDataset")
        if isinstance(dataset, Dataset):
            check_examples(dataset, args.max_length)
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        columns = getattr(dataset, "column_names", None) or ()
        random = self.args.train_sampling_strategy in ("random", "batch_rebalance")
        packed = self.packing is not None and self.packing.decision.route != "off"
        if not (packed and random and "swapped" in columns):
            return super()._get_train_sampler(train_dataset)
        # Packing sorts the examples by length itself.
        return PairSampler(dataset["swapped"], self.args.data_seed or self.args.seed)

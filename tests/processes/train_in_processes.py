"""What test_processes.py launches: a short self-training of a tiny model, and what came of it."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, save_fsdp_model
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from conftest import SMALL, TEMPLATES, byte_bpe, tiny_llama, wrap
from self_judge import SelfJudgeConfig, SelfJudgeTrainer
from self_judge.training.identity.shards import reshard, shard


def train(asked: dict[str, Any], out: Path) -> None:
    tokenizer = wrap(byte_bpe())
    rows = [
        {"prompt": [{"role": "user", "content": f"what is {i}" + " and the capital" * (i % 5)}]}
        for i in range(8)
    ]
    args = SelfJudgeConfig(
        **{
            "output_dir": str(out),
            "max_steps": 4,
            **SMALL,
            "use_cpu": True,
            **asked["args"],
        }
    )
    if asked.get("sharded"):
        # On a CPU Accelerate makes DDP of FSDP; the sharding itself works there.
        assert args.device.type == "cpu"  # asking for it sets the processes up
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    start = asked.get("model") or tiny_llama(len(tokenizer), **asked.get("changes", {}))
    lora = {"task_type": "CAUSAL_LM", "r": 4, **asked.get("peft", {})}
    adapter: Any = LoraConfig(**lora) if asked.get("lora") else None
    if asked.get("prompts"):
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = SelfJudgeTrainer(
        model=start,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        judge_templates=TEMPLATES,
        peft_config=adapter,
    )
    state = PartialState()
    if asked.get("dies") and state.process_index == 1:
        trainer.judge.compare = lambda comparisons: os._exit(3)
    if asked.get("told") and state.process_index == 1:
        compare = trainer.judge.compare

        def told(comparisons: Any) -> Any:
            if trainer.state.global_step == 1:  # in its second step
                os.kill(os.getpid(), signal.SIGTERM)
            return compare(comparisons)

        trainer.judge.compare = told
    if asked.get("moves") is not None:
        trainer.add_callback(Moving(trainer, asked["moves"]))
    if asked.get("spoils") == "shards":
        transformers.trainer.save_fsdp_model = partial(spoiled_shards, save_fsdp_model)
    elif asked.get("spoils"):
        trainer._save = partial(spoiled, trainer._save)
    trainer.stop_on_sigterm = bool(asked.get("told"))
    trainer.train(resume_from_checkpoint=asked.get("resume"))
    trainer.save_model()
    if state.is_main_process:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        kind = str(trainer.accelerator.distributed_type.value)
        result = {
            "history": history,
            "kind": kind,
            "processes": state.num_processes,
            "stopped": trainer.stopped_early,
        }
        (out / "result.json").write_text(json.dumps(result))
    state.wait_for_everyone()


class Moving(TrainerCallback):
    """Changes the judge in one process, after the first step."""

    def __init__(self, trainer: SelfJudgeTrainer, process: int) -> None:
        self.trainer, self.process = trainer, process

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        judge = self.trainer.ref_model or self.trainer.model
        reshard(judge)
        if state.global_step == 1 and args.process_index == self.process:
            for parameter in judge.parameters():
                if not parameter.requires_grad:
                    shard(parameter).mul_(-2)


def spoiled(save: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
    """Saves, and changes one weight in the file."""
    save(output_dir, *args, **kwargs)
    for file in Path(output_dir).glob("*.safetensors"):
        spoil(file)


def spoil(file: Path) -> None:
    state = load_file(file)
    state[sorted(state)[0]] += 1
    save_file(state, file, {"format": "pt"})


def spoiled_shards(
    save: Any, plugin: Any, accelerator: Any, model: Any, *args: Any, **kwargs: Any
) -> None:
    """Saves while one process holds other values of one weight."""
    changed = shard(next(p for p in model.parameters() if p.requires_grad))
    changed += accelerator.process_index
    save(plugin, accelerator, model, *args, **kwargs)
    changed -= accelerator.process_index


def main(asked: dict[str, Any], out: Path) -> None:
    try:
        train(asked, out)
    except ValueError as error:  # ModelError, CheckpointError
        out.mkdir(parents=True, exist_ok=True)
        (out / f"refused_{os.environ['RANK']}").write_text(str(error))
        raise
    # The trainer goes first: were DDP's reducer the last to hold the group, the group's end would
    # wait, with the interpreter's lock, for a gloo thread that wants this lock to let go of a hook.
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # a process that hangs says where
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))

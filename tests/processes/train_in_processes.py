"""What test_processes.py launches: a short self-training of a tiny model, and what came of it."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from conftest import SMALL, TEMPLATES, byte_bpe, tiny_llama, wrap
from self_judge import SelfJudgeConfig, SelfJudgeTrainer


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
    trainer = SelfJudgeTrainer(
        model=asked.get("model") or tiny_llama(len(tokenizer)),
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        judge_templates=TEMPLATES,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4) if asked.get("lora") else None,
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


def main(asked: dict[str, Any], out: Path) -> None:
    train(asked, out)
    # The trainer goes first: were DDP's reducer the last to hold the group, the group's end would
    # wait, with the interpreter's lock, for a gloo thread that wants this lock to let go of a hook.
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # a process that hangs says where
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))

"""Two real processes on the CPU: they train as one does, and none is left hanging."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from train_in_processes import spoil

from conftest import ROOT, tiny_llama
from families import build, sharing
from run_overrides import given, one_step
from self_judge.inference.lockstep import LockstepPacking, check_processes
from self_judge.models import load_model
from self_judge.storage.atomic import integrity_error
from self_judge.storage.run_dir import only_training
from self_judge.training.identity.shards import check_sharding

pytestmark = pytest.mark.cpu


def launch(
    out: Path, file: str = "single", processes: int = 1, *, flags: Sequence[str] = (), **asked: Any
) -> subprocess.CompletedProcess[str]:
    """A training in `accelerate launch`, with flags of its own."""
    script = ROOT / "tests" / "processes" / "train_in_processes.py"
    return launched(file, processes, *flags, str(script), json.dumps(asked), str(out))


def launched(file: str, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a shipped file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "configs" / "accelerate" / f"{file}.yaml"),
        "--num_processes", str(processes), "--main_process_port", str(port), *words,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in ("src", "tests", "tests/helpers")),
        "OMP_NUM_THREADS": "1",
    }
    if file.startswith("zero"):
        # With ACCELERATE_USE_CPU, Accelerate makes DDP of DeepSpeed.
        environment |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def result(out: Path, **asked: Any) -> dict[str, Any]:
    """What a launched training wrote down; its exit comes after that and may, rarely, abort."""
    for _ in range(2):
        done = launch(out, **asked)
        assert "Timeout (" not in done.stderr, done.stderr[-12000:]  # a hang is no abort
        if (out / "result.json").is_file():
            return json.loads((out / "result.json").read_text())
    raise AssertionError(done.stderr[-4000:])


def column(run: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in run["history"]]


def same_weights(left: Path, right: Path, *, tolerance: float = 1e-3) -> None:
    ours, theirs = (load_model(p, dtype=torch.float32).state_dict() for p in (left, right))
    start = tiny_llama(next(iter(ours.values())).shape[0]).state_dict()
    assert any(not torch.equal(ours[n], start[n]) for n in ours), "nothing was learned"
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


ONE = {"per_device_train_batch_size": 4}
TWO = {"per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("file", "asked"),
    [
        pytest.param("ddp", {}, id="ddp"),
        pytest.param("fsdp2", {"sharded": True}, id="fsdp2", marks=pytest.mark.slow),
        pytest.param("ddp", {"lora": True}, id="ddp-lora", marks=pytest.mark.slow),
        pytest.param("fsdp2", {"sharded": True, "lora": True}, id="fsdp2-lora",
                     marks=pytest.mark.slow),
        pytest.param("fsdp2", {"sharded": True, "args": {"num_generations": 4}}, id="fsdp2-k4",
                     marks=pytest.mark.slow),
        pytest.param("ddp", {"args": {"gradient_checkpointing": True}}, id="ddp-checkpointing",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_two_processes_learn_what_one_learns_from_a_batch_twice_as_large(
    file: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    more = asked.get("args", {})
    shared = {k: v for k, v in asked.items() if k not in ("sharded", "args")}
    one = result(tmp_path / "one", **shared, args={**ONE, **more})
    two = result(tmp_path / "two", file=file, processes=2, **{**asked, "args": {**TWO, **more}})
    kinds = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
    assert (one["processes"], two["processes"], two["kind"]) == (1, 2, kinds[file])
    for key in ("loss", "judge/margin", "completions/mean_length", "completions/max_length"):
        assert column(two, key) == pytest.approx(column(one, key), abs=1e-5), key
    assert len(column(one, "loss")) == 4
    assert len(set(column(one, "loss"))) == 4
    if not asked.get("lora"):
        same_weights(tmp_path / "one", tmp_path / "two")


# -- the checks of judge and weights, where no process has whole weights ---------------------------

LORA = {"lora": True}
BIASED = {**LORA, "peft": {"bias": "all"}}
USED = r"the judge would change during training: it uses base_model\.\S+\.bias, which is trained"
MOVED = r"step 4: the judge has changed during training"
SPOILED = r"\.unfinished/{} was not saved correctly: \S+ differs from the weights in memory"
WRONG = [
    pytest.param({"moves": 1}, MOVED, id="a judge that one process changes"),
    pytest.param({"moves": 0, **LORA}, MOVED, id="a base that one process changes"),
    pytest.param({"spoils": True}, SPOILED.format("model"), id="a file with other weights"),
    pytest.param({"spoils": True, **LORA}, SPOILED.format("rehearsal"), id="an adapter's file"),
]


def refused(out: Path, told: str, **asked: Any) -> None:
    """All processes end with the same error, and nothing is saved."""
    done = launch(out, **{"processes": 2, "args": TWO, **asked})
    assert done.returncode != 0
    assert "Timeout (" not in done.stderr, done.stderr[-12000:]
    errors = {file.name: file.read_text() for file in out.glob("refused_*")}
    assert sorted(errors) == ["refused_0", "refused_1"], done.stderr[-4000:]
    assert len(set(errors.values())) == 1
    assert re.search(told, errors["refused_0"]), errors
    assert not list(out.glob("*.safetensors"))


def test_a_sharded_judge_that_uses_a_trained_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    refused(tmp_path, USED, file="fsdp2", sharded=True, **BIASED, changes={"attention_bias": True})
    assert not (tmp_path / "metrics.jsonl").exists()  # before the first step


@pytest.mark.slow
def test_trained_tokens_of_a_sharded_model_are_learned(tmp_path: Path) -> None:
    adapter = {"lora": True, "peft": {"trainable_token_indices": [60, 61]}}
    run = result(tmp_path, file="fsdp2", processes=2, sharded=True, args=TWO, **adapter)
    assert len(set(column(run, "loss"))) == 4


@pytest.mark.slow
def test_prompts_of_a_sharded_model_are_refused_before_the_first_step(tmp_path: Path) -> None:
    told = "PROMPT_TUNING cannot be saved under FSDP or ZeRO-3"
    refused(tmp_path, told, file="fsdp2", sharded=True, prompts=True)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "told"), WRONG)
def test_a_sharded_run_ends_in_all_processes(
    asked: dict[str, Any], told: str, tmp_path: Path
) -> None:
    refused(tmp_path, told, file="fsdp2", sharded=True, **asked)


@pytest.mark.slow
def test_a_judge_that_changes_in_one_process_ends_all(tmp_path: Path) -> None:
    refused(tmp_path, MOVED, file="ddp", moves=1)


@pytest.mark.slow
def test_a_sharded_run_is_not_resumed_with_another_adapter(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"file": "fsdp2", "sharded": True, "lora": True}
    saving = {**TWO, "save_strategy": "steps", "save_steps": 2}
    whole = result(tmp_path / "whole", processes=2, **asked, args=saving)
    at = {"resume": str(tmp_path / "whole" / "checkpoint-2")}
    resumed = result(tmp_path / "resumed", processes=2, **asked, args=TWO, **at)
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss"), abs=1e-6)
    refused(
        tmp_path / "other", "its adapter has lora_alpha=8", **asked, **at, peft={"lora_alpha": 4}
    )


SHARDS: dict[str, Any] = {
    "file": "fsdp2", "processes": 2, "sharded": True,
    "flags": ["--fsdp_state_dict_type", "SHARDED_STATE_DICT"],
}  # fmt: skip
SAVING = {**TWO, "save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_checkpoints_in_shards_are_resumed_and_the_model_is_saved_whole(
    lora: bool, tmp_path: Path
) -> None:
    whole = result(tmp_path / "whole", **SHARDS, lora=lora, args=SAVING)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert integrity_error(checkpoint) is None
    assert not list(checkpoint.glob("*.safetensors"))
    resumed = result(tmp_path / "resumed", **SHARDS, lora=lora, args=TWO, resume=str(checkpoint))
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss"), abs=1e-6)
    if not lora:  # the base of the adapter is in memory only
        same_weights(tmp_path / "whole", tmp_path / "resumed", tolerance=1e-6)
    else:
        saved = [
            load_file(tmp_path / f / "adapter_model.safetensors") for f in ("whole", "resumed")
        ]
        assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.slow
def test_a_checkpoint_with_a_wrong_shard_is_not_sealed(tmp_path: Path) -> None:
    told = r"checkpoint-2 was not saved correctly: \S+ differs from the weights in memory"
    refused(tmp_path, told, **SHARDS, spoils="shards", args=SAVING)
    assert not (tmp_path / "checkpoint-2").exists()


@pytest.mark.slow
def test_a_run_is_not_resumed_from_weights_that_differ_from_the_saved_model(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"file": "fsdp2", "processes": 2, "sharded": True}
    result(tmp_path / "whole", **asked, args=SAVING)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    spoil(checkpoint / "model.safetensors")  # FSDP resumes from pytorch_model_fsdp.bin
    told = rf"cannot load {checkpoint}: \S+ differs from the weights in memory"
    refused(tmp_path / "resumed", told, **asked, resume=str(checkpoint))


def test_the_first_version_of_fsdp_is_refused_with_the_way_to_the_second() -> None:
    # On a CPU, Accelerate refuses it first.
    plugin = SimpleNamespace(fsdp_version=1)
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=r"FSDP1 is deprecated .* `accelerate to-fsdp2`"):
        check_sharding(accelerator, adapter=True)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2], ids=["one then two", "two then one"])
def test_a_checkpoint_of_one_number_of_processes_is_resumed_by_another(
    first: int, tmp_path: Path
) -> None:
    kinds = {1: {"file": "single", "processes": 1}, 2: {"file": "ddp", "processes": 2}}
    sizes = {1: ONE, 2: TWO}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = result(tmp_path / "whole", **kinds[first], args={**sizes[first], **saving})
    other = 3 - first
    resumed = result(
        tmp_path / "resumed", **kinds[other], args=sizes[other],
        resume=str(tmp_path / "whole" / "checkpoint-2"),
    )  # fmt: skip
    assert column(resumed, "loss")[-2:] == pytest.approx(column(whole, "loss")[-2:], abs=1e-5)
    same_weights(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize(("file", "sharded"), [("ddp", False), ("fsdp2", True)])
def test_a_process_that_dies_ends_the_job_with_an_error(
    file: str, sharded: bool, tmp_path: Path
) -> None:
    done = launch(tmp_path, file, 2, args=TWO, dies=True, sharded=sharded)  # or it times out
    assert done.returncode != 0
    assert "exitcode  : 3" in done.stderr or "exitcode: 3" in done.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "sharded"), [("ddp", False), ("fsdp2", True)])
def test_one_process_that_is_told_to_stop_ends_all_after_the_same_step(
    file: str, sharded: bool, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    told = result(out, file=file, processes=2, args=TWO, told=True, sharded=sharded)
    assert told["stopped"]
    assert [entry["step"] for entry in told["history"]] == [1, 2]
    assert integrity_error(out / "checkpoint-2") is None
    on = result(
        out, file=file, processes=2, args=TWO, sharded=sharded, resume=str(out / "checkpoint-2")
    )
    undisturbed = result(
        tmp_path / "undisturbed", file=file, processes=2, args=TWO, sharded=sharded
    )
    assert column(on, "loss") == pytest.approx(column(undisturbed, "loss"), abs=1e-6)


def test_a_command_trains_in_two_processes_says_each_thing_once_and_locks_its_folder(
    saved_judge: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"

    def trained(kind: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = given(saved_judge, data[kind], *one_step(out, "self_judge_args", *more))
        words += ["self_judge_args.max_new_tokens=4", "training_args.save_steps=1"]
        words += ["training_args.per_device_train_batch_size=1", "training_args.eval_strategy=no"]
        file = str(ROOT / "configs" / "hh_self_judge.yaml")
        return launched("ddp", 2, "--module", "self_judge.cli", "train", file, *words)

    with only_training(out):
        refused = trained("hh")
    assert refused.returncode != 0
    assert f"another training writes to {out} (process {os.getpid()} on " in refused.stderr
    assert "]: Traceback" not in refused.stderr  # none went on without the lock
    assert trained("hh").returncode == 0
    again = trained(
        "preference", "training_args.max_steps=2", "training_args.resume_from_checkpoint=true"
    )
    assert again.returncode == 0, again.stderr[-4000:]
    for line in ("resuming from", "the training data has changed since", "policy: "):
        assert again.stderr.count(line) == 1, again.stderr


def written_by_one_and_by_two(
    command: str, given: list[dict[str, Any]], judge: Path, folder: Path, *options: str
) -> list[list[str]]:
    """The lines that a command writes in one process, in two, and in two that find them there."""
    source = folder / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, given)))
    outputs = []
    for processes, file in ((1, "single"), (2, "ddp"), (2, "ddp")):
        target = folder / f"{processes}.jsonl"
        done = launched(
            file, processes, "--module", "self_judge.cli", command, str(source), str(target),
            "--model", str(judge), *options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert target.is_file(), done.stderr[-4000:]
        outputs.append(target.read_text().splitlines())
    assert [path.name for path in folder.glob("2.jsonl.*")] == ["2.jsonl.settings.json"]
    return outputs


@pytest.mark.slow
def test_a_tournament_is_shared_out_and_joined_in_order(saved_judge: Path, tmp_path: Path) -> None:
    given = [{"context": f"what is {i}?", "responses": ["yes", "no", f"{i}"]} for i in range(600)]
    options = ("--max-length", "200")
    one, two, again = written_by_one_and_by_two(
        "tournament", given, saved_judge, tmp_path, *options
    )
    assert one == two == again
    assert len(one) == 600


@pytest.mark.slow
def test_judging_in_bulk_is_shared_out_and_joined_in_order(
    saved_judge: Path, tmp_path: Path
) -> None:
    given = [
        {"context": f"what is {i}?", "response_a": "yes", "response_b": f"no {i}"}
        for i in range(300)
    ]
    options = ("--chunk", "32")
    one, two, again = written_by_one_and_by_two("judge", given, saved_judge, tmp_path, *options)
    assert one == two == again
    assert len(one) == 300


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "compare"])
def test_an_evaluation_is_shared_out_and_written_by_one(
    command: str, saved_judge: Path, tmp_path: Path
) -> None:
    model = str(saved_judge)
    source = tmp_path / "in.jsonl"
    if command == "eval":
        given = [
            {
                "input": f"what is {i}?",
                "output_1": "yes",
                "output_2": f"no {i}",
                "label": 1 + i % 2,
            }
            for i in range(90)
        ]
        words = ["eval", str(source), "--model", model, "--compare", model]
        files = ["verdicts.jsonl", "compared/verdicts.jsonl"]
    else:
        given = [{"prompt": f"what is {i}?"} for i in range(90)]
        words = ["compare", model, model, "--judge", model, "--prompts", str(source),
                 "--max-new-tokens", "4", "--sampling-batch-size", "16"]  # fmt: skip
        files = ["responses_a.jsonl", "responses_b.jsonl", "pairs.jsonl"]
    source.write_text("\n".join(map(json.dumps, given)))
    outputs = []
    for processes, file in ((1, "single"), (2, "ddp"), (2, "ddp")):
        folder = tmp_path / str(processes)
        done = launched(
            file, processes, "--module", "self_judge.cli", *words, "--chunk", "16",
            "--output", str(folder),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("written to") == 1
        told = json.loads((folder / "results.json").read_text())
        told.pop("pairs_per_second", None)
        outputs.append([told, *((folder / name).read_text().splitlines() for name in files)])
        assert not list(folder.rglob("*.jsonl.[01]"))
    assert outputs[0] == outputs[1] == outputs[2]
    assert [len(lines) for lines in outputs[0][1:]] == [90] * len(files)


# -- what is asked for is what runs ----------------------------------------------------------------


def accelerator(processes: int, kind: DistributedType) -> Any:
    return SimpleNamespace(num_processes=processes, distributed_type=kind)


def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(accelerator(2, DistributedType.MULTI_CPU))
    for alone in (accelerator(1, DistributedType.NO), accelerator(2, DistributedType.NO)):
        with pytest.raises(
            ValueError, match=r"started 2 processes.*the processes would train separately"
        ):
            check_processes(alone)


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_sharding_that_was_asked_for_and_does_not_happen_is_refused(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    check_processes(accelerator(2, DistributedType(asked)))
    with pytest.raises(ValueError, match=f"{asked} was requested, but Accelerate uses MULTI_CPU"):
        check_processes(accelerator(2, DistributedType.MULTI_CPU))
    monkeypatch.setenv("WORLD_SIZE", "1")  # one process has nothing to share
    check_processes(accelerator(1, DistributedType.NO))


def test_passes_are_announced_and_finished_together() -> None:
    model, sequences = build("llama"), sharing(5)
    calls: list[int] = []

    def most(own: int) -> int:  # another process has two passes more
        calls.append(own)
        return own or int(calls.count(0) <= 2)

    packing = LockstepPacking(model, "auto", batch_rows=3, max_over_ranks=most)
    assert packing.decision.route == "tree"
    passes: list[int] = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    found = dict(
        pair
        for numbers, logits in packing.next_token_logits(sequences)
        for pair in zip(numbers, logits, strict=True)
    )
    packing.finish()
    hook.remove()
    assert calls == [1] * -(-len(sequences) // 6) + [0, 0, 0]
    assert len(passes) == len(calls) - 1
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = model(torch.tensor([sequence]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)


def test_a_shared_model_that_cannot_be_packed_is_refused() -> None:
    model: Any = build("llama")
    bare = SimpleNamespace(route="off", reason="no backbone")
    packing = LockstepPacking(model, "off", batch_rows=2, max_over_ranks=int)
    assert packing.decision.route == "padding"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("self_judge.packing.packing._decide", lambda *_: bare)
        patch.setattr("self_judge.packing.packing._KNOWN", {})
        with pytest.raises(ValueError, match="a sharded model cannot judge: no backbone"):
            packing.decision  # noqa: B018

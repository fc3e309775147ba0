"""One run file on every machine: what is missing is replaced, and said in one line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from self_judge.config.hardware import (
    Machine,
    cpu_has_bf16,
    detect_machine,
    fit_to_machine,
    launch_over_gpus,
    threads_for,
)
from self_judge.config.schema import JSFTRun, load_run

CONFIGS = ROOT / "configs"
LAPTOP = Machine(cpu_count=8)
BOX = Machine(
    cuda=True,
    bf16=True,
    flash_attn=True,
    deepspeed=True,
    trackers=frozenset({"wandb"}),
    cpu_count=64,
    processes=8,
)


def uf_jsft(*overrides: str) -> JSFTRun:
    return load_run(CONFIGS / "uf_jsft.yaml", overrides, "jsft")


FLASH = "model.attn_implementation=flash_attention_2"


def test_on_a_full_box_nothing_is_changed_and_nothing_said() -> None:
    run = uf_jsft(FLASH, "training_args.report_to=[wandb]")
    assert fit_to_machine(run, BOX) == (run, [])


def test_a_laptop_gets_the_nearest_thing_to_everything_and_the_run_passed_in_stays() -> None:
    run = uf_jsft(FLASH, "training_args.report_to=wandb", "model.dtype=bfloat16")
    before = dataclasses.asdict(run)
    fitted, warnings = fit_to_machine(run, LAPTOP)
    assert dataclasses.asdict(run) == before
    assert fitted.model.attn_implementation == "sdpa"
    assert fitted.model.dtype == "float32"
    assert fitted.training_args["use_cpu"] is True
    assert fitted.training_args["bf16"] is False
    assert fitted.training_args["report_to"] == "none"
    assert "deepspeed" not in fitted.training_args
    assert warnings == [
        "flash-attn needs a CUDA GPU: using SDPA attention instead",
        "this CPU does not support bf16: using float32 instead",
        "DeepSpeed needs CUDA GPUs: using plain data parallelism instead",
        "the tracker wandb is not installed: not reporting to it",
    ]
    assert fit_to_machine(fitted, LAPTOP) == (fitted, []), "nothing is left to say"


def test_a_cpu_made_for_bf16_computes_in_bf16() -> None:
    run = load_run(CONFIGS / "hh_self_judge.yaml", [], "self_judge")
    fitted, warnings = fit_to_machine(run, Machine(bf16=True))
    assert warnings == []
    assert fitted.training_args["bf16"] is True
    assert fitted.training_args["use_cpu"] is True
    assert fitted.model.dtype == "bfloat16"


def test_fp16_on_a_cpu_becomes_what_the_cpu_can_do_with_one_warning() -> None:
    run = uf_jsft(
        "training_args.bf16=false",
        "training_args.fp16=true",
        "model.dtype=float16",
        "training_args.deepspeed=null",
    )
    for bf16, name, dtype in ((True, "bf16", "bfloat16"), (False, "float32", "float32")):
        fitted, warnings = fit_to_machine(run, Machine(bf16=bf16))
        assert warnings == [f"fp16 needs a CUDA GPU: using {name} on this CPU instead"]
        assert (fitted.training_args["bf16"], fitted.training_args["fp16"]) == (bf16, False)
        assert fitted.model.dtype == dtype


def test_bf16_is_said_to_be_off_where_it_would_be_on_by_default() -> None:
    run = load_run(CONFIGS / "uf_jsft.yaml", ["training_args={output_dir: x}"], "jsft")
    fitted, warnings = fit_to_machine(run, LAPTOP)
    assert fitted.training_args["bf16"] is False
    assert warnings == []


def test_an_old_gpu_keeps_its_place_but_not_bf16() -> None:
    old = dataclasses.replace(BOX, bf16=False)
    fitted, warnings = fit_to_machine(uf_jsft(), old)
    assert warnings == ["this GPU does not support bf16: using float32 instead"]
    assert "use_cpu" not in fitted.training_args
    assert fitted.training_args["bf16"] is False


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"deepspeed": False}, "DeepSpeed is not installed: using plain data parallelism instead"),
        (
            {"processes": 1},
            "DeepSpeed needs several processes, but this run has only one: using plain ",
        ),
        (
            {"sharded_by_launcher": True},
            "the launcher configures sharding: ignoring training",
        ),
    ],
)
def test_deepspeed_is_dropped_where_it_cannot_work(change: dict[str, bool], told: str) -> None:
    fitted, warnings = fit_to_machine(uf_jsft(), dataclasses.replace(BOX, **change))
    assert "deepspeed" not in fitted.training_args
    assert len(warnings) == 1
    assert warnings[0].startswith(told)


def test_flex_attention_trains_on_a_gpu_only() -> None:
    run = uf_jsft("model.attn_implementation=flex_attention", "training_args.deepspeed=null")
    fitted, warnings = fit_to_machine(run, Machine(bf16=True))
    assert warnings == ["FlexAttention has no backward pass on a CPU: using SDPA attention instead"]
    assert fitted.model.attn_implementation == "sdpa"
    kept, warnings = fit_to_machine(run, BOX)
    assert warnings == []
    assert kept.model.attn_implementation == "flex_attention"


def test_flash_attention_that_is_not_installed_is_told_from_a_missing_gpu() -> None:
    _, warnings = fit_to_machine(uf_jsft(FLASH), dataclasses.replace(BOX, flash_attn=False))
    assert warnings == ["flash-attn is not installed: using SDPA attention instead"]


def test_fsdp_and_tf32_need_a_gpu() -> None:
    run = uf_jsft(
        "training_args.deepspeed=null",
        "training_args.fsdp=full_shard",
        "training_args.fsdp_config={version: 2}",
        "training_args.tf32=true",
        "training_args.bf16=false",
    )
    fitted, warnings = fit_to_machine(run, LAPTOP)
    assert {"fsdp", "fsdp_config", "tf32"}.isdisjoint(fitted.training_args)
    assert warnings == [
        "tf32 needs a CUDA GPU: tf32 is disabled",
        "FSDP needs CUDA GPUs: using plain data parallelism instead",
    ]


def test_use_cpu_in_the_file_is_obeyed_on_a_machine_with_gpus() -> None:
    fitted, warnings = fit_to_machine(uf_jsft("training_args.use_cpu=true"), BOX)
    assert fitted.training_args["use_cpu"] is True
    assert warnings == ["DeepSpeed needs CUDA GPUs: using plain data parallelism instead"]


def test_installed_trackers_stay_and_unknown_names_are_left_to_transformers() -> None:
    run = uf_jsft("training_args.report_to=[wandb, tensorboard, all]")
    fitted, warnings = fit_to_machine(run, BOX)
    assert fitted.training_args["report_to"] == ["wandb", "all"]
    assert warnings == ["the tracker tensorboard is not installed: not reporting to it"]


def test_detection_reads_packages_and_the_launchers_environment() -> None:
    environ = {"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true"}
    machine = detect_machine(
        cuda=True, bf16=True, installed={"deepspeed", "tensorboardX"}.__contains__, environ=environ
    )
    assert machine == Machine(
        cuda=True,
        bf16=True,
        deepspeed=True,
        trackers=frozenset({"tensorboard"}),
        cpu_count=machine.cpu_count,
        processes=4,
        sharded_by_launcher=True,
    )
    assert machine.cpu_count >= 1


def test_a_launch_for_the_cpu_hides_the_gpu() -> None:
    environ = {"ACCELERATE_USE_CPU": "True"}
    assert detect_machine(cuda=True, bf16=True, environ=environ).cuda is False
    assert launch_over_gpus(["train.py"], 8, environ) is None


def test_several_gpus_get_one_process_each_and_the_arguments_are_kept() -> None:
    command = launch_over_gpus(["train_jsft.py", "--config=x.yaml", "a.b=c"], 8, {})
    assert command is not None
    assert command[0] == sys.executable
    assert command[-4:] == ["--nproc_per_node=8", "train_jsft.py", "--config=x.yaml", "a.b=c"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_process_is_enough_without_several_gpus(gpus: int) -> None:
    assert launch_over_gpus(["train_jsft.py"], gpus, {}) is None


def test_a_run_that_a_launcher_made_distributed_is_not_started_again() -> None:
    assert launch_over_gpus(["train_jsft.py"], 8, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}) is None


def test_all_cores_are_used_where_the_launcher_left_one() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    assert threads_for(LAPTOP, launched) == 8
    assert threads_for(LAPTOP, {"OMP_NUM_THREADS": "1"}) is None
    assert threads_for(LAPTOP, {**launched, "OMP_NUM_THREADS": "3"}) is None
    assert threads_for(BOX, launched) is None
    assert threads_for(dataclasses.replace(LAPTOP, processes=2), launched) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features : fp asimd bf16 sve\n", True),
        ("flags : fpu avx2 avx512f\nmodel : avx512_bf16\n", False),
        ("", False),
    ],
)
def test_the_cpus_own_flags_say_whether_it_is_made_for_bf16(
    tmp_path: Path, text: str, expected: bool
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    assert cpu_has_bf16(cpuinfo) is expected
    assert cpu_has_bf16(tmp_path / "none") is False

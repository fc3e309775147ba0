"""The `self-judge` command line: parses arguments, calls `commands` and reports errors.

Heavy modules are imported only when a command needs them, so that `--help` and usage errors appear
immediately.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar

from self_judge import __version__
from self_judge.console import masked, neutral
from self_judge.errors import ConfigError

if TYPE_CHECKING:
    from self_judge.config.schema import RunKind

FilledT = TypeVar("FilledT")
Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"
PACKING = ("auto", "tree", "cache", "padding", "off")  # must equal PackingChoice
_OVERRIDES = "override any value in the run file: key.path=value"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors, which quote arguments, mask secrets."""

    def error(self, message: str) -> NoReturn:
        super().error(neutral(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    For bad input, this function prints a one-line message and returns 2.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse rejects overrides that follow an option, so they are accepted here.
    if rest and (
        "overrides" not in arguments or any(r.startswith("-") or "=" not in r for r in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    if arguments.command is None:
        parser.print_help()
        return 0
    return _guarded(arguments.run, arguments, arguments.debug)


def train_main(kind: RunKind, argv: Sequence[str] | None = None) -> int:
    """Implements `train_jsft.py` and `train_self_judge.py` (`--config=FILE key.path=value…`)."""
    parser = _Parser(description=f"Start a {kind} run from a YAML file.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=_OVERRIDES)
    arguments = parser.parse_args(argv)
    arguments.kind = kind
    return _guarded(_train, arguments, arguments.debug)


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="self-judge",
        description="Align a language model with its own pairwise judgments (arXiv 2402.11253).",
    )
    parser.add_argument("--version", action="version", version=f"self-judge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="run the whole method in a small synthetic world (takes minutes on a CPU)"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.add_argument("--output", default="outputs/demo", metavar="DIR", help="output folder")
    demo.set_defaults(run=_demo)
    _add_runs(commands)
    _add_tournament(commands)
    report = commands.add_parser("report", help="write an HTML page with the results of runs")
    add = report.add_argument
    add("paths", nargs="+", metavar="DIR",
        help="a run, a folder of runs, or the output of tournament --brackets, eval or compare")
    add("-o", "--output", metavar="FILE", help="HTML page (default: report.html in the first DIR)")
    add("--pairs", type=int, default=400, help="maximum number of pairs on the page (default: 400)")
    report.set_defaults(run=_report)
    _add_evaluation(commands)
    return parser


def _add_runs(commands: Commands) -> None:
    """Adds the commands that read a run file: `jsft`, `train` and `check`."""
    for name, kind, text in (
        ("jsft", "jsft", "judge-augmented supervised fine-tuning"),
        ("train", "self_judge", "on-policy self-training by self-judgment"),
        ("check", None, "show the data and cost of a run, and find problems before the run starts"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help=_OVERRIDES)
        command.set_defaults(run=_train if kind else _check, kind=kind)
    add = command.add_argument  # of check
    add("--examples", type=int, default=400, metavar="N",
        help="encode only N evenly spaced records, but count all (default: 400; 0 encodes all)")
    add("--gpu", metavar="KIND",
        help="estimate memory for a GPU such as h100 or a100-80gb (default: this machine's GPU)")
    add("--processes", type=int, metavar="N", help="estimate memory for N processes")
    add("--sharding", choices=["none", "zero2", "zero3", "fsdp"],
        help="sharding to assume if it is set only in the launcher's configuration")
    add("--plain", action="store_true", help="print without colors, for logs")
    add("--json", action="store_true", help="print everything as JSON to standard output")


def _add_tournament(commands: Commands) -> None:
    tournament = commands.add_parser(
        "tournament", help="pick the best of N responses in a knockout (self-rejection)"
    )
    add = tournament.add_argument
    add("input", metavar="IN", help="file of contexts and responses, or prompts")
    add("output", metavar="OUT.jsonl", help="output file, with one line per record")
    add("--model", required=True, metavar="MODEL", help="the judge")
    add("--policy", metavar="DIR", help="model that samples responses (default: the judge)")
    add("--n", type=int, default=16, help="number of responses to sample per prompt (default: 16)")
    _add_sampling(tournament)
    _add_columns(tournament)
    add("--brackets", action="store_true", help="also write each tournament's bracket")
    _add_judge(tournament, "lines", 256)
    tournament.set_defaults(run=_tournament)


def _add_evaluation(commands: Commands) -> None:
    """Adds the commands `eval`, `compare` and `judge`."""
    evaluate = commands.add_parser("eval", help="evaluate a judge on labeled pairs")
    add = evaluate.add_argument
    add("data", nargs="+", metavar="DATA",
        help="LLMBar, PandaLM, HHH, JudgeBench, RM-Bench, RewardBench (2), MT-Bench or "
        "arena votes, HH, or any preference data, as files, folders or dataset IDs on the Hub")
    add("--model", required=True, metavar="MODEL", help="the judge")
    add("--output", required=True, metavar="DIR", help="output folder")
    add("--compare", metavar="MODEL",
        help="judge to compare with, or the --output folder of its evaluation")
    add("--split", default="test", metavar="NAME[,NAME…]", help="dataset splits (default: test)")
    add("--data-dir", metavar="DIR", help="subfolder of DATA")
    add("--name", help="configuration name of a Hub dataset")
    add("--data-revision", metavar="REV", help="revision of a Hub dataset")
    add("--max-pairs", type=int, metavar="N",
        help="use at most N pairs from each source, spread over its subsets")
    _add_columns(evaluate)
    _add_judge(evaluate)
    evaluate.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="compare the answers of two policies")
    add = compare.add_argument
    for name in ("policy_a", "policy_b"):
        add(name, metavar=name.upper(), help="a model to sample from, or a file of responses")
    add("--prompts", metavar="FILE", help="file of prompts to answer")
    add("--judge", required=True, metavar="MODEL", help="the judge")
    add("--output", required=True, metavar="DIR", help="output folder")
    add("--max-prompts", type=int, metavar="N", help="use the first N prompts")
    _add_columns(compare)
    add("--sampling-batch-size", type=int, default=32, metavar="N",
        help="number of responses sampled at once (default: 32)")
    _add_sampling(compare)
    _add_judge(compare)
    compare.set_defaults(run=_compare)

    judge = commands.add_parser("judge", help="judge pairs of responses in bulk")
    add = judge.add_argument
    add("input", metavar="IN", help="file with a context or prompt and two responses per record")
    add("output", metavar="OUT.jsonl", help="output file, with one line per record")
    add("--model", required=True, metavar="MODEL", help="the judge")
    add("--field", default="verdict", help="key of the verdict in an output line")
    _add_columns(judge)
    _add_judge(judge)
    judge.set_defaults(run=_judge)


def _add_columns(command: argparse.ArgumentParser) -> None:
    command.add_argument("--columns", nargs="+", default=(), metavar="NAME=COLUMN",
        help="the data's own column names, such as prompt=question (see docs/data.md)")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=768)
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=0.9)
    add("--seed", type=int, default=0, help="random seed (default: 0)")


def _add_judge(
    command: argparse.ArgumentParser, things: str = "pairs", chunk: int = 64
) -> None:
    """Adds the options that all commands with a judge share."""
    add = command.add_argument
    add("--templates", metavar="FILE",
        help="YAML file with judge templates that replace those in judge.json, if any")
    add("--dtype", default="auto", help="dtype of the weights (default: as saved)")
    add("--packing", default="auto", choices=PACKING, help="how prompts share prefixes")
    add("--revision", metavar="REV", help="revision of a Hub model")
    add("--trust-remote-code", action="store_true")
    add("--batch-size", type=int, default=8, metavar="N",
        help="prompts per forward pass without packing (default: 8)")
    add("--max-length", type=int, metavar="N", help="maximum number of tokens in a judge prompt")
    add("--vllm-server", dest="servers", nargs="+", default=(), metavar="URL",
        help="URLs of `vllm serve MODEL` replicas that run the model instead of this process")
    add("--chunk", type=int, default=chunk, metavar="N",
        help=f"number of {things} per write to disk (default: {chunk})")
    add("--overwrite", action="store_true", help="start from scratch instead of resuming")


# fmt: on
def _guarded(run, arguments: argparse.Namespace, debug: bool) -> int:  # type: ignore[no-untyped-def]
    try:
        status: int | None = run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug:
            raise
        for problem in error.args if isinstance(error, ConfigError) else [error]:
            # Messages often quote text from a file, so escape them.
            text = neutral(" ".join(str(problem).split())) or type(error).__name__
            print(f"self-judge: error: {text}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # training failed, but the user's input is valid
        if debug:
            raise
        print(f"self-judge: stopped: {neutral(str(error))}", file=sys.stderr)
        return 1
    return status or 0


def _demo(arguments: argparse.Namespace) -> None:
    from self_judge.commands.demo import run_demo

    run_demo(seed=arguments.seed, output=arguments.output)


def _train(arguments: argparse.Namespace) -> None:
    from self_judge.config.schema import load_run

    # Check the file before the slow import of torch, so that mistakes are reported immediately.
    said: list[str] = []
    if arguments.kind == "jsft":
        jsft = load_run(arguments.config, arguments.overrides, "jsft", said.append)
    else:
        self_judge = load_run(arguments.config, arguments.overrides, "self_judge", said.append)

    import torch
    from accelerate import PartialState

    from self_judge.config.hardware import launch_over_gpus

    command = launch_over_gpus(sys.argv, torch.cuda.device_count())
    if command is not None:
        sys.stderr.write(f"starting one process per GPU: {neutral(' '.join(command))}\n")
        sys.stderr.flush()
        os.execv(command[0], command)

    if os.environ.get("RANK", "0") == "0":
        _say_lines(said)

    from self_judge.commands import train

    try:
        if arguments.kind == "jsft":
            train.run_jsft(jsft)
        else:
            train.run_self_judge(self_judge)
    except train.TrainingStopped as stopped:
        # A preempted run ends successfully, with exit status 0.
        if PartialState().is_main_process:
            resume = _resume_command(sys.argv)
            print(neutral(f"{stopped}\nresume with: {resume}"), file=sys.stderr)
    _leave_process_group()


def _say_lines(lines: Sequence[str]) -> None:
    """Prints how older keys of a run file are read, in one line for each key."""
    for line in {line.partition(":")[0]: line for line in lines}.values():
        print(neutral(line), file=sys.stderr)


def _leave_process_group() -> None:
    """Destroys the process group at the end of a command.

    Otherwise, NCCL prints a warning, and gloo's threads may abort the interpreter.
    """
    from accelerate import PartialState

    # Free the trainer first, because DDP's reducer must not outlive the group's threads.
    gc.collect()
    PartialState().destroy_process_group()


def _resume_command(argv: Sequence[str]) -> str:
    """Returns the command that resumes a run."""
    override = "training_args.resume_from_checkpoint=true"
    kept = [a for a in argv[1:] if not a.startswith("training_args.resume_from_checkpoint=")]
    name = os.path.basename(argv[0])
    start = ["python", argv[0]] if name.endswith(".py") else [name]
    return shlex.join([*start, *kept, override])


def _check(arguments: argparse.Namespace) -> int:
    """Checks a run and returns the exit status: 1 if the run has problems, otherwise 0."""
    from self_judge.config.schema import kind_of_run, load_run

    # Check the file before the slow import of torch, so that mistakes are reported immediately.
    given: tuple[str, list[str]] = (arguments.config, arguments.overrides)
    said: list[str] = []
    load_run(*given, kind_of_run(*given), said.append)
    _say_lines(said)

    import logging

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from self_judge.check.check import check
    from self_judge.check.view import show

    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with Console(stderr=True).status("checking"):
        report = check(
            arguments.config,
            arguments.overrides,
            examples=arguments.examples,
            gpu=arguments.gpu,
            processes=arguments.processes,
            sharding=arguments.sharding,
        )
    if arguments.json:
        # `json` escapes all non-ASCII characters and all control characters except DEL.
        print(json.dumps(masked(report.to_dict()), indent=2).replace("\x7f", "\\u007f"))
    elif arguments.plain:
        show(report, Console(color_system=None, highlight=False, width=100), plain=True)
    else:
        show(report, Console(highlight=False))
    return 1 if report.problems else 0


def _report(arguments: argparse.Namespace) -> None:
    from self_judge.reporting.collect import Limits
    from self_judge.reporting.page import write_report

    write_report(arguments.paths, arguments.output, Limits(pairs=arguments.pairs))


def _filled(kind: type[FilledT], arguments: argparse.Namespace, **given: Any) -> FilledT:
    """Creates a dataclass instance from command-line arguments. `given` takes precedence."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in {**vars(arguments), **given}.items() if k in names})


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    from self_judge.data.records import parse_columns

    return parse_columns(arguments.columns)


def _bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"chunk": arguments.chunk, "overwrite": arguments.overwrite}


def _tournament(arguments: argparse.Namespace) -> None:
    from self_judge.commands.tournament import TournamentJob, run_tournament
    from self_judge.config.self_training import SamplingSettings

    job = _filled(TournamentJob, arguments, sampling=_filled(SamplingSettings, arguments))
    columns = _columns(arguments)
    run_tournament(arguments.input, arguments.output, job, columns=columns, **_bulk(arguments))
    _leave_process_group()


def _eval(arguments: argparse.Namespace) -> None:
    from self_judge.commands.eval import JudgeEvaluation, compared_judge, run_eval
    from self_judge.commands.judge_choice import JudgeChoice
    from self_judge.data.benchmarks import BenchmarkSource

    splits = tuple(name.strip() for name in arguments.split.split(",") if name.strip())
    own = {
        "splits": splits, "revision": arguments.data_revision, "columns": _columns(arguments)
    }  # fmt: skip
    sources = [_filled(BenchmarkSource, arguments, path=path, **own) for path in arguments.data]
    choice = _filled(JudgeChoice, arguments)
    run_eval(
        choice,
        _filled(JudgeEvaluation, arguments, sources=sources),
        arguments.output,
        compare=arguments.compare and compared_judge(choice, arguments.compare),
        overwrite=arguments.overwrite,
    )
    _leave_process_group()


def _compare(arguments: argparse.Namespace) -> None:
    from self_judge.commands.compare import ComparisonJob, run_compare
    from self_judge.commands.judge_choice import JudgeChoice
    from self_judge.config.self_training import SamplingSettings

    job = _filled(
        ComparisonJob,
        arguments,
        policies=(arguments.policy_a, arguments.policy_b),
        columns=_columns(arguments),
        sampling=_filled(SamplingSettings, arguments),
    )
    judge = _filled(JudgeChoice, arguments, model=arguments.judge)
    run_compare(job, judge, arguments.output, **_bulk(arguments))
    _leave_process_group()


def _judge(arguments: argparse.Namespace) -> None:
    from self_judge.commands.judge import run_judge
    from self_judge.commands.judge_choice import JudgeChoice

    choice = _filled(JudgeChoice, arguments)
    own = {"field": arguments.field, "columns": _columns(arguments)}
    run_judge(arguments.input, arguments.output, choice, **own, **_bulk(arguments))
    _leave_process_group()


if __name__ == "__main__":
    sys.exit(main())

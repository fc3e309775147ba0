"""The `self-judge` command line: calls `commands` and reports errors.

Heavy modules are imported only when a command needs them, so that `--help` and usage errors appear
immediately.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from self_judge.config.arguments import JUDGING, OVERRIDES, Parser, command_parser, filled
from self_judge.config.inputs import check_inputs, check_names, check_run
from self_judge.console import StandardOutput, Terminal, masked, neutral, with_streams
from self_judge.errors import ConfigError

if TYPE_CHECKING:
    from self_judge.commands.init import InitJob
    from self_judge.config.schema import RunKind


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    For bad input, this function prints one line for each problem and returns 2.
    """
    return with_streams(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = command_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        _argcomplete().autocomplete(parser)
    arguments = parser.parse(argv)
    if arguments.completion:
        return _guarded(_print_completion, arguments, arguments.debug)
    if arguments.command is None:
        parser.print_help()
        return 0

    def run(arguments: argparse.Namespace) -> int | None:
        _check_inputs(arguments)
        return _RUN[arguments.command](arguments)

    return _guarded(run, arguments, arguments.debug)


def train_main(kind: RunKind, argv: Sequence[str] | None = None) -> int:
    """Implements `train_jsft.py` and `train_self_judge.py` (`--config=FILE key.path=value…`)."""
    parser = Parser(description=f"Start a {kind} run from a YAML file.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDES
    )

    def run() -> int:
        arguments = parser.parse_args(argv)
        arguments.kind = kind
        return _guarded(_train, arguments, arguments.debug)

    return with_streams(run)


def _guarded(
    run: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace, debug: bool
) -> int:
    try:
        status = run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        if debug or error is StandardOutput.problem:
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


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError as error:
        raise ImportError(
            "completion needs argcomplete: pip install 'self-judge[completion]'"
        ) from error
    return argcomplete


def _print_completion(arguments: argparse.Namespace) -> None:
    print(_argcomplete().shellcode(["self-judge"], shell=arguments.completion))


def _check_inputs(arguments: argparse.Namespace) -> None:
    check_inputs(vars(arguments))
    if vars(arguments).get("columns"):
        _columns(arguments)
    if arguments.command in ("init", "align"):
        _check_first_record(arguments)
    check_names(vars(arguments))


def _check_first_record(arguments: argparse.Namespace) -> None:
    """Finds data that cannot be read, and columns that it does not have, for new run files."""
    from self_judge.commands.align.stages import FILES
    from self_judge.data.files import read_raw

    begun = any((Path(arguments.folder) / name).exists() for name in FILES)
    if os.path.exists(arguments.data) and not begun:
        next(read_raw(arguments.data, columns=_columns(arguments)))


def _init_job(arguments: argparse.Namespace) -> InitJob:
    from self_judge.commands.init import InitJob

    ask = not arguments.yes and sys.stdin.isatty() and sys.stderr.isatty()
    columns = _columns(arguments)
    return filled(InitJob, arguments, folder=Path(arguments.folder), columns=columns, ask=ask)


def _init(arguments: argparse.Namespace) -> None:
    from self_judge.commands.align.stages import refuse_existing

    refuse_existing(Path(arguments.folder))  # before the slow import of torch

    from self_judge.commands.init import print_next, run_init

    job = _init_job(arguments)
    run_init(job)
    print_next(job.folder)


def _align(arguments: argparse.Namespace) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if os.environ.get("RANK", "0") != "0":
            return 2  # the first process says why
        raise ConfigError(
            "align starts its stages itself, training with one process per GPU: run self-judge "
            "align without a launcher, or launch the commands that self-judge init prints"
        )

    from self_judge.commands.align.run import run_align

    return run_align(_init_job(arguments), arguments.overrides)


def _demo(arguments: argparse.Namespace) -> None:
    from self_judge.commands.demo.run import run_demo

    run_demo(seed=arguments.seed, output=arguments.output)


def _train(arguments: argparse.Namespace) -> None:
    from self_judge.config.schema import load_run

    # Check the file before the slow import of torch, so that mistakes are reported immediately.
    said: list[str] = []
    if arguments.kind == "jsft":
        jsft = load_run(arguments.config, arguments.overrides, "jsft", said.append)
        check_run(jsft)
    else:
        self_judge = load_run(arguments.config, arguments.overrides, "self_judge", said.append)
        check_run(self_judge)

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
    if name == "__main__.py":
        start = ["python", "-m", "self_judge"]
    return shlex.join([*start, *kept, override])


def _check(arguments: argparse.Namespace) -> int:
    """Checks a run and returns the exit status: 1 if the run has problems, otherwise 0."""
    from self_judge.config.schema import kind_of_run, load_run

    # Check the file before the slow import of torch, so that mistakes are reported immediately.
    given: tuple[str, list[str]] = (arguments.config, arguments.overrides)
    said: list[str] = []
    check_run(load_run(*given, kind_of_run(*given), said.append))
    _say_lines(said)

    import logging

    from transformers.utils import logging as transformers_logging

    from self_judge.check.check import check
    from self_judge.check.view import show

    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    with Terminal(stderr=True).status("checking"):
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
        show(report, Terminal(color_system=None, highlight=False, width=100), plain=True)
    else:
        show(report, Terminal(highlight=False))
    return 1 if report.problems else 0


def _keys(arguments: argparse.Namespace) -> None:
    from self_judge.config.keys import described

    print(described(arguments.section))


def _schema(arguments: argparse.Namespace) -> None:
    from self_judge.config.keys import json_schema

    print(json.dumps(json_schema(), indent=1))


def _report(arguments: argparse.Namespace) -> None:
    from self_judge.reporting.collect import Limits
    from self_judge.reporting.page import write_report

    write_report(arguments.paths, arguments.output, Limits(pairs=arguments.pairs))


def _columns(arguments: argparse.Namespace) -> dict[str, str]:
    from self_judge.data.records import parse_columns

    return parse_columns(arguments.columns)


def _judging(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of `_add_judge` that are settings of a judge."""
    return {name: vars(arguments)[name] for name in JUDGING}


def _bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"chunk": arguments.chunk, "overwrite": arguments.overwrite}


def _tournament(arguments: argparse.Namespace) -> None:
    from self_judge.commands.tournament import TournamentJob, run_tournament
    from self_judge.config.self_training import SamplingSettings
    from self_judge.judging.choice import JudgeChoice

    judge = JudgeChoice.of(arguments.judge, **_judging(arguments))
    sampling = filled(SamplingSettings, arguments)
    job = filled(TournamentJob, arguments, judge=judge, sampling=sampling)
    columns = _columns(arguments)
    run_tournament(arguments.input, arguments.output, job, columns=columns, **_bulk(arguments))
    _leave_process_group()


def _eval(arguments: argparse.Namespace) -> None:
    from self_judge.commands.eval import JudgeEvaluation, compared_judge, run_eval
    from self_judge.data.benchmarks import BenchmarkSource
    from self_judge.judging.choice import JudgeChoice

    splits = tuple(name.strip() for name in arguments.split.split(",") if name.strip())
    own = {
        "splits": splits, "revision": arguments.data_revision, "columns": _columns(arguments)
    }  # fmt: skip
    sources = [filled(BenchmarkSource, arguments, path=path, **own) for path in arguments.data]
    asked = _judging(arguments)
    run_eval(
        JudgeChoice.of(arguments.judge, **asked),
        filled(JudgeEvaluation, arguments, sources=sources),
        arguments.output,
        compare=arguments.compare and compared_judge(arguments.compare, **asked),
        overwrite=arguments.overwrite,
    )
    _leave_process_group()


def _compare(arguments: argparse.Namespace) -> None:
    from self_judge.commands.compare import ComparisonJob, run_compare
    from self_judge.config.self_training import SamplingSettings
    from self_judge.judging.choice import JudgeChoice

    job = filled(
        ComparisonJob,
        arguments,
        policies=(arguments.policy_a, arguments.policy_b),
        columns=_columns(arguments),
        sampling=filled(SamplingSettings, arguments),
    )
    judge = JudgeChoice.of(arguments.judge, **_judging(arguments))
    run_compare(job, judge, arguments.output, **_bulk(arguments))
    _leave_process_group()


def _judge(arguments: argparse.Namespace) -> None:
    from self_judge.commands.judge import run_judge
    from self_judge.judging.choice import JudgeChoice

    choice = JudgeChoice.of(arguments.judge, **_judging(arguments))
    own = {"field": arguments.field, "columns": _columns(arguments)}
    run_judge(arguments.input, arguments.output, choice, **own, **_bulk(arguments))
    _leave_process_group()


def _serve(arguments: argparse.Namespace) -> None:
    from self_judge.judging.choice import JudgeChoice
    from self_judge.serving.command import ServeJob, run_serve

    run_serve(filled(JudgeChoice, arguments), filled(ServeJob, arguments))


_RUN: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "init": _init,
    "align": _align,
    "demo": _demo,
    "jsft": _train,
    "train": _train,
    "check": _check,
    "keys": _keys,
    "schema": _schema,
    "tournament": _tournament,
    "report": _report,
    "eval": _eval,
    "compare": _compare,
    "judge": _judge,
    "serve": _serve,
}


if __name__ == "__main__":
    sys.exit(main())

"""The command `self-judge`. Argument parsing and error lines only; the work is in `commands`.

Heavy imports wait until a command needs them, so that help and usage errors are instant.
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
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from self_judge import __version__
from self_judge.console import neutral

if TYPE_CHECKING:
    from self_judge.config.schema import RunKind

FilledT = TypeVar("FilledT")
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
PACKING = ("auto", "tree", "cache", "padding", "off")  # config.PackingChoice, not imported yet
_OVERRIDES = "any value of the file, as key.path=value"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status (2: bad input, told in one line)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes no positional argument after an option: overrides may stand there all the same.
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
    """What `train_jsft.py` and `train_self_judge.py` do: `--config=FILE key.path=value…`."""
    parser = argparse.ArgumentParser(description=f"Launches the {kind} run of a YAML file.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=_OVERRIDES)
    arguments = parser.parse_args(argv)
    arguments.kind = kind
    return _guarded(_train, arguments, arguments.debug)


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="self-judge",
        description="Align a language model with its own pairwise judgments (arXiv 2402.11253).",
    )
    parser.add_argument("--version", action="version", version=f"self-judge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="the whole method on a small synthetic world, in minutes on a CPU"
    )
    demo.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    demo.add_argument("--output", default="outputs/demo", metavar="DIR", help="where to write")
    demo.set_defaults(run=_demo)
    _add_runs(commands)
    _add_tournament(commands)
    report = commands.add_parser("report", help="what runs looked like, as one HTML page")
    add = report.add_argument
    add("paths", nargs="+", metavar="DIR",
        help="folder of a run, or of several; also files of tournaments and evaluations")
    add("-o", "--output", metavar="FILE", help="the page (default: report.html in the first DIR)")
    add("--pairs", type=int, default=400, help="sampled pairs on the page at most (default: 400)")
    report.set_defaults(run=_report)
    _add_evaluation(commands)
    return parser


def _add_runs(commands: Commands) -> None:
    """Training by a run file, and the check before it."""
    for name, kind, text in (
        ("jsft", "jsft", "judge-augmented supervised fine-tuning"),
        ("train", "self_judge", "on-policy self-training by self-judgment"),
        ("check", None,
         "what a run would train on and need, and what would go wrong, before it runs"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help=_OVERRIDES)
        command.set_defaults(run=_train if kind else _check, kind=kind)
    add = command.add_argument  # of check
    add("--examples", type=int, default=400, metavar="N",
        help="records to encode, evenly spread; all are read and counted (default: 400; 0: all)")
    add("--gpu", metavar="KIND",
        help="estimate for this kind, as h100 or a100-80gb (default: here)")
    add("--processes", type=int, metavar="N", help="estimate for so many processes")
    add("--sharding", choices=["none", "zero2", "zero3", "fsdp"],
        help="how processes spread what they hold, where the launcher's file says it")
    add("--plain", action="store_true", help="no colours: for logs")
    add("--json", action="store_true", help="everything as JSON, to standard output")


def _add_tournament(commands: Commands) -> None:
    tournament = commands.add_parser(
        "tournament", help="self-rejection: the best of N responses by knockout"
    )
    add = tournament.add_argument
    add("input", metavar="IN.jsonl", help="context + responses, or prompts")
    add("output", metavar="OUT.jsonl", help="one line per line of the input")
    add("--model", required=True, metavar="DIR", help="a model JSFT wrote")
    add("--policy", metavar="DIR", help="who samples for prompts (default: the judging model)")
    add("--n", type=int, default=16, help="responses to sample for a prompt (default: 16)")
    _add_sampling(tournament)
    add("--brackets", action="store_true", help="write the brackets as well")
    _add_bulk(tournament, "lines", 256)
    tournament.set_defaults(run=_tournament)


def _add_evaluation(commands: Commands) -> None:
    """How good a judge is, verdicts in bulk, how good a policy is."""
    evaluate = commands.add_parser("eval", help="how good a judge is, on labeled pairs")
    add = evaluate.add_argument
    add("data", nargs="+", metavar="DATA",
        help="LLMBar, PandaLM, HHH, MT-Bench votes, RewardBench, HH, or any preference data: Hub "
        "names, files or folders")
    add("--model", required=True, metavar="MODEL", help="the judge")
    add("--output", required=True, metavar="DIR", help="where to write")
    add("--compare", metavar="MODEL",
        help="another judge, or the --output of its evaluation: paired differences")
    add("--split", default="test", metavar="NAME[,NAME…]", help="of Hub data (default: test)")
    add("--data-dir", metavar="DIR", help="a folder inside the data")
    add("--name", help="the configuration of Hub data")
    add("--data-revision", metavar="REV", help="of Hub data")
    add("--max-pairs", type=int, metavar="N", help="the first N of each source")
    _add_judge(evaluate)
    evaluate.set_defaults(run=_eval)

    compare = commands.add_parser("compare", help="which of two policies answers better")
    add = compare.add_argument
    for name in ("policy_a", "policy_b"):
        add(name, metavar=name.upper(), help="a model that samples, or a file of responses")
    add("--prompts", metavar="FILE", help="prompts to answer")
    add("--judge", required=True, metavar="MODEL", help="who decides")
    add("--output", required=True, metavar="DIR", help="where to write")
    add("--max-prompts", type=int, metavar="N", help="the first N")
    add("--sampling-batch-size", type=int, default=32, metavar="N",
        help="responses at a time (default: 32)")
    _add_sampling(compare)
    _add_judge(compare)
    compare.set_defaults(run=_compare)

    judge = commands.add_parser("judge", help="verdicts on pairs, in bulk")
    add = judge.add_argument
    add("input", metavar="IN.jsonl", help="context or prompt, response_a, response_b")
    add("output", metavar="OUT.jsonl", help="one line per line of the input")
    add("--model", required=True, metavar="MODEL", help="the judge")
    add("--field", default="verdict", help="where the verdict stands in a line")
    _add_judge(judge)
    judge.set_defaults(run=_judge)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=768)
    add("--temperature", type=float, default=1.0)
    add("--top-p", type=float, default=0.9)
    add("--seed", type=int, default=0, help="of all that is drawn (default: 0)")


def _add_judge(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--templates", metavar="FILE",
        help="YAML with judge templates, for a model that has no judge.json, or instead of it")
    add("--dtype", default="auto", help="of the weights (default: as saved)")
    add("--packing", default="auto", choices=PACKING, help="how prompts share prefixes")
    add("--revision", metavar="REV", help="of a model on the Hub")
    add("--trust-remote-code", action="store_true")
    _add_bulk(command, "pairs", 64)


def _add_bulk(command: argparse.ArgumentParser, things: str, chunk: int) -> None:
    """What every command takes that judges much into a file which an interruption does not lose."""
    add = command.add_argument
    add("--batch-size", type=int, default=8, metavar="N",
        help="prompts per pass where they are not packed (default: 8)")
    add("--max-length", type=int, metavar="N", help="tokens of a judge prompt at most")
    add("--vllm-server", dest="servers", nargs="+", default=(), metavar="URL",
        help="replicas of `vllm serve MODEL` that compute, in place of this process")
    add("--chunk", type=int, default=chunk, metavar="N",
        help=f"{things} between two writes to disk (default: {chunk})")
    add("--overwrite", action="store_true", help="start over, do not resume")


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
        # What is wrong is often quoted from a file.
        text = neutral(" ".join(str(error).split())) or type(error).__name__
        print(f"self-judge: error: {text}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # not the user's input: the training itself went wrong
        if debug:
            raise
        print(f"self-judge: stopped: {error}", file=sys.stderr)
        return 1
    return status or 0


def _demo(arguments: argparse.Namespace) -> None:
    from self_judge.commands.demo import run_demo

    run_demo(seed=arguments.seed, output=arguments.output)


def _train(arguments: argparse.Namespace) -> None:
    from self_judge.config.schema import load_run

    # Checked before torch is imported, so that a mistake in the file shows at once.
    if arguments.kind == "jsft":
        jsft = load_run(arguments.config, arguments.overrides, "jsft")
    else:
        self_judge = load_run(arguments.config, arguments.overrides, "self_judge")

    import torch
    from accelerate import PartialState

    from self_judge.config.hardware import launch_over_gpus

    command = launch_over_gpus(sys.argv, torch.cuda.device_count())
    if command is not None:
        sys.stderr.write(f"one process per GPU: {' '.join(command)}\n")
        sys.stderr.flush()
        os.execv(command[0], command)

    from self_judge.commands import train

    try:
        if arguments.kind == "jsft":
            train.run_jsft(jsft)
        else:
            train.run_self_judge(self_judge)
    except train.TrainingStopped as stopped:
        # For whoever is pre-empted that is the end of a good run.
        if PartialState().is_main_process:
            print(f"{stopped}\ngo on with: {_resuming(sys.argv)}", file=sys.stderr)
    _leave_the_others()


def _leave_the_others() -> None:
    """Ends what binds the processes of a launch, at the end of work that they shared.

    NCCL complains of a group that is left behind, and gloo's threads may abort the interpreter.
    """
    from accelerate import PartialState

    # DDP's reducer must not outlive the group's threads, so the trainer goes first.
    gc.collect()
    PartialState().destroy_process_group()


def _resuming(argv: Sequence[str]) -> str:
    """The command that resumes a run."""
    override = "training_args.resume_from_checkpoint=true"
    kept = [a for a in argv[1:] if not a.startswith("training_args.resume_from_checkpoint=")]
    name = os.path.basename(argv[0])
    start = ["python", argv[0]] if name.endswith(".py") else [name]
    return shlex.join([*start, *kept, override])


def _check(arguments: argparse.Namespace) -> int:
    """Exit status 1 where the run would go wrong."""
    from self_judge.config.schema import kind_of_run, load_run

    # A mistake in the file shows before torch is imported.
    load_run(
        arguments.config, arguments.overrides, kind_of_run(arguments.config, arguments.overrides)
    )

    import logging
    import warnings

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from self_judge.check.check import check
    from self_judge.check.view import show

    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' own
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
        # ASCII alone; of it, JSON leaves one control character as it is.
        print(json.dumps(report.to_dict(), indent=2).replace("\x7f", "\\u007f"))
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
    """A dataclass whose fields are the command-line values of the same names, or given here."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in {**vars(arguments), **given}.items() if k in names})


def _bulk(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"chunk": arguments.chunk, "overwrite": arguments.overwrite}


def _tournament(arguments: argparse.Namespace) -> None:
    from self_judge.commands.tournament import TournamentJob, run_tournament
    from self_judge.config.self_training import SamplingSettings

    job = _filled(TournamentJob, arguments, sampling=_filled(SamplingSettings, arguments))
    run_tournament(arguments.input, arguments.output, job, **_bulk(arguments))
    _leave_the_others()


def _eval(arguments: argparse.Namespace) -> None:
    from self_judge.commands.eval import JudgeEvaluation, compared_judge, run_eval
    from self_judge.commands.judge_choice import JudgeChoice
    from self_judge.data.benchmarks import BenchmarkSource

    splits = tuple(name.strip() for name in arguments.split.split(",") if name.strip())
    sources = [
        _filled(
            BenchmarkSource, arguments, path=path, splits=splits, revision=arguments.data_revision
        )
        for path in arguments.data
    ]
    choice = _filled(JudgeChoice, arguments)
    run_eval(
        choice,
        _filled(JudgeEvaluation, arguments, sources=sources),
        arguments.output,
        compare=arguments.compare and compared_judge(choice, arguments.compare),
        overwrite=arguments.overwrite,
    )
    _leave_the_others()


def _compare(arguments: argparse.Namespace) -> None:
    from self_judge.commands.compare import ComparisonJob, run_compare
    from self_judge.commands.judge_choice import JudgeChoice
    from self_judge.config.self_training import SamplingSettings

    job = _filled(
        ComparisonJob,
        arguments,
        policies=(arguments.policy_a, arguments.policy_b),
        sampling=_filled(SamplingSettings, arguments),
    )
    judge = _filled(JudgeChoice, arguments, model=arguments.judge)
    run_compare(job, judge, arguments.output, **_bulk(arguments))
    _leave_the_others()


def _judge(arguments: argparse.Namespace) -> None:
    from self_judge.commands.judge import run_judge
    from self_judge.commands.judge_choice import JudgeChoice

    choice = _filled(JudgeChoice, arguments)
    run_judge(arguments.input, arguments.output, choice, field=arguments.field, **_bulk(arguments))
    _leave_the_others()


if __name__ == "__main__":
    sys.exit(main())

"""Defines the arguments of the `self-judge` command.

`cli.py` runs the commands. This module imports neither the commands nor torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeAlias, TypeVar

from self_judge import __version__
from self_judge.console import neutral

FilledT = TypeVar("FilledT")
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
PACKING = ("auto", "tree", "cache", "padding", "off")  # must equal PackingChoice
CONFIG = "the run's YAML file, or the name of a shipped file, such as hh_jsft"
JUDGE = "the judge: a model, or a YAML file or {key: value} with the keys of self_judge_args.judge"
# The options of `_add_judge` that are settings of a judge.
JUDGING = (
    *("templates", "dtype", "packing", "revision", "trust_remote_code", "batch_size"),
    *("max_length", "server"),
)
OVERRIDES = "override any value in the run file: key.path=value"
# The sections of run files.
_SECTIONS = (
    *("model", "dataset", "templates", "peft_config"),
    *("jsft_args", "self_judge_args", "training_args"),
)


_EXAMPLES = """\
examples:
  self-judge {command} {file}
  self-judge {command} {file} {override}
  self-judge check {file}    # shows the data and the cost

`self-judge keys` lists the keys of run files.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest names and mask secrets, since they quote arguments."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses the arguments of the command. Overrides may also follow an option."""
        arguments, rest = self.parse_known_args(argv)
        if rest and (
            "overrides" not in arguments or any(r.startswith("-") or "=" not in r for r in rest)
        ):
            message = f"unrecognized arguments: {' '.join(rest)}"
            self.error(f"{message}{_meant(rest, arguments.parser.format_help())}")
        if "overrides" in arguments:
            arguments.overrides += rest
            _move_overrides(arguments)
        return arguments

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)$", message)
        if choice:
            found = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
            message += f"; did you mean {found[0]}?" if found else ""
        elif "required" in message:
            message += _meant(self._given, self.format_help())
        super().error(neutral(message))


def _move_overrides(arguments: argparse.Namespace) -> None:
    """Moves overrides that follow an option with several values to the overrides."""
    for name in ("columns", "principles"):
        given = getattr(arguments, name, ())
        moved = [value for value in given if _is_override(value)]
        if moved:
            setattr(arguments, name, [value for value in given if value not in moved])
            arguments.overrides += moved


def _is_override(value: str) -> bool:
    key, equals, _ = value.partition("=")
    return bool(equals) and key.partition(".")[0] in _SECTIONS


def _meant(arguments: Iterable[str], text: str) -> str:
    """Suggests options in a help text for the first argument that resembles one of them."""
    known = set(re.findall(r"--[a-z][\w-]*", text))
    for given in (a.partition("=")[0] for a in arguments if a.startswith("--")):
        if not any(option.startswith(given) for option in known):
            found = difflib.get_close_matches(given, known, n=1)
            return f"; did you mean {found[0]} instead of {given}?" if found else ""
    return ""


# fmt: off
def command_parser() -> Parser:
    """Returns the parser of the `self-judge` command, with a subparser for each subcommand."""
    parser = Parser(
        prog="self-judge",
        description="Align a language model with its own pairwise judgments (arXiv 2402.11253).",
    )
    parser.add_argument("--version", action="version", version=f"self-judge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    parser.add_argument("--completion", choices=["bash", "zsh", "fish"],
        help="print a script that completes commands and options in this shell")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="run the whole method in a small synthetic world (takes minutes on a CPU)"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.add_argument("--output", default="outputs/demo", metavar="DIR", help="output folder")
    _add_init(commands)
    _add_runs(commands)
    _add_keys(commands)
    _add_tournament(commands)
    report = commands.add_parser("report", help="write an HTML page with the results of runs")
    add = report.add_argument
    add("paths", nargs="+", metavar="DIR",
        help="a run, a folder of runs, or the output of tournament --brackets, eval or compare")
    add("-o", "--output", metavar="FILE", help="HTML page (default: report.html in the first DIR)")
    add("--pairs", type=int, default=400, help="maximum number of pairs on the page (default: 400)")
    _add_evaluation(commands)
    _add_serve(commands)
    parser.set_defaults(parser=parser)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
            help="show a traceback on errors")
    return parser


def _add_init(commands: Commands) -> None:
    init = commands.add_parser("init", help="write run files for your model and data")
    init.add_argument("folder", metavar="DIR", help="folder for the files and the runs")
    align = commands.add_parser(
        "align", help="run the whole method on your model and data; resumes where it stopped"
    )
    align.add_argument("overrides", nargs="*", default=[], metavar="key.path=value",
        help="override any value in the run files that have this section")
    align.add_argument("--output", required=True, metavar="DIR", dest="folder",
        help="folder for the run files, the runs and the report")
    for command in (init, align):
        add = command.add_argument
        add("--model", required=True, metavar="MODEL", help="a folder, or a model ID on the Hub")
        add("--data", required=True, metavar="DATA",
            help="preference data: a file, a folder, or a dataset ID on the Hub")
        _add_columns(command)
        add("--principles", nargs="+", default=(), metavar="NAME",
            help="what to judge by, from the shipped templates (default: overall)")
        add("--yes", action="store_true", help="do not ask; take the defaults")


def _add_runs(commands: Commands) -> None:
    """Adds the commands that read a run file: `jsft`, `train` and `check`."""
    for name, kind, text in (
        ("jsft", "jsft", "judge-augmented supervised fine-tuning"),
        ("train", "self_judge", "on-policy self-training by self-judgment"),
        ("check", None, "show the data and cost of a run, and find problems before the run starts"),
    ):
        examples = {"jsft": ("hh_jsft", "training_args.learning_rate=1e-5"),
                    "train": ("hh_self_judge", "self_judge_args.beta=0.05")}.get(name)
        command = commands.add_parser(
            name,
            help=text,
            epilog=examples and _EXAMPLES.format(
                command=name, file=examples[0], override=examples[1]
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("config", metavar="CONFIG", help=CONFIG)
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDES
        )
        command.set_defaults(kind=kind)
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


def _add_keys(commands: Commands) -> None:
    """Adds the commands that describe run files."""
    keys = commands.add_parser("keys", help="list the keys of run files with their defaults")
    keys.add_argument("section", nargs="?", default="", metavar="SECTION",
        help="a section, such as jsft_args or training_args, the start of a key, or its last name")
    commands.add_parser("schema", help="print a JSON schema of run files, for editors")


def _add_tournament(commands: Commands) -> None:
    tournament = commands.add_parser(
        "tournament", help="pick the best of N responses in a knockout (self-rejection)"
    )
    add = tournament.add_argument
    add("input", metavar="IN", help="file of contexts and responses, or prompts")
    add("output", metavar="OUT.jsonl", help="output file, with one line per record")
    add("--judge", "--model", dest="judge", required=True, metavar="JUDGE", help=JUDGE)
    add("--policy", metavar="DIR", help="model that samples responses (default: the judge)")
    add("--n", type=int, default=16, help="number of responses to sample per prompt (default: 16)")
    add("--max-prompts", type=int, metavar="N", help="use the first N prompts")
    add("--prior", type=float, default=0.0, metavar="WEIGHT",
        help="add WEIGHT times the judge model's mean log probability per token to its log odds, "
        "which keeps its mistakes from winning among many responses (default: 0; the demo: 5)")
    _add_sampling(tournament)
    _add_columns(tournament)
    add("--brackets", action="store_true", help="also write each tournament's bracket")
    _add_judge(tournament, "lines", 256)


def _add_evaluation(commands: Commands) -> None:
    """Adds the commands `eval`, `compare` and `judge`."""
    evaluate = commands.add_parser("eval", help="evaluate a judge on labeled pairs")
    add = evaluate.add_argument
    add("data", nargs="+", metavar="DATA",
        help="LLMBar, PandaLM, HHH, JudgeBench, RM-Bench, RewardBench (2), MT-Bench or "
        "arena votes, HH, or any preference data, as files, folders or dataset IDs on the Hub")
    add("--judge", "--model", dest="judge", required=True, metavar="JUDGE", help=JUDGE)
    add("--output", required=True, metavar="DIR", help="output folder")
    add("--compare", metavar="JUDGE",
        help="judge to compare with, or the --output folder of its evaluation")
    add("--split", default="test", metavar="NAME[,NAME…]", help="dataset splits (default: test)")
    add("--data-dir", metavar="DIR", help="subfolder of DATA")
    add("--name", help="configuration name of a Hub dataset")
    add("--data-revision", metavar="REV", help="revision of a Hub dataset")
    add("--held-out", type=float, default=0.0, metavar="F",
        help="only the records that training holds out with dataset.held_out F")
    add("--max-pairs", type=int, metavar="N",
        help="use at most N pairs from each source, spread over its subsets")
    _add_columns(evaluate)
    _add_judge(evaluate)

    compare = commands.add_parser("compare", help="compare the answers of two policies")
    add = compare.add_argument
    for name in ("policy_a", "policy_b"):
        add(name, metavar=name.upper(), help="a model to sample from, or a file of responses")
    add("--prompts", metavar="FILE", help="file of prompts to answer")
    add("--judge", required=True, metavar="JUDGE", help=JUDGE)
    add("--output", required=True, metavar="DIR", help="output folder")
    add("--max-prompts", type=int, metavar="N", help="use the first N prompts")
    _add_columns(compare)
    add("--sampling-batch-size", type=int, default=32, metavar="N",
        help="number of responses sampled at once (default: 32)")
    _add_sampling(compare)
    _add_judge(compare)

    judge = commands.add_parser("judge", help="judge pairs of responses in bulk")
    add = judge.add_argument
    add("input", metavar="IN", help="file with a context or prompt and two responses per record")
    add("output", metavar="OUT.jsonl", help="output file, with one line per record")
    add("--judge", "--model", dest="judge", required=True, metavar="JUDGE", help=JUDGE)
    add("--field", default="verdict", help="key of the verdict in an output line")
    _add_columns(judge)
    _add_judge(judge)


def filled(kind: type[FilledT], arguments: argparse.Namespace, **given: Any) -> FilledT:
    """Creates a dataclass instance from command-line arguments. `given` takes precedence."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in {**vars(arguments), **given}.items() if k in names})


def _add_serve(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", help="answer OpenAI's API by one sample, or by the best of N (self-rejection)"
    )
    add = serve.add_argument
    add("model", metavar="MODEL", help="the judge")
    add("--policy", metavar="DIR", help="model that samples responses (default: the judge)")
    add("--host", default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1; any other needs a key)")
    add("--port", type=int, default=8000, help="port to listen at (default: 8000; 0: any free one)")
    add("--api-key", metavar="KEY",
        help="key that requests must have (better: the environment variable SELF_JUDGE_API_KEY)")
    add("--max-n", type=int, default=16, metavar="N",
        help="maximum number of responses per request (default: 16)")
    add("--max-concurrency", type=int, default=64, metavar="N",
        help="number of requests in work at the same time (default: 64)")
    add("--queue", type=int, default=256, metavar="N",
        help="number of requests that wait; further ones get status 429 (default: 256)")
    add("--deadline", type=float, default=600.0, metavar="SECONDS",
        help="maximum time per request (default: 600)")
    _add_model(serve)


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
    """Adds the options of the commands in which a judge reads a file."""
    _add_model(command)
    add = command.add_argument
    add("--chunk", type=int, default=chunk, metavar="N",
        help=f"number of {things} per write to disk (default: {chunk})")
    add("--overwrite", action="store_true", help="start from scratch instead of resuming")


def _add_model(command: argparse.ArgumentParser) -> None:
    """Adds the options that all commands with a judge share."""
    add = command.add_argument
    add("--templates", metavar="FILE",
        help="YAML file with judge templates that replace those in judge.json, if any; or a "
        "shipped file by name: instructions, hh, uf or uf_principles")
    add("--dtype", default="auto", help="dtype of the weights (default: as saved)")
    add("--packing", default="auto", choices=PACKING, help="how prompts share prefixes")
    add("--revision", metavar="REV", help="revision of a Hub model")
    add("--trust-remote-code", action="store_true")
    add("--batch-size", type=int, default=8, metavar="N",
        help="prompts per forward pass without packing (default: 8)")
    add("--max-length", type=int, metavar="N", help="maximum number of tokens in a judge prompt")
    add("--vllm-server", dest="server", nargs="+", metavar="URL",
        help="URLs of `vllm serve MODEL` replicas that run the model instead of this process")

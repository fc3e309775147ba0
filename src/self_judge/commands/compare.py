"""`self-judge compare` lets a judge compare the answers of two policies to the same prompts.

Each step writes a file from which an interrupted run resumes. Other modules implement sampling,
judging and statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from self_judge import __version__
from self_judge.adapters import fingerprint
from self_judge.commands.judge import CHUNK, Item, judge_in_bulk
from self_judge.commands.policies import check_prompt, encoder_of, load_sampler
from self_judge.commands.resumable import RankShards, ResumableJob, Work
from self_judge.config.self_training import SamplingSettings
from self_judge.console import (
    NumberTable,
    Terminal,
    ends,
    masked,
    number,
    print_conclusions,
    say,
    table,
)
from self_judge.data.files import read_records, reader_of
from self_judge.data.records import UnusedText, map_columns, prompt_columns
from self_judge.data.sources import prompt_of, read_prompts
from self_judge.datatypes import Comparison, Message, Verdict, stable_seed
from self_judge.evaluation.conclusions import as_json, comparison_conclusions
from self_judge.evaluation.judge_metrics import estimate_json
from self_judge.evaluation.statistics import (
    bootstrap_counts,
    bootstrap_mean,
    length_controlled_win_rate,
    proportion,
    with_width,
)
from self_judge.judging.choice import JudgeChoice, date_of
from self_judge.judging.voting import verdict_from_json
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.prompting.judge_templates import dialogue_text
from self_judge.prompting.thoughts import answer_of
from self_judge.reporting.page import report_on
from self_judge.storage.atomic import write_json
from self_judge.storage.jsonl import entries_of, read_journal
from self_judge.storage.repository import refuse_overwriting
from self_judge.storage.run_dir import PAIRS, RESULTS, VERDICTS

_RESPONSE_FIELDS = ("response", "output")


@dataclass(frozen=True)
class ComparisonJob:
    """Two policies and the prompts to compare them on.

    Args:
        policies: two policies, each a model to sample from (a folder or a model ID on the Hub) or a
            file of responses.
        prompts: a file of prompts; optional if a file of responses includes prompts.
        sampling: sampling parameters for a model.
        seed: sampling seed; each policy samples with different seeds derived from it.
        sampling_batch_size: number of responses sampled at a time.
        max_prompts: the number of prompts to use, from the start of the file; default: all.
        columns: the files' own column names; see `map_columns`.

    Raises:
        ValueError: a number is below 1.
    """

    policies: tuple[str, str]
    prompts: str | None
    sampling: SamplingSettings
    seed: int = 0
    sampling_batch_size: int = 32
    max_prompts: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_prompts", "sampling_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")

    def read(self, console: Console) -> list[list[Message]]:
        """Reads the prompts, and prints the names of unused columns with text.

        Raises:
            ValueError: there are no prompts, or they cannot be used.
        """
        path = self.source
        columns = {k: v for k, v in self.columns.items() if k not in _RESPONSE_FIELDS}
        # `_read_responses` reports the columns of files of responses.
        unused = UnusedText(path, prompt_columns, partial(say, console)) if self.prompts else None
        prompts = read_prompts(path, max_records=self.max_prompts, columns=columns, unused=unused)
        if not prompts:
            raise ValueError(f"{self.source}: there are no prompts")
        return prompts

    @property
    def source(self) -> str:
        """The source of the prompts."""
        path = self.prompts or next((p for p in self.policies if is_responses(p)), None)
        if path is None:
            raise ValueError("no prompts to answer: pass --prompts FILE")
        return path


def is_responses(policy: str) -> bool:
    """Returns whether a policy is a file of responses rather than a model."""
    return Path(policy).is_file() or reader_of(Path(policy)) is not None


def run_compare(
    job: ComparisonJob,
    judge: JudgeChoice,
    output: str | Path,
    *,
    chunk: int = CHUNK,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compares two policies and returns the contents of `output/results.json`.

    The function writes the pairs with their verdicts to `output/pairs.jsonl`, and sampled responses
    to `output/responses_a.jsonl` and `responses_b.jsonl`. Under `accelerate launch`, the processes
    divide the sampling and the judging among themselves.

    Raises:
        ValueError: a model, the prompts or the responses cannot be used, or `output` contains
            another comparison.
    """
    output, console = Path(output), console or Terminal()
    prompts = job.read(console)
    files = [
        Path(policy) if is_responses(policy) else output / f"responses_{side}.jsonl"
        for policy, side in zip(job.policies, "ab", strict=True)
    ]
    given = list(filter(is_responses, [*job.policies, *filter(None, [job.prompts])]))
    sampled = [f for f, policy in zip(files, job.policies, strict=True) if not is_responses(policy)]
    refuse_overwriting([output / RESULTS, output / PAIRS, *sampled], given)
    if (output / VERDICTS).exists():
        raise ValueError(f"{output} contains a judge evaluation: choose another output folder")
    for policy in filter(is_responses, job.policies):
        unused = UnusedText(policy, _used, partial(say, console))
        whole = job.max_prompts is None
        _read_responses(
            Path(policy), prompts, job.columns, unused, whole
        )  # find mistakes before sampling
    encoders = {policy: encoder_of(policy) for policy in job.policies if not is_responses(policy)}
    for (where, _), prompt in zip(read_records(job.source), prompts, strict=False):
        for encoder in encoders.values():
            check_prompt(encoder, prompt, where)
    for policy, side, file in zip(job.policies, "ab", files, strict=True):
        if policy in encoders:
            _sample(policy, encoders[policy], side, job, prompts, file, overwrite)
    responses = [
        _read_responses(file, prompts, job.columns if is_responses(policy) else {})
        for policy, file in zip(job.policies, files, strict=True)
    ]

    def items() -> Iterator[Item]:
        for index, (prompt, a, b) in enumerate(zip(prompts, *responses, strict=True)):
            line = {
                "index": index,
                "prompt": list(prompt),
                "response_a": a["text"],
                "response_b": b["text"],
                "finished": [a["finished"], b["finished"]],
            }
            yield Item(Comparison(dialogue_text(prompt), a["text"], b["text"]), line)

    judge_in_bulk(
        items,
        output / PAIRS,
        judge,
        {"policies": list(job.policies)},
        chunk=chunk,
        overwrite=overwrite,
    )
    return RankShards.here(output / PAIRS, chunk).agreed(
        lambda: _results(job, judge, output, console)
    )


def _results(
    job: ComparisonJob, judge: JudgeChoice, output: Path, console: Console
) -> dict[str, Any]:
    """Writes and prints the results."""
    results: dict[str, Any] = {
        "kind": "policy comparison",
        "version": __version__,
        "policies": list(job.policies),
        "judge": judge.settings(),
        "sampling": {**asdict(job.sampling), "seed": job.seed},
        **outcome(output / PAIRS, job.seed),
    }
    results["conclusions"] = as_json(comparison_conclusions(results))
    write_json(output / RESULTS, masked(results))
    console.print(_table(results))
    for reason, count in results["undecidable_because"].items():
        say(console, f"undecidable, {reason}: {count:,}")
    print_conclusions(console, results["conclusions"])
    say(console, f"written to {output}: {RESULTS}, {PAIRS}")
    report_on(output / RESULTS, console)
    return results


def _sample(
    policy: str,
    encoder: ChatEncoder,
    side: str,
    job: ComparisonJob,
    prompts: Sequence[Sequence[Message]],
    file: Path,
    overwrite: bool,
) -> None:
    def load() -> Work[tuple[int, Sequence[Message]]]:
        sampler = load_sampler(policy, encoder, job.sampling, job.sampling_batch_size)

        def answered(batch: list[tuple[int, Sequence[Message]]]) -> list[dict[str, Any]]:
            ids = [sampler.encoder.encode_prompt(prompt) for _, prompt in batch]
            seeds = [stable_seed(job.seed, side, index) for index, _ in batch]
            sampled = sampler.sample(ids, 1, seeds)
            return [
                {"prompt": list(prompt), "response": answer.judged, "finished": answer.finished}
                for (_, prompt), (answer,) in zip(batch, sampled, strict=True)
            ]

        return answered

    answers = ResumableJob(
        lambda: enumerate(prompts),
        file,
        {
            "policy": policy,
            "weights": fingerprint(policy),
            **date_of(encoder),
            **asdict(job.sampling),
            "seed": job.seed,
        },
        lambda line, wanted: line["prompt"] == wanted[1],
        mismatch="it answers a different prompt",
        title=f"{side} answers",
        things="responses",
        chunk=job.sampling_batch_size,
        may_be_longer=True,  # an answer does not depend on the number of prompts
    )
    answers.run(load, overwrite=overwrite)


def _response_field(line: Mapping[str, Any]) -> str:
    return next((name for name in _RESPONSE_FIELDS if name in line), _RESPONSE_FIELDS[0])


def _used(line: Mapping[str, Any]) -> list[str]:
    return [*prompt_columns(line), _response_field(line)]


def _read_responses(
    file: Path,
    prompts: Sequence[Sequence[Message]],
    columns: Mapping[str, str],
    unused: UnusedText | None = None,
    whole: bool = False,
) -> list[dict[str, Any]]:
    """Reads `{"text", "finished"}` for each prompt, and checks any prompts in the file.

    Args:
        whole: whether to refuse a file with more responses than there are prompts.
    """
    found: list[dict[str, Any]] = []
    for where, raw in read_records(str(file)):
        if len(found) == len(prompts):
            if whole:
                more = f"more than {len(prompts):,} responses for {len(prompts):,} prompts"
                raise where.error("response", f"{more}: give the prompts of this file")
            break
        # A file of responses may lack the prompts, and its columns may have the usual names.
        unnamed = not any(name in raw for name in _RESPONSE_FIELDS)
        own = {k: v for k, v in columns.items() if v in raw or (k == "response" and unnamed)}
        line = map_columns(raw, own, where)
        if unused is not None:
            unused.add(line)
        text = where.text(line, _response_field(line))
        prompt = prompt_of(line, where)
        if prompt is not None and prompt != list(prompts[where.index]):
            raise where.error("prompt", "differs from the prompt at the same index")
        finished = line.get("finished")
        if finished is not None and not isinstance(finished, bool):
            raise where.expected("true, false or null", finished, "finished")
        found.append({"text": text, "finished": finished})
    if unused is not None:
        unused.report()
    if len(found) < len(prompts):
        raise ValueError(f"{file}: {len(found):,} responses for {len(prompts):,} prompts")
    return found


def outcome(pairs: Path, seed: int = 0) -> dict[str, Any]:
    """Computes win rates of policy a over policy b from judged pairs, as JSON data."""
    plain: list[float] = []
    consistent: Counter[float] = Counter()
    lengths: list[tuple[int, int]] = []
    finished: tuple[list[bool], list[bool]] = ([], [])
    reasons: Counter[str] = Counter()
    agree = judged = 0
    for line in read_journal(pairs):
        with entries_of(pairs, remedy=": the file was changed or damaged: pass --overwrite"):
            verdict, ends_of = verdict_from_json(line["verdict"]), line["finished"]
            a, b = (len(answer_of(line[f"response_{side}"]) or "") for side in "ab")
        plain.append(_win(verdict))
        consistent[_win(verdict) if verdict.orders_agree else 0.5] += 1
        lengths.append((a, b))
        agree += verdict.orders_agree
        judged += verdict.is_judged
        reasons.update(filter(None, [verdict.undecidable_because]))
        for kept, ended in zip(finished, ends_of, strict=True):
            if ended is not None:
                kept.append(ended)
    differences = [a - b for a, b in lengths]
    controlled = length_controlled_win_rate(plain, differences, seed)
    longer = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)
    return {
        "prompts": len(plain),
        "win_rate": estimate_json(with_width(bootstrap_mean(plain, seed))),
        "wins": plain.count(1.0),
        "ties": plain.count(0.5),
        "losses": plain.count(0.0),
        "length_controlled_win_rate": {
            **estimate_json(controlled.win_rate),
            "slope": controlled.slope,
            "characters_sd": controlled.scale,
        },
        "both_orders": {
            "win_rate": estimate_json(with_width(bootstrap_counts(consistent, seed))),
            "wins": consistent[1.0],
            "ties": consistent[0.5],
            "losses": consistent[0.0],
        },
        "longer_wins_all": estimate_json(proportion(longer, len(plain))),
        "order_agreement": estimate_json(proportion(agree, judged or len(plain))),
        "undecidable": reasons.total() / len(plain),
        "undecidable_because": dict(reasons),
        "characters": {
            side: estimate_json(bootstrap_mean([pair[k] for pair in lengths], seed))
            for k, side in enumerate("ab")
        },
        "finished": {
            side: estimate_json(proportion(sum(kept), len(kept))) if kept else None
            for side, kept in zip("ab", finished, strict=True)
        },
    }


def _win(verdict: Verdict) -> float:
    return {"a": 1.0, "b": 0.0, None: 0.5}[verdict.preferred]


def _table(results: Mapping[str, Any]) -> NumberTable:
    a, b = results["policies"]
    both = results["both_orders"]

    def row(name: str, e: Mapping[str, Any], digits: int = 3) -> tuple[str, ...]:
        return name, number(e["value"], digits), ends(e, digits)

    def counts(of: Mapping[str, Any]) -> str:
        return f"{of['wins']} / {of['ties']} / {of['losses']}"

    return table(
        f"a: {a}\nb: {b}\njudge: {results['judge']['model']}, {results['prompts']:,} prompts",
        ("", "value", "95% interval", "wins / ties / losses"),
        [
            (*row("win rate of a", results["win_rate"]), counts(results)),
            row("win rate of a, length-controlled", results["length_controlled_win_rate"]),
            (*row("win rate of a, tie if orders disagree", both["win_rate"]), counts(both)),
            row("win rate of a, if longer answers always won", results["longer_wins_all"]),
            None,
            row("orders agree", results["order_agreement"]),
            ("undecidable", number(results["undecidable"])),
            None,
            *(row(f"characters, {side}", results["characters"][side], 0) for side in "ab"),
            *(
                row(f"ended by itself, {side}", ended)
                for side, ended in results["finished"].items()
                if ended
            ),
        ],
    )

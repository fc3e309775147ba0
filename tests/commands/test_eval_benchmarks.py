"""`self-judge eval` on benchmarks with metrics of their own, in the shape the Hub has them.

The expected numbers come from the definitions that the benchmarks publish, written down here once
more for a judge with a score for each response.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from conftest import TEMPLATES
from report_pages import embedded
from self_judge import Comparison, Verdict
from self_judge.cli import main
from self_judge.judging.choice import JudgeChoice
from self_judge.judging.voting import aggregate

Records = list[dict[str, Any]]
Eval = Callable[..., Any]


class Scored:
    """A judge who reads a response's score from its first word, and may favor the first place."""

    bias = 0.0
    thought_tokens = 0

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [aggregate([self.orders(c)] * len(TEMPLATES)) for c in comparisons]

    def orders(self, c: Comparison) -> Any:
        margin = score(c.response_a) - score(c.response_b)
        first, second = ((m + self.bias) / 2 for m in (margin, -margin))
        return (0.5 + first, 0.5 - first), (0.5 + second, 0.5 - second)


class Biased(Scored):
    """A judge for whom the first place is worth 0.1."""

    bias = 0.1


def score(text: str) -> float:
    return int(text.split()[0]) / 1024  # exact in binary


def response(generator: random.Random, *, among: int = 200) -> str:
    return f"{generator.randrange(among)} points, {generator.random()}"


@pytest.fixture
def evaluated(saved_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Eval:
    """Runs the command on a path and returns its results."""

    def run(path: Path, *options: str, judge: type[Scored] = Scored) -> Any:
        monkeypatch.setattr(JudgeChoice, "load", lambda self: judge())
        output = tmp_path / "out"
        command = ["eval", str(path), "--model", str(saved_judge), "--output", str(output)]
        assert main([*command, "--overwrite", *options]) == 0
        return json.loads((output / "results.json").read_text())

    return run


def jsonl(path: Path, records: Records) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def parquet(path: Path, records: Records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def values(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in metrics.items()}


# -- JudgeBench -----------------------------------------------------------------------------------

SOURCES = {
    "mmlu-pro-law": "mmlu-pro",
    "mmlu-pro-computer science": "mmlu-pro",
    "livebench-reasoning": "livebench-reasoning",
    "livebench-math": "livebench-math",
    "livecodebench": "livecodebench",
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("judge", [Scored, Biased])
def test_judge_bench_counts_a_pair_as_right_if_its_two_orders_say_so(
    judge: type[Scored], seed: int, evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    generator = random.Random(seed)
    records: Records = [
        {
            "pair_id": str(i),
            "original_id": str(i),
            "source": generator.choice(list(SOURCES)),
            "question": f"{i}?",
            "response_model": "someone",
            "response_A": response(generator),
            "response_B": response(generator),
            "label": generator.choice(["A>B", "B>A"]),
        }
        for i in range(60)
    ]
    right: dict[str, list[bool]] = {}
    for record in records:
        margin = score(record["response_A"]) - score(record["response_B"])
        decisions = [margin + judge.bias, margin - judge.bias]  # a first, b first
        votes = sum(np.sign(d) for d in decisions) * (1 if record["label"] == "A>B" else -1)
        for name in (SOURCES[record["source"]], "all"):
            right.setdefault(name, []).append(votes > 0)
    told = evaluated(jsonl(tmp_path / "gpt.jsonl", records), judge=judge)
    own = told["benchmarks"]["JudgeBench"]
    assert values(own["overall"]) == {"accuracy": pytest.approx(np.mean(right.pop("all")))}
    assert {name: m["accuracy"]["value"] for name, m in own["subsets"].items()} == {
        name: pytest.approx(np.mean(each)) for name, each in right.items()
    }
    # By its mean scores, a judge whose orders disagree may be right.
    if judge is Biased:
        assert own["overall"]["accuracy"]["value"] < told["overall"]["accuracy"]["value"]
    assert "JudgeBench: its own metric" in capsys.readouterr().out
    page = embedded((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    (shown,) = page["benchmarks"]
    assert {row["name"]: row["metrics"] for row in shown["rows"]} == {
        "all": own["overall"],
        **own["subsets"],
    }


# -- RM-Bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("write", [jsonl, parquet])
def test_rm_bench_is_easy_normal_and_hard(
    write: Callable[[Path, Records], Path], seed: int, evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    generator = random.Random(seed)
    domains = ["chat", "code", "math", "safety-refuse", "safety-response"]
    records: Records = [
        {
            "id": f"{i}",
            "prompt": f"{i}?",
            "chosen": [response(generator, among=9) for _ in range(3)],
            "rejected": [response(generator, among=7) for _ in range(3)],
            "domain": generator.choice(domains),
        }
        for i in range(40)
    ]
    matrices: dict[str, list[Any]] = {}
    for record in records:
        won = [[score(c) > score(r) for r in record["rejected"]] for c in record["chosen"]]
        matrices.setdefault(record["domain"].split("-")[0], []).append(np.array(won))
    expected = {}
    for domain, each in matrices.items():
        matrix = np.mean(each, axis=0)
        expected[domain] = {
            "easy": np.tril(matrix, -1).sum() / 3,
            "normal": np.diag(matrix).mean(),
            "hard": np.triu(matrix, 1).sum() / 3,
            "average": matrix.mean(),
        }
    own = evaluated(write(tmp_path / "total_dataset.parquet", records)
                    if write is parquet else write(tmp_path / "total.jsonl", records))  # fmt: skip
    own = own["benchmarks"]["RM-Bench"]
    assert {name: values(metrics) for name, metrics in own["subsets"].items()} == {
        domain: pytest.approx(metrics) for domain, metrics in expected.items()
    }
    assert values(own["overall"]) == pytest.approx(
        {name: np.mean([m[name] for m in expected.values()]) for name in expected["chat"]}
    )
    low, high = own["overall"]["hard"]["ci95"]
    assert low < own["overall"]["hard"]["value"] < high
    printed = capsys.readouterr().out
    for word in ("RM-Bench", "easy", "normal", "hard", "safety"):
        assert word in printed


# -- RewardBench 2 --------------------------------------------------------------------------------


def best_of_four(generator: random.Random, i: int, subset: str) -> dict[str, Any]:
    # Few scores, so that some are equal.
    chosen = [response(generator, among=6)]
    rejected = [response(generator, among=4) for _ in range(3)]
    return reward_record(f"{i}", f"{i}?", chosen, rejected, subset)


def reward_record(
    name: str, prompt: str, chosen: list[str], rejected: list[str], subset: str
) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "num_correct": len(chosen),
        "num_incorrect": len(rejected),
        "total_completions": len(chosen) + len(rejected),
        "models": ["someone"],
        "subset": subset,
    }


def ties(generator: random.Random, prompts: int) -> Records:
    records = []
    for n in range(prompts):
        many = generator.randint(2, 6)
        for kind, count in (("ref", 1), ("tied", many)):
            chosen = [f"{150 + generator.randrange(40)} {k}" for k in range(count)]
            rejected = [
                f"{generator.randrange(165)} no {k}" for k in range(generator.randint(1, 5))
            ]
            records.append(reward_record(f"{kind}:{n}", f"{kind} {n}?", chosen, rejected, "Ties"))
    generator.shuffle(records)
    return records


def ties_score(records: Records) -> float:
    """The score of the subset Ties, from the scores of single responses."""
    right, gap, spread = {}, {}, {}
    for record in records:
        good, bad = (list(map(score, record[name])) for name in ("chosen", "rejected"))
        right[record["id"]] = min(good) > max(bad)
        gap[record["id"]] = min(good) - max(bad)
        spread[record["id"]] = max(good) - min(good)
    numbers = {name.split(":")[1] for name in right}
    tied, ref = ([f"{kind}:{n}" for n in sorted(numbers)] for kind in ("tied", "ref"))
    both = [min(gap[t], gap[r]) for t, r in zip(tied, ref, strict=True)]
    breaks = [
        math.tanh(g / spread[t] - 1) if spread[t] else float(np.sign(g))
        for g, t in zip(both, tied, strict=True)
    ]
    return float(
        0.3 * np.mean([right[t] for t in tied])
        + 0.3 * np.mean([right[r] for r in ref])
        + 0.2 * np.mean([gap[t] > spread[t] for t in tied])
        + 0.2 * np.mean([g > spread[t] for g, t in zip(both, tied, strict=True)])
        + 0.01 * np.mean(breaks)
    )


@pytest.mark.parametrize("seed", range(2))
def test_reward_bench_2_is_best_of_four_and_ties(
    seed: int, evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    generator = random.Random(seed)
    names = ["Factuality", "Precise IF", "Math"]
    records = [best_of_four(generator, i, generator.choice(names)) for i in range(50)]
    tied = ties(generator, 8)
    expected: dict[str, Any] = {name: [] for name in names}
    for record in records:
        scores = list(map(score, record["chosen"] + record["rejected"]))
        best = scores[0] == max(scores)
        expected[record["subset"]].append(best / scores.count(max(scores)))
    expected = {name: np.mean(each) for name, each in expected.items()}
    expected["Ties"] = ties_score(tied)
    # In the layout of the Hub: two parts in a folder "data".
    parquet(tmp_path / "rb2/data/test-00000-of-00002.parquet", records[:20])
    parquet(tmp_path / "rb2/data/test-00001-of-00002.parquet", records[20:] + tied)
    told = evaluated(tmp_path / "rb2")
    own = told["benchmarks"]["RewardBench 2"]
    assert {name: metrics["score"]["value"] for name, metrics in own["subsets"].items()} == {
        name: pytest.approx(value) for name, value in expected.items()
    }
    assert values(own["overall"]) == {"score": pytest.approx(np.mean(list(expected.values())))}
    assert "unpaired" not in own
    # Right responses are compared with each other, as ties.
    pairs = sum(math.comb(record["num_correct"], 2) for record in tied)
    assert told["subsets"]["Ties"]["ties"] == pairs == told["overall"]["ties"]
    printed = capsys.readouterr().out
    assert "RewardBench 2" in printed
    assert "spread" in printed


def test_ties_without_their_counterpart_do_not_count_and_are_named(
    evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    records = ties(random.Random(5), 6)
    whole = [r for r in records if not r["id"].endswith((":2", ":4"))]
    lone = [r for r in records if r["id"] in ("ref:2", "tied:4")]
    own = evaluated(jsonl(tmp_path / "ties.jsonl", whole + lone))["benchmarks"]["RewardBench 2"]
    assert own["subsets"]["Ties"]["score"]["value"] == pytest.approx(ties_score(whole))
    assert own["unpaired"] == 2
    assert "2 prompts without a counterpart do not count" in capsys.readouterr().out
    # None is left: there is no score, and no number in its place.
    own = evaluated(jsonl(tmp_path / "lone.jsonl", lone))["benchmarks"]["RewardBench 2"]
    assert own["subsets"]["Ties"]["score"] is None
    assert own["overall"]["score"] is None


def test_a_record_that_cannot_be_scored_is_skipped_as_a_whole(
    evaluated: Eval, tmp_path: Path
) -> None:
    generator = random.Random(0)
    same = best_of_four(generator, 1, "Math")
    same["rejected"][2] = same["chosen"][0]
    told = evaluated(jsonl(tmp_path / "rb2.jsonl", [best_of_four(generator, 0, "Math"), same]))
    assert told["skipped"].pop("record: identical responses") == 1
    assert all(why.startswith("column ") for why in told["skipped"])
    assert told["overall"]["pairs"] == 3


# -- human votes ----------------------------------------------------------------------------------

OUTCOMES = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie", "both_bad": "tie"}


def conversation(turns: int, answer: str, *, parts: bool) -> list[dict[str, Any]]:
    texts = [("user", f"question {i}") for i in range(turns)]
    both = [m for asked in texts for m in (asked, ("assistant", answer))]
    return [
        {
            "role": role,
            "content": [{"type": "text", "text": text, "image": None, "mimeType": None}]
            if parts
            else text,
        }
        for role, text in both
    ]


def arena_33k(generator: random.Random, winner: str, turns: int, a: str, b: str) -> dict[str, Any]:
    sides = (conversation(turns, text, parts=False) for text in (a, b))
    names = ("conversation_a", "conversation_b")
    return {"winner": winner, "turn": turns, "judge": "x", **dict(zip(names, sides, strict=True))}


def arena_140k(generator: random.Random, winner: str, turns: int, a: str, b: str) -> dict[str, Any]:
    sides = (conversation(turns, text, parts=True) for text in (a, b))
    names = ("conversation_a", "conversation_b")
    return {"winner": winner, "model_a": "x", **dict(zip(names, sides, strict=True))}


def arena_5k(generator: random.Random, winner: str, turns: int, a: str, b: str) -> dict[str, Any]:
    record = arena_140k(generator, winner, turns, a, b)
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}


def arena_55k(generator: random.Random, winner: str, turns: int, a: str, b: str) -> dict[str, Any]:
    outcome = OUTCOMES[winner]
    return {
        "prompt": json.dumps([f"question {i}" for i in range(turns)]),
        "response_a": json.dumps([a] * turns),
        "response_b": json.dumps([b] * (turns - 1) + [b if turns == 1 else None]),
        "winner_model_a": int(outcome == "a"),
        "winner_model_b": int(outcome == "b"),
        "winner_tie": int(outcome == "tie"),
    }


def wsdm(generator: random.Random, winner: str, turns: int, a: str, b: str) -> dict[str, Any]:
    return {"prompt": "[no list", "response_a": a, "response_b": b, "winner": winner}


@pytest.mark.parametrize(("judge", "write"), [(Scored, jsonl), (Biased, parquet)])
@pytest.mark.parametrize("vote", [arena_33k, arena_140k, arena_5k, arena_55k, wsdm])
def test_arena_votes_have_ties_and_two_agreements(
    vote: Callable[..., dict[str, Any]],
    write: Callable[[Path, Records], Path],
    judge: type[Scored],
    evaluated: Eval,
    tmp_path: Path,
) -> None:
    generator = random.Random(vote.__name__)
    records: Records = []
    with_ties, without_ties = [], []
    for _ in range(50):
        winner = generator.choice(list(OUTCOMES))
        a, b = response(generator), response(generator)
        records.append(vote(generator, winner, generator.choice([1, 1, 2, 3]), a, b))
        margin = score(a) - score(b)
        orders = {np.sign(margin + judge.bias), np.sign(margin - judge.bias)}
        said = {1: "a", -1: "b"}.get(int(orders.pop()), "tie") if len(orders) == 1 else "tie"
        with_ties.append(said == OUTCOMES[winner])
        if "tie" not in (said, OUTCOMES[winner]):
            without_ties.append(said == OUTCOMES[winner])
    told = evaluated(write(tmp_path / f"votes.{write.__name__}", records), judge=judge)
    assert all(why.startswith("column ") for why in told["skipped"])
    assert told["overall"]["pairs"] == 50
    assert told["overall"]["ties"] == sum(
        OUTCOMES[r["winner"]] == "tie" if "winner" in r else r["winner_tie"] for r in records
    )
    assert values(told["benchmarks"]["human votes"]["overall"]) == {
        "with ties": pytest.approx(np.mean(with_ties)),
        "without ties": pytest.approx(np.mean(without_ties)),
    }


def test_all_turns_of_a_vote_are_judged(evaluated: Eval, tmp_path: Path) -> None:
    seen: list[Comparison] = []

    class Watching(Scored):
        def orders(self, c: Comparison) -> Any:
            seen.append(c)
            return super().orders(c)

    generator = random.Random(0)
    for vote in (arena_140k, arena_5k, arena_33k, arena_55k):
        seen.clear()
        records = [vote(generator, "both_bad", 2, "5 points", "6 points")]
        evaluated(jsonl(tmp_path / "votes.jsonl", records), judge=Watching)
        (pair,) = seen
        assert pair.context == "question 0"
        assert pair.response_a == "5 points\n\nHuman: question 1\n\nAssistant: 5 points"


# -- every benchmark ------------------------------------------------------------------------------


def test_the_compared_judge_has_the_metric_too(evaluated: Eval, tmp_path: Path) -> None:
    generator = random.Random(3)
    records = [best_of_four(generator, i, "Math") for i in range(9)]
    told = evaluated(jsonl(tmp_path / "rb2.jsonl", records), "--compare", str(tmp_path / "judge"))
    assert told["compared_with"]["benchmarks"] == told["benchmarks"]


def test_other_data_has_no_metric_of_its_own(evaluated: Eval, tmp_path: Path, capsys: Any) -> None:
    records = [{"prompt": "q", "chosen": "3 points", "rejected": "2 points", "subset": "Math"}]
    assert evaluated(jsonl(tmp_path / "rewardbench.jsonl", records))["benchmarks"] == {}
    assert "its own metric" not in capsys.readouterr().out


# -- --max-pairs ----------------------------------------------------------------------------------


def llmbar(folder: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True)
        records = [
            {"input": f"{name} {i}?", "output_1": "1 no", "output_2": "2 yes", "label": 1 + i % 2}
            for i in range(size)
        ]
        (folder / name / "dataset.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_max_pairs_spreads_over_the_subsets(
    seed: int, evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    generator = random.Random(seed)
    sizes = {f"part {i}": generator.randint(1, 30) for i in range(generator.randint(2, 6))}
    most = generator.randint(len(sizes), 60)
    told = evaluated(llmbar(tmp_path / "bench", sizes), "--max-pairs", str(most))
    taken = {name: report["pairs"] for name, report in told["subsets"].items()}
    assert sum(taken.values()) == min(most, sum(sizes.values()))
    assert taken.keys() == sizes.keys()
    # A subset has fewer pairs than another, by more than one, only if it has no more to give.
    for name, count in taken.items():
        assert count == sizes[name] or count >= max(taken.values()) - 1
    left = sum(sizes.values()) - sum(taken.values())
    assert told["skipped"] == ({"beyond max_pairs": left} if left else {})
    assert (f"beyond max_pairs: {left}" in capsys.readouterr().out) == bool(left)


def test_a_subset_without_a_pair_is_named(evaluated: Eval, tmp_path: Path, capsys: Any) -> None:
    folder = llmbar(tmp_path / "bench", {"one": 4, "two": 4, "three": 5})
    told = evaluated(folder, "--max-pairs", "2")
    assert set(told["subsets"]) == {"one", "three"}  # in the order of the folder
    assert told["skipped"] == {
        "beyond max_pairs": 7,
        "beyond max_pairs, the whole subset two": 4,
    }
    assert "the whole subset two: 4" in capsys.readouterr().out


def test_max_pairs_takes_all_pairs_of_a_record_or_none(
    evaluated: Eval, tmp_path: Path, capsys: Any
) -> None:
    generator = random.Random(1)
    records: Records = [
        {
            "prompt": f"{i}?",
            "chosen": [response(generator) for _ in range(3)],
            "rejected": [response(generator) for _ in range(3)],
            "domain": ("chat", "chat", "math", "code")[i % 4],
        }
        for i in range(20)
    ]
    path = jsonl(tmp_path / "rm.jsonl", records)
    told = evaluated(path, "--max-pairs", "40")
    assert {n: r["pairs"] for n, r in told["subsets"].items()} == {
        "chat": 18, "math": 9, "code": 9,
    }  # fmt: skip
    (easy,) = {m["easy"]["n"] for n, m in told["benchmarks"]["RM-Bench"]["subsets"].items()
               if n != "chat"}  # fmt: skip
    assert easy == 1
    assert main(["eval", str(path), "--model", str(tmp_path / "judge"), "--output",
                 str(tmp_path / "other"), "--max-pairs", "8"]) == 2  # fmt: skip
    assert "max_pairs 8 is less than the 9 pairs of one record: use at least 9" in (
        capsys.readouterr().err
    )


def test_max_pairs_keeps_the_two_prompts_of_a_tie_together(evaluated: Eval, tmp_path: Path) -> None:
    records = sorted(ties(random.Random(2), 8), key=lambda r: r["id"])  # all ref, then all tied
    told = evaluated(jsonl(tmp_path / "ties.jsonl", records), "--max-pairs", "60")
    assert told["overall"]["pairs"] <= 60
    lines = (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
    kinds = Counter(part.partition(":")[0] for part in {json.loads(line)["part"] for line in lines})
    assert kinds["tied"] >= 2
    assert told["benchmarks"]["RewardBench 2"]["subsets"]["Ties"]["score"]["n"] == kinds["tied"]

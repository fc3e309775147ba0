"""Writes docs/evidence.md from the results of the studies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import plots
import rewards
import self_rejection
from self_judge.evaluation.statistics import length_controlled_win_rate
from study import RESULTS, Study, interval, lines

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
Line = Mapping[str, Any]
Arms = Mapping[str, Sequence[Line]]
_FORMER = (
    "**These figures are from a former version of this study's model and data.** They cannot be "
    "compared with those of the current one."
)
_WON = ("wins", "longer")  # per prompt
PAPER = "on-policy, frozen judge"  # the arm with the method of the paper


def write(studies: Iterable[Study]) -> None:
    """Writes docs/evidence.md and its plots, with a section for each study that has results."""
    page = [
        "# Evidence",
        "This page shows the results of `make studies`, in the synthetic world unless noted "
        "otherwise. All intervals are 95% intervals over seeds and prompts (hierarchical "
        "bootstrap), unless noted otherwise. Differences are paired within a seed. The results and "
        "the machines are in `studies/results`.",
    ]
    for study in studies:
        if study.results.exists():
            page += [f"## {study.name.replace('_', ' ').capitalize()}", study.question]
            page += [f"**For users:** {study.lesson}"] if study.lesson else []
            arms = shown_arms(study.name)
            worlds = {line.get("world") for own in arms.values() for line in own}
            if worlds != {study.world.version()}:
                page.append(_FORMER)
            if picture := plots.draw(study.name, arms):
                page.append(f"![{study.name.replace('_', ' ')}](images/{picture})")
            page.append(_TABLES[study.name](arms))
    PAGE.write_text("\n\n".join(page) + "\n", encoding="utf-8")


def by_arm(study: str) -> dict[str, list[Line]]:
    """Returns the lines of each arm, in the order of the seeds."""
    found: dict[str, list[Line]] = {}
    for line in sorted(lines(RESULTS / f"{study}.jsonl"), key=lambda line: line["seed"]):
        found.setdefault(line["arm"], []).append(line)
    return found


def shown_arms(study: str) -> dict[str, list[Line]]:
    """Returns the lines of each arm, with the paper's method as the first of the improvements."""
    arms = by_arm(study)
    if study != "improvements":
        return arms
    worlds = {line.get("world") for own in arms.values() for line in own}
    paper = [line for line in by_arm("learning").get(PAPER, []) if line.get("world") in worlds]
    return {PAPER: paper, **arms} if paper else arms


def demo(arms: Arms) -> str:
    rows = []
    for line in arms["demo"]:
        gold, win = line["gold"], line["win_rate_vs_jsft"]
        best = [
            f"{gold[way][n]['mean']:.3f}"
            for way in ("self_judge_rejection", "without_prior")
            for n in ("4", "16")
        ]
        rows.append(
            (
                str(line["seed"]),
                f"{line['judge']['accuracy']:.3f}",
                _known(gold["jsft"], "mean"),
                _known(gold["self_judge"], "mean"),
                *best,
                _known(win, "value"),
            )
        )
    head = ("seed", "judge accuracy", "gold, JSFT", "gold, self-trained", "best of 4", "best of 16",
            "best of 4, judge alone", "best of 16, judge alone", "win rate")  # fmt: skip
    note = "Each row is one run; its intervals cover prompts, not seeds."
    return _table(head, rows, note)


def learning(arms: Arms) -> str:
    return "\n\n".join([_gold(arms, PAPER), _costs(arms)])


def judging(arms: Arms) -> str:
    shared = {line["seed"]: line["judged_right"] for line in arms.get("JSFT", [])}
    rows = []
    for arm, own in arms.items():
        judged = [x for x in own if "judged_right" in x]
        paired = [_minus(x["judged_right"], shared[x["seed"]]) for x in judged]
        answers = [x["gold"] for x in own if "gold" in x]
        agreement = [x["order_agreement"] for x in own if "order_agreement" in x]
        rows.append(
            (
                arm,
                _interval([x["judged_right"] for x in judged]) if judged else "",
                _interval(paired, "+.3f") if judged and arm != "JSFT" else "",
                f"{sum(agreement) / len(agreement):.3f}" if agreement else "",
                _interval(answers) if answers else "",
            )
        )
    head = ("", "accuracy", "minus JSFT", "orders agree", "gold score of answers")
    return _table(head, rows, _seeds(arms))


def judges(arms: Arms) -> str:
    return "\n\n".join([_gold(arms, "self, frozen"), _costs(arms)])


def _gold(arms: Arms, baseline: str) -> str:
    """Returns the gold score of each arm, its difference from the baseline, and why."""
    base = {line["seed"]: line["gold"] for line in arms.get(baseline, [])}
    rows = []
    for arm, own in arms.items():
        paired = [_minus(x["gold"], base[x["seed"]]) for x in own if x["seed"] in base]
        judged = [x["judge_right"] for x in own if "judge_right" in x]
        rows.append(
            (
                arm,
                _interval([x["gold"] for x in own]),
                "" if arm == baseline or not paired else _interval(paired, "+.3f"),
                _mean(own, "true"),
                _mean(own, "length", ".1f"),
                _mean(own, "kl", ".2f"),
                _interval(judged) if judged else _mean(own, "judged_right"),
            )
        )
    right = "judge's accuracy" if baseline.startswith("self") else "as a judge"
    head = ("", "gold score", f"minus {baseline}", "true", "tokens", "KL", right)
    return _table(head, rows, _seeds(arms))


def _costs(arms: Arms) -> str:
    """Returns the mean cost of each arm, and its seconds per 0.01 of gold above the JSFT model."""
    jsft = arms.get("JSFT") or by_arm("learning").get("JSFT", [])
    start = {line["seed"]: float(np.mean(line["gold"])) for line in jsft}
    kinds = ("sampled_tokens", "matches", "judge_tokens", "trained_tokens")
    rows = []
    for arm, own in arms.items():
        if arm == "JSFT":
            continue
        gains = [np.mean(x["gold"]) - start[x["seed"]] for x in own if x["seed"] in start]
        seconds, gain = float(np.mean([x["seconds"] for x in own])), float(np.mean(gains or [0]))
        cost = (_mean(own, kind, ",.0f") for kind in kinds)
        per_gain = f"{seconds / gain / 100:.1f}" if gain > 0.001 else ""
        rows.append((arm, *cost, f"{seconds:.0f}", _mean(own, "peak_mib", ",.0f"), per_gain))
    head = ("cost", "tokens sampled", "matches", "tokens judged", "tokens trained", "s", "peak MiB",
            "s per 0.01 gold")  # fmt: skip
    note = (
        "Mean cost per run, measured beside other work. Judged tokens are those of all prompts, "
        "before shared prefixes; `peak` includes Python and its libraries."
    )
    return _table(head, rows, note)


def real(arms: Arms) -> str:
    """Returns how well each judge decides held-out pairs, and what policies win by them."""
    longer = {line["seed"]: line["right"] for line in arms.get("longer response", [])}
    rows = []
    for arm, own in arms.items():
        if judged := [x for x in own if "right" in x]:
            paired = [_minus(x["right"], longer[x["seed"]]) for x in judged if x["seed"] in longer]
            rows.append(
                (
                    arm,
                    str(judged[0]["records"] or ""),
                    _interval([x["right"] for x in judged]),
                    _interval(paired, "+.3f") if paired and arm != "longer response" else "",
                    *(_mean(judged, key) for key in ("one_order", "order_agreement")),
                    f"{np.mean([x['seconds'] for x in judged]):,.0f}",
                )
            )
    head = ("judge", "records", "accuracy", "minus longer response", "one order", "orders agree",
            "s")  # fmt: skip
    pairs = {len(x["right"]) for own in arms.values() for x in own if "right" in x}
    note = f"{_seeds(arms)} {max(pairs, default=0):,} held-out pairs."
    return "\n\n".join([_table(head, rows, note), *_wins(arms)])


def _wins(arms: Arms) -> list[str]:
    """Returns win rates of policies and of the best of N, by the independent judge."""
    found: dict[str, list[Line]] = {}
    for line in arms.get("self-training", []):
        found.setdefault("self-trained, against JSFT", []).append(line)
        found.setdefault("the same, by its own judge", []).append(line["own_judge"])
    for line in arms.get("self-rejection", []):
        for way, won in line["ways"].items():
            found.setdefault(f"{way}, against one sample", []).append(won)
    rows = []
    for way, own in found.items():
        wins, longer = ([value for line in own for value in line[key]] for key in _WON)
        equal = length_controlled_win_rate(wins, longer).win_rate
        rate = _interval([line["wins"] for line in own])
        rows.append((way, rate, str(equal), _mean(own, "longer", "+.0f")))
    head = ("by the independent judge", "win rate", "at equal length", "characters longer")
    note = "Win rates on held-out prompts. The intervals at equal length cover prompts, not seeds."
    return [_table(head, rows, note)] if rows else []


def rejection(arms: Arms) -> str:
    sizes = [str(n) for n in self_rejection.SIZES]
    rows = []
    for arm, own in arms.items():
        for way in own[0].get("gold_by_n", ()):
            values = [x["gold_by_n"][way] for x in own]
            cells = (_interval([v[n] for v in values]) if n in values[0] else "" for n in sizes)
            rows.append((f"{way} ({arm})", *cells))
    table = _table(("", *(f"N = {n}" for n in sizes)), rows, _seeds(arms))
    return "\n\n".join([table, *ranking(arms.get("reward schemes", []))])


def ranking(own: Sequence[Line]) -> list[str]:
    """Returns what the schemes of rewards cost, and how well they rank groups of each size."""
    budgets = (rewards.OWN, *rewards.BUDGETS)
    rows = []
    for n in own[0]["ranking"] if own else ():
        found = [line["ranking"][n] for line in own]
        chance = _interval([x["chance"] for x in found])
        rows.append((n, "chance", *[""] * 3, *["0.5"] * len(budgets), *[chance] * len(budgets)))
        for scheme in rewards.SCHEMES:
            each = [x["schemes"][scheme] for x in found]
            costs = (_mean(each, key, ".1f") for key in ("matches", "tokens", "shared"))
            measured = (
                _interval([x[what][budget] for x in each])
                for what, budget in itertools.product(("right", "best"), budgets)
            )
            rows.append((n, scheme, *costs, *measured))
    at = ("", *(f", tokens of {budget}" for budget in rewards.BUDGETS))
    reached = (f"{what}{tokens}" for what in ("pairs right", "best found") for tokens in at)
    head = ("responses", "scheme", "matches", "judge tokens", "with shared prefixes", *reached)
    note = (
        "Rewards of groups against gold scores. At the tokens of another scheme, a scheme has as "
        "many matches or draws as these tokens allow, with shared prefixes."
    )
    return [_table(head, rows, note)] if rows else []


def _seeds(arms: Arms) -> str:
    counts = sorted({len(own) for own in arms.values()})
    return f"Seeds per arm: {', '.join(map(str, counts)) or 'none yet'}."


def _minus(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def _interval(values: Sequence[Sequence[float]], form: str = ".3f") -> str:
    mean, low, high = interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _known(estimate: Line, key: str) -> str:
    low, high = estimate["ci95"]
    return f"{estimate[key]:.3f} [{low:.3f}, {high:.3f}]"


def _mean(own: Sequence[Line], key: str, form: str = ".3f") -> str:
    values = [x[key] for x in own if key in x]
    flat = [v for x in values for v in (x if isinstance(x, list) else [x])]
    return f"{sum(flat) / len(flat):{form}}" if flat else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    both = (head, ["---"] * len(head), *rows)
    return "\n".join([note, "", *("| " + " | ".join(row) + " |" for row in both)])


_TABLES: dict[str, Callable[[Arms], str]] = {
    "demo": demo,
    "learning": learning,
    "judging": judging,
    "self_rejection": rejection,
    "improvements": learning,
    "judges": judges,
    "real": real,
}

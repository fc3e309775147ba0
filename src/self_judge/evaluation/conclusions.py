"""Turns the figures of evaluations, comparisons and runs into conclusions: red, amber or green.

Each function applies the rules in docs/judging.md ("Conclusions") to one kind of result. This
module does not judge, read files or print.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["red", "amber", "green"]
LEVELS: tuple[Level, ...] = ("red", "amber", "green")  # from worst to best

# Zheng et al. (2023, arXiv 2306.05685, Table 2): GPT-4 contradicts itself in 35% of swapped pairs.
POSITION = 0.35
FEW = 100  # with 100 pairs, a 95% interval is about ±10 points wide
_WEAK = 0.6
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What one figure means.

    Attributes:
        level: `red` if the result should not be used as it is, `amber` if it needs a look, and
            `green` otherwise.
        rule: the name of the rule in docs/judging.md.
        text: the figure, its meaning and, unless the level is `green`, what to do.
    """

    level: Level
    rule: str
    text: str


def as_json(conclusions: Sequence[Conclusion]) -> list[dict[str, str]]:
    """Returns the conclusions as JSON data, the worst first."""
    return [asdict(c) for c in sorted(conclusions, key=lambda c: LEVELS.index(c.level))]


# -- judges --------------------------------------------------------------------------------------


def judge_conclusions(report: Mapping[str, Any]) -> list[Conclusion]:
    """Returns the conclusions on a judge.

    Args:
        report: the metrics from `JudgeTally.report`.
    """
    if not report.get("pairs"):
        return [Conclusion("red", "pairs", "no pair was judged: there is nothing to conclude")]
    return [*_letters(report), *_position(report), *_undecidable(report), *_accuracy(report)]


def _letters(report: Mapping[str, Any]) -> Iterator[Conclusion]:
    mass = report.get("letter_mass")
    if mass is None or mass >= 0.5:
        return
    level: Level = "red" if mass < 0.1 else "amber"
    often = "rarely" if mass < 0.1 else "often does not"
    verb = "answers" if mass < 0.1 else "answer"
    yield Conclusion(
        level,
        "letter mass",
        f"the model {often} {verb} with a letter: p(A) + p(B) is {mass:.3f}. Use the templates of "
        "its JSFT, or run JSFT with these templates",
    )


def _position(report: Mapping[str, Any]) -> Iterator[Conclusion]:
    share = report.get("decided_by_position")
    if not share or share["value"] <= POSITION:
        return
    most = share["ci95"][0] > 0.5
    yield Conclusion(
        "red" if most else "amber",
        "position",
        f"position decides {_percent(share)} of the pairs: both orders prefer the response at the "
        "same position. "
        + ("Do not use this judge without more JSFT" if most else "Train the judge on more pairs"),
    )


def _undecidable(report: Mapping[str, Any]) -> Iterator[Conclusion]:
    undecidable = report.get("undecidable") or {}
    share = undecidable.get("share") or 0.0
    if share <= 0.05:
        return
    reasons: Mapping[str, int] = undecidable.get("reasons") or {}
    reason = max(reasons, key=lambda name: reasons[name], default="")
    yield Conclusion(
        "red" if share > 0.25 else "amber",
        "undecidable",
        f"{share:.0%} of the pairs have no verdict" + (f", most because {reason}" if reason else "")
        + ". They count as half correct",
    )  # fmt: skip


def _accuracy(report: Mapping[str, Any]) -> Iterator[Conclusion]:
    accuracy = report.get("accuracy")
    if not accuracy:
        yield Conclusion(
            "red", "labels", "no label names the better response, so there is no accuracy"
        )
        return
    (low, high), n, value = accuracy["ci95"], accuracy["n"], accuracy["value"]
    shown = f"accuracy {value:.3f} ({low:.3f} to {high:.3f}, {n:,} pairs)"
    longer = (report.get("baselines") or {}).get("the longer response")
    if high < 0.5:
        yield Conclusion(
            "red", "chance", f"{shown} is below chance: check the labels and the templates"
        )
    elif low <= 0.5 and high < _WEAK:
        yield Conclusion("red", "chance", f"{shown} is chance: train the judge on more pairs")
    elif low <= 0.5:
        yield Conclusion(
            "amber",
            "chance",
            f"{shown} may be chance: evaluate at least {_pairs_needed(value):,} pairs",
        )
    elif longer and longer["value"] > high:
        yield Conclusion(
            "red",
            "length",
            f"{shown} is below choosing the longer response, {longer['value']:.3f}: train the "
            "judge on more pairs with a shorter better response",
        )
    elif longer and longer["value"] >= low:
        yield Conclusion(
            "amber",
            "length",
            f"{shown} is not above choosing the longer response, {longer['value']:.3f}: evaluate "
            "more pairs with a shorter better response",
        )
    else:
        beside = f" and above choosing the longer response, {longer['value']:.3f}" if longer else ""
        yield Conclusion("green", "accuracy", f"{shown} is above chance{beside}")
    yield from _length_bias(report.get("longer") or {})
    if n < FEW:
        yield _few(n, "pairs")


def _length_bias(longer: Mapping[str, Any]) -> Iterator[Conclusion]:
    if_longer, if_shorter = (longer.get(f"accuracy_better_is_{x}") for x in ("longer", "shorter"))
    if not (if_longer and if_shorter) or if_longer["ci95"][0] <= if_shorter["ci95"][1]:
        return
    yield Conclusion(
        "amber",
        "length bias",
        f"the judge favors longer responses: it is right in {_percent(if_longer)} of the pairs if "
        f"the better response is longer, and in {_percent(if_shorter)} if it is shorter. Balance "
        "the lengths in the training pairs",
    )


def _few(n: int, what: str) -> Conclusion:
    half = _Z * math.sqrt(0.25 / max(n, 1))
    return Conclusion(
        "amber",
        f"few {what}",
        f"with {n:,} {what}, fractions are uncertain by ±{half:.2f}: use more",
    )


def _pairs_needed(value: float) -> int:
    """Returns the number of pairs at which the interval around this accuracy excludes chance.

    A Wilson interval excludes 0.5 if the accuracy is 1.96 standard errors of chance away from it.
    """
    distance = max(abs(value - 0.5), 0.01)
    return math.ceil(_Z**2 / 4 / distance**2 / 10) * 10


def _percent(estimate: Mapping[str, Any]) -> str:
    return f"{estimate['value']:.0%}"


def judge_gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Conclusion]:
    """Returns the conclusions on a judge after training, compared with the judge before it.

    Args:
        before, after: the metrics from `JudgeTally.report` on the same pairs.
    """
    old, new = before.get("accuracy"), after.get("accuracy")
    found = judge_conclusions(after)
    if not (old and new):
        return found
    moved = f"from {old['value']:.3f} to {new['value']:.3f}"
    if new["ci95"][1] < old["ci95"][0]:
        text = f"training lowered the judge's accuracy {moved}: use a lower learning rate"
        return [Conclusion("red", "gain", text), *found]
    if new["ci95"][0] > old["ci95"][1]:
        text = f"training raised the judge's accuracy {moved}"
        return [Conclusion("green", "gain", text), *found]
    text = f"training changed the judge's accuracy {moved}, which is within the intervals"
    return [Conclusion("amber", "gain", text), *found]


# -- policies ------------------------------------------------------------------------------------


def comparison_conclusions(results: Mapping[str, Any]) -> list[Conclusion]:
    """Returns the conclusions on a comparison of two policies.

    Args:
        results: the results of `commands.compare.outcome`.
    """
    rate, controlled = results["win_rate"], results["length_controlled_win_rate"]
    (low, high), prompts = rate["ci95"], results["prompts"]
    shown = f"a wins {rate['value']:.3f} ({low:.3f} to {high:.3f}, {prompts:,} prompts)"
    found = []
    if low > 0.5 >= controlled["ci95"][0] or high < 0.5 <= controlled["ci95"][1]:
        found.append(
            Conclusion(
                "amber",
                "length",
                f"{shown}, but at equal length {controlled['value']:.3f}: the difference may be "
                "one of length",
            )
        )
    elif low > 0.5:
        found.append(Conclusion("green", "win rate", f"{shown}: the judge prefers a"))
    elif high < 0.5:
        found.append(Conclusion("red", "win rate", f"{shown}: the judge prefers b"))
    else:
        found.append(
            Conclusion(
                "amber",
                "win rate",
                f"{shown}: no difference is shown. Compare more prompts, or train longer",
            )
        )
    longer = results["longer_wins_all"]["value"]
    if prompts > 1 and not 0.05 <= longer <= 0.95:
        found.append(
            Conclusion(
                "amber",
                "longer",
                f"{'a' if longer > 0.5 else 'b'} is longer for {max(longer, 1 - longer):.0%} of "
                "the prompts, so the win rate at equal length is a guess: compare with a judge "
                "without length bias",
            )
        )
    agreement = results["order_agreement"]
    if agreement["value"] < 1 - POSITION:
        found.append(
            Conclusion(
                "amber",
                "position",
                f"the judge's orders agree in {_percent(agreement)} of the pairs: use the win rate "
                "in which disagreeing orders count as a tie",
            )
        )
    share, reasons = results.get("undecidable"), results.get("undecidable_because")
    found += _undecidable({"undecidable": {"share": share, "reasons": reasons}})
    for side, ended in (results.get("finished") or {}).items():
        if ended and ended["value"] < 0.8:
            found.append(
                Conclusion(
                    "amber",
                    "cut responses",
                    f"{1 - ended['value']:.0%} of the responses of {side} were cut at "
                    "max_new_tokens: raise it",
                )
            )
    if prompts < FEW:
        found.append(_few(prompts, "prompts"))
    return found


# -- runs ----------------------------------------------------------------------------------------

Series = Mapping[str, Sequence[float | None]]


def training_conclusions(series: Series, prompts: int | None = None) -> list[Conclusion]:
    """Returns the conclusions on a run of self-training or JSFT.

    Args:
        series: the logged values of each metric, in order of steps.
        prompts: the number of training prompts, if known.
    """
    found = [*_judge_drift(series), *_policy_drift(series), *_overfitting(series)]
    if "judge/margin" in series and prompts is not None and prompts < FEW:
        found.append(
            Conclusion(
                "amber",
                "few prompts",
                f"{prompts:,} training prompts: the policy may memorize them. Use more",
            )
        )
    return found


def _ends(series: Series, name: str) -> tuple[float, float] | None:
    """Returns the means of the first and the last quarter of a metric with four or more values."""
    values = [v for v in series.get(name, ()) if v is not None and math.isfinite(v)]
    if len(values) < 4:
        return None
    quarter = len(values) // 4
    return statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])


def _judge_drift(series: Series) -> Iterator[Conclusion]:
    agreement = _ends(series, "judge/order_agreement")
    if agreement is not None:
        first, last = agreement
        moved = f"the judge's orders agree in {last:.0%} of the sampled pairs at the end, and in "
        moved += f"{first:.0%} at the start"
        if last < 0.5:
            yield Conclusion(
                "red", "order agreement", f"{moved}: verdicts are chance. Train the judge further"
            )
        elif first - last > 0.1:
            yield Conclusion(
                "amber",
                "order agreement",
                f"{moved}: the responses become harder to judge. Stop earlier, or renew the judge",
            )
        else:
            yield Conclusion("green", "order agreement", moved)
    undecidable = _ends(series, "judge/undecidable")
    if undecidable is not None and (undecidable[1] > 0.25 or undecidable[1] - undecidable[0] > 0.1):
        yield Conclusion(
            "red" if undecidable[1] > 0.25 else "amber",
            "undecidable",
            f"{undecidable[1]:.0%} of the sampled pairs have no verdict at the end, and "
            f"{undecidable[0]:.0%} at the start: they do not train the policy. See "
            "undecidable_because in rollouts/",
        )


def _policy_drift(series: Series) -> Iterator[Conclusion]:
    length = _ends(series, "completions/mean_length")
    if length is not None and length[0] > 0:
        ratio = length[1] / length[0]
        if ratio > 1.3 or ratio < 1 / 1.3:
            yield Conclusion(
                "red" if ratio > 2 or ratio < 0.5 else "amber",
                "length",
                f"responses {'grow' if ratio > 1 else 'shrink'} from {length[0]:.0f} to "
                f"{length[1]:.0f} tokens: compare with length control (self-judge compare)",
            )
    divergence = _ends(series, "objective/kl")
    if divergence is not None and divergence[1] > 30:
        yield Conclusion(
            "red" if divergence[1] > 100 else "amber",
            "KL",
            f"the policy is {divergence[1]:.0f} nats from the initial model: read its responses, "
            "and raise beta or lower the learning rate",
        )
    logged = series.get("rewards/accuracies", ())
    rewards = [v for v in logged if v is not None and math.isfinite(v)]
    rewards = rewards[len(rewards) // 2 :]
    if "judge/margin" in series and len(rewards) >= 4:
        mean = statistics.fmean(rewards)
        if mean - _Z * statistics.stdev(rewards) / math.sqrt(len(rewards)) <= 0.5:
            yield Conclusion(
                "amber",
                "reward accuracy",
                f"the reward accuracy in the second half is {mean:.2f}, which may be chance: the "
                "policy has not learned the judge's preferences. Train longer, or raise the "
                "learning rate",
            )


def _overfitting(series: Series) -> Iterator[Conclusion]:
    losses = [v for v in series.get("eval_loss", ()) if v is not None and math.isfinite(v)]
    if len(losses) >= 2 and losses[-1] > 1.02 * min(losses):
        yield Conclusion(
            "amber",
            "overfitting",
            f"the held-out loss rose from {min(losses):.3f} to {losses[-1]:.3f}: train less",
        )

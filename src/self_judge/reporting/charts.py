"""The curves of a report: one row per chart, from the metrics that training logs.

It knows the names of metrics and their meaning. It does not know how curves are drawn.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

PERCENT = "percent"
HELD_OUT = "held-out"
POLICY, JUDGE, RESPONSES, JSFT, OPTIMIZER = (
    ("self_judge", "Policy"),
    ("self_judge", "Judge"),
    ("self_judge", "Responses"),
    ("jsft", "JSFT"),
    ("self_judge", "Optimizer and time"),
)


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: curves of some metrics, over all runs of a kind.

    Attributes:
        section: the kind of run, and the heading on the page.
        id, title, about: its identifier and title, and one sentence about it.
        lines: metrics and their names in this chart; metrics that no run has are left out. A name
            that ends in `/` stands for every metric with this prefix, named by the rest.
        format: `percent`, or plain numbers.
        reference: the value of a dotted line.
        maybe: further lines, of metrics that only some runs log.
    """

    section: tuple[str, str]
    id: str
    title: str
    lines: Mapping[str, str]
    about: str
    format: str | None = None
    reference: float | None = None
    maybe: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def prefix(self) -> str | None:
        """The common prefix of this chart's metrics, if its lines are not named."""
        return next((name for name in self.lines if name.endswith("/")), None)

    def to_dict(self) -> dict[str, Any]:
        """The chart as data for the page's script."""
        named = {} if self.prefix else {**self.lines, **self.maybe}
        lines = [{"key": key, "label": label} for key, label in named.items()]
        return {**dataclasses.asdict(self), "lines": lines, "prefix": self.prefix}


# fmt: off
CHARTS = (  # in the order of the page
    Chart(POLICY, "loss", "Loss", {"loss": "training", "eval_loss": HELD_OUT},
          "The preference loss; for sigmoid, it is ln 2 ≈ 0.69 while policy and reference agree."),
    Chart(POLICY, "margins", "Reward margin",
          {"rewards/margins": "training", "eval_rewards/margins": HELD_OUT},
          "Reward of the chosen minus that of the rejected response.",
          reference=0.0),
    Chart(POLICY, "rewards", "Rewards",
          {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
          "β (log π − log π_ref) of each side. If both fall, both become less likely.",
          reference=0.0),
    Chart(POLICY, "accuracies", "Reward accuracy",
          {"rewards/accuracies": "training", "eval_rewards/accuracies": HELD_OUT},
          "Share of pairs in which the chosen response has the higher reward.", PERCENT, 0.5),
    Chart(POLICY, "kl", "KL from the reference", {"objective/kl": "KL"},
          "Estimated on the sampled responses, in nats per response; noisy, so it may dip below 0.",
          reference=0.0),
    Chart(POLICY, "entropy", "Entropy", {"entropy": "training"},
          "Entropy of the next token, mean over the responses. Near 0, the policy always answers "
          "the same."),
    Chart(JUDGE, "judge-margin", "Judge margin", {"judge/margin": "margin"},
          "Score of the chosen minus that of the rejected response, over decided pairs."),
    Chart(JUDGE, "order-agreement", "Order agreement", {"judge/order_agreement": "agreement"},
          "Share of decided pairs on which both orders agree; 50 % means that position alone "
          "decides.",
          PERCENT, 0.5),
    Chart(JUDGE, "undecidable", "Undecidable pairs", {"judge/undecidable": "undecidable"},
          "Share of pairs without a gradient: equal texts, exact ties, too long, open thoughts.",
          PERCENT),
    Chart(JUDGE, "principles", "Win rate by principle", {"judge/win_rate/": ""},
          "Share of decided pairs in which a principle agrees with the verdict.", PERCENT),
    Chart(RESPONSES, "length", "Response length",
          {"completions/mean_length": "all", "completions/chosen_length": "chosen",
           "completions/rejected_length": "rejected"},
          "Tokens of an answer. If chosen stays above rejected, the policy learns length.",
          maybe={"completions/thought_length": "thought"}),
    Chart(RESPONSES, "drift", "Length against the reference",
          {"completions/length_drift": "ratio"},
          "Mean length divided by that of the first log, when the policy equals the reference.",
          reference=1.0),
    Chart(RESPONSES, "finished", "Finished responses", {"completions/finished": "finished"},
          "Share of responses that the model ended itself; the others are cut at the limit.",
          PERCENT, maybe={"completions/unanswered": "a thought without an end"}),
    Chart(JSFT, "jsft-loss", "JSFT: loss", {"loss": "training", "eval_loss": HELD_OUT},
          "Cross-entropy per trained token, of SFT and judge examples together."),
    Chart(JSFT, "jsft-accuracy", "JSFT: token accuracy",
          {"mean_token_accuracy": "training", "eval_mean_token_accuracy": HELD_OUT},
          "Share of trained tokens that are the model's first choice.", PERCENT),
    Chart(JSFT, "jsft-gradient", "JSFT: gradient norm", {"grad_norm": "gradient"},
          "Before clipping. Spikes come before trouble."),
    Chart(OPTIMIZER, "gradient", "Gradient norm", {"grad_norm": "gradient"},
          "Before clipping. Spikes come before trouble."),
    Chart(OPTIMIZER, "rate", "Learning rate", {"learning_rate": "rate"},
          "Set by the schedule."),
    Chart(OPTIMIZER, "time", "Seconds per step", {"time/": ""},
          "By phase of a step, with the names logged under time/."),
)
# fmt: on


def charts_json() -> list[dict[str, Any]]:
    """The charts by section, as JSON data."""
    return [
        {"kind": kind, "title": title, "charts": [chart.to_dict() for chart in charts]}
        for (kind, title), charts in itertools.groupby(CHARTS, lambda chart: chart.section)
    ]

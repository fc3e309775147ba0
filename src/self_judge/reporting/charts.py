"""The curves of a report: a row for each chart, from the metrics that training logs.

It knows the names of metrics and what they mean to people. It does not know how curves are drawn.
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
        id, title, about: what it is called, and in one sentence what it shows.
        lines: metrics and what each is called in this chart; those that no run has are left out.
            A name that ends in `/` stands for every metric that begins so, called by the rest.
        format: `percent`, or plain numbers.
        reference: where a dotted line stands.
    """

    section: tuple[str, str]
    id: str
    title: str
    lines: Mapping[str, str]
    about: str
    format: str | None = None
    reference: float | None = None

    @property
    def prefix(self) -> str | None:
        """What every metric of this chart begins with, where its lines are not named."""
        return next((name for name in self.lines if name.endswith("/")), None)

    def to_dict(self) -> dict[str, Any]:
        """As the page's script takes it."""
        named = {} if self.prefix else self.lines
        lines = [{"key": key, "label": label} for key, label in named.items()]
        return {**dataclasses.asdict(self), "lines": lines, "prefix": self.prefix}


# fmt: off
CHARTS = (  # in the order of the page
    Chart(POLICY, "loss", "Loss", {"loss": "training", "eval_loss": HELD_OUT},
          "Of the preference loss; for sigmoid, ln 2 ≈ 0.69 is where policy and reference agree."),
    Chart(POLICY, "margins", "Reward margin",
          {"rewards/margins": "training", "eval_rewards/margins": HELD_OUT},
          "β times how much more the policy has moved towards chosen than towards rejected.",
          reference=0.0),
    Chart(POLICY, "rewards", "Rewards",
          {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
          "β (log π − log π_ref) of each side. Both falling: likelihood is taken from both.",
          reference=0.0),
    Chart(POLICY, "accuracies", "Reward accuracy",
          {"rewards/accuracies": "training", "eval_rewards/accuracies": HELD_OUT},
          "Share of pairs in which the chosen response has the higher reward.", PERCENT, 0.5),
    Chart(POLICY, "kl", "KL from the reference", {"objective/kl": "KL"},
          "Estimated on the sampled responses, in nats per response; noisy, so it may dip below 0.",
          reference=0.0),
    Chart(POLICY, "entropy", "Entropy", {"entropy": "training"},
          "Of the next token, mean over the responses. Towards 0: the policy always says the "
          "same."),
    Chart(JUDGE, "judge-margin", "Judge margin", {"judge/margin": "margin"},
          "Score of the chosen less that of the rejected response, over decided pairs."),
    Chart(JUDGE, "order-agreement", "Order agreement", {"judge/order_agreement": "agreement"},
          "Share of decided pairs that both orders decide alike; 50 % is a judge that reads "
          "places.",
          PERCENT, 0.5),
    Chart(JUDGE, "undecidable", "Undecidable pairs", {"judge/undecidable": "undecidable"},
          "Share of pairs that give no gradient: equal texts, exact ties, too long.", PERCENT),
    Chart(JUDGE, "principles", "Win rate by principle", {"judge/win_rate/": ""},
          "Share of decided pairs in which a principle sides with the verdict.", PERCENT),
    Chart(RESPONSES, "length", "Response length",
          {"completions/mean_length": "all", "completions/chosen_length": "chosen",
           "completions/rejected_length": "rejected"},
          "Tokens of a response. Chosen above rejected, step after step: length is learned."),
    Chart(RESPONSES, "drift", "Length against the reference",
          {"completions/length_drift": "ratio"},
          "Mean length over that of the first log, when the policy still was the reference.",
          reference=1.0),
    Chart(RESPONSES, "finished", "Ended by themselves", {"completions/finished": "finished"},
          "Share of responses that the model ended itself; the others were cut at the limit.",
          PERCENT),
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
          "As the schedule has it."),
    Chart(OPTIMIZER, "time", "Seconds per step", {"time/": ""},
          "By phase of a step; what the phases are called is what is logged under time/."),
)
# fmt: on


def charts_json() -> list[dict[str, Any]]:
    """The charts by section, as JSON data."""
    return [
        {"kind": kind, "title": title, "charts": [chart.to_dict() for chart in charts]}
        for (kind, title), charts in itertools.groupby(CHARTS, lambda chart: chart.section)
    ]

"""Lists the charts in a report, which show the metrics that training logs.

This module names and describes the metrics. It does not draw the curves.
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
    """A chart with the curves of some metrics for all runs of one kind.

    Attributes:
        section: the kind of run and the heading on the page.
        id, title, about: the identifier, the title and a description of the chart.
        lines: the metrics and their names in this chart. Metrics that are missing in all runs are
            left out. A key that ends with `/` selects every metric with this prefix, and the rest
            of the metric's name is the name of its curve.
        format: `percent`, or `None` for plain numbers.
        reference: the value at which a dotted line is drawn.
        maybe: additional lines, for metrics that only some runs log.
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
        """The prefix of the metrics in this chart, or `None` if `lines` names each metric."""
        return next((name for name in self.lines if name.endswith("/")), None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the chart as data for the page's script."""
        named = {} if self.prefix else {**self.lines, **self.maybe}
        lines = [{"key": key, "label": label} for key, label in named.items()]
        return {**dataclasses.asdict(self), "lines": lines, "prefix": self.prefix}


# fmt: off
CHARTS = (  # in the order on the page
    Chart(POLICY, "loss", "Loss", {"loss": "training", "eval_loss": HELD_OUT},
          "The preference loss. The sigmoid loss is ln 2 ≈ 0.69 while the policy equals "
          "the reference."),
    Chart(POLICY, "margins", "Reward margin",
          {"rewards/margins": "training", "eval_rewards/margins": HELD_OUT},
          "The reward of the chosen response minus that of the rejected response.",
          reference=0.0),
    Chart(POLICY, "rewards", "Rewards",
          {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
          "β (log π − log π_ref) for each response. If both rewards fall, both responses become "
          "less likely.",
          reference=0.0),
    Chart(POLICY, "accuracies", "Reward accuracy",
          {"rewards/accuracies": "training", "eval_rewards/accuracies": HELD_OUT},
          "The share of pairs in which the chosen response has the higher reward.", PERCENT, 0.5),
    Chart(POLICY, "kl", "KL from the reference", {"objective/kl": "KL"},
          "Estimated from the sampled responses, in nats per response. The noisy estimate can be "
          "negative.",
          reference=0.0),
    Chart(POLICY, "entropy", "Entropy", {"entropy": "training"},
          "The mean entropy of the next token. Near 0, all samples are almost the same."),
    Chart(JUDGE, "judge-margin", "Judge margin", {"judge/margin": "margin"},
          "The score of the chosen response minus that of the rejected response, for decided "
          "pairs."),
    Chart(JUDGE, "order-agreement", "Order agreement", {"judge/order_agreement": "agreement"},
          "The share of decided pairs for which both orders prefer the same response. In the "
          "other pairs, the preference depends on the position.",
          PERCENT, 0.5),
    Chart(JUDGE, "letter-mass", "Letter mass", {"judge/letter_mass": "p(A) + p(B)"},
          "How probable the two letters are together, as the judge's next token.", PERCENT),
    Chart(JUDGE, "undecidable", "Undecidable pairs", {"judge/undecidable": "undecidable"},
          "The share of pairs that have no gradient because the texts are equal or too long, the "
          "scores are tied, or a thought has no answer.",
          PERCENT),
    Chart(JUDGE, "principles", "Win rate by principle", {"judge/win_rate/": ""},
          "The share of decided pairs in which a principle, or a judge of a panel, agrees with the "
          "verdict.",
          PERCENT),
    Chart(JUDGE, "principle-orders", "Order agreement by principle",
          {"judge/order_agreement/": ""},
          "The share of decided pairs for which a principle, or a judge of a panel, prefers the "
          "same response in both orders.",
          PERCENT, 0.5),
    Chart(RESPONSES, "length", "Response length",
          {"completions/mean_length": "all", "completions/chosen_length": "chosen",
           "completions/rejected_length": "rejected"},
          "The mean number of tokens in an answer. If the chosen length stays above the "
          "rejected length, the policy learns to write longer answers.",
          maybe={"completions/thought_length": "thought",
                 "judge/thought_tokens": "the judge's thoughts, per pair"}),
    Chart(RESPONSES, "drift", "Length against the reference",
          {"completions/length_drift": "ratio"},
          "The mean length divided by its value in the first step, in which the policy equals the "
          "reference.",
          reference=1.0),
    Chart(RESPONSES, "finished", "Finished responses", {"completions/finished": "finished"},
          "The share of responses that the model ended itself. The other responses "
          "are truncated at the limit.",
          PERCENT, maybe={"completions/unanswered": "thought without an answer"}),
    Chart(JSFT, "jsft-loss", "JSFT: loss", {"loss": "training", "eval_loss": HELD_OUT},
          "Cross-entropy per trained token, for SFT and judge examples together."),
    Chart(JSFT, "jsft-accuracy", "JSFT: token accuracy",
          {"mean_token_accuracy": "training", "eval_mean_token_accuracy": HELD_OUT},
          "The share of trained tokens to which the model gives the highest probability.", PERCENT),
    Chart(JSFT, "jsft-gradient", "JSFT: gradient norm", {"grad_norm": "gradient"},
          "The gradient norm before clipping. Spikes often precede a failure."),
    Chart(OPTIMIZER, "gradient", "Gradient norm", {"grad_norm": "gradient"},
          "The gradient norm before clipping. Spikes often precede a failure."),
    Chart(OPTIMIZER, "rate", "Learning rate", {"learning_rate": "rate"},
          "The learning rate from the schedule."),
    Chart(OPTIMIZER, "time", "Seconds per step", {"time/": ""},
          "The duration of each phase of a step, as logged under time/."),
)
# fmt: on


def charts_json() -> list[dict[str, Any]]:
    """Returns the charts by section, as JSON data."""
    return [
        {"kind": kind, "title": title, "charts": [chart.to_dict() for chart in charts]}
        for (kind, title), charts in itertools.groupby(CHARTS, lambda chart: chart.section)
    ]

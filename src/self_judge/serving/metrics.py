"""The counters of a server, as Prometheus reads them.

This module counts. It does not depend on where requests come from or how they are answered.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from self_judge.serving.work import Game, Sample

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "self_judge_requests", "Answered requests.", ["path", "status"], registry=own
        )
        self.refused = Counter(
            "self_judge_requests_refused", "Requests refused with a full queue.", registry=own
        )
        self.gone = Counter(
            "self_judge_clients_gone", "Requests whose client left first.", registry=own
        )
        self.present = Gauge(
            "self_judge_requests_present", "Requests in work or in the queue.", registry=own
        )
        self.running = Gauge("self_judge_requests_running", "Requests in work.", registry=own)
        self.seconds = Histogram(
            "self_judge_request_seconds", "Seconds to a complete answer.", ["path"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.first_token = Histogram(
            "self_judge_time_to_first_token_seconds", "Seconds to the first text of an answer.",
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.batch = Histogram(
            "self_judge_batch", "Rows sampled, or comparisons judged, together.", ["kind"],
            buckets=_SIZES, registry=own,
        )  # fmt: skip
        self.tokens = Counter("self_judge_sampled_tokens", "Sampled tokens.", registry=own)
        self.responses = Counter("self_judge_sampled_responses", "Responses.", registry=own)
        self.rounds = Counter("self_judge_rounds", "Rounds of tournaments.", registry=own)
        self.comparisons = Counter("self_judge_comparisons", "Judged pairs.", registry=own)
        self.agree = Counter(
            "self_judge_comparisons_orders_agree", "Judged pairs whose orders agree.", registry=own
        )
        self.undecidable = Counter(
            "self_judge_comparisons_undecidable", "Undecidable pairs.", registry=own
        )

    def sampled(self, samples: Sequence[Sample], tokens: int) -> None:
        """Counts the responses of a request, and all its sampled tokens."""
        self.responses.inc(len(samples))
        self.tokens.inc(tokens)

    def judged(self, game: Game) -> None:
        """Counts the rounds and verdicts of a game."""
        self.rounds.inc(game.rounds)
        self.comparisons.inc(len(game.verdicts))
        self.agree.inc(sum(verdict.orders_agree for verdict in game.verdicts))
        self.undecidable.inc(sum(verdict.preferred is None for verdict in game.verdicts))

    def page(self) -> bytes:
        """Returns all counters in Prometheus' text format."""
        return generate_latest(self.registry)

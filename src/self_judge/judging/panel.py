"""Panel: several judges that vote as principles do.

This module combines the verdicts of judges. It does not depend on how each of them judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from self_judge.datatypes import Comparison, Verdict
from self_judge.errors import require_type
from self_judge.judging.judge import Judge
from self_judge.judging.voting import aggregate, undecidable

INITIAL = "initial"


@dataclass(frozen=True)
class InitialModel:
    """The frozen initial model of a training, which `SelfJudgeTrainer` puts in this place.

    Attributes:
        thought_tokens: see `Judge`.
    """

    thought_tokens: int | None = None


class Panel:
    """Judges pairs of responses with several judges, whose votes count as those of principles do.

    Every member votes under each of its principles. A pair is undecidable if a member cannot judge
    it.

    Args:
        members: at least two judges by name, with the same number of principles. In self-training,
            a member may be `InitialModel`.

    Raises:
        ValueError: there are fewer than two members, or they have different numbers of principles.
    """

    def __init__(self, members: Mapping[str, Judge | InitialModel]) -> None:
        for name, member in members.items():
            require_type(f"member {name!r} of a panel", member, (Judge, InitialModel), "a Judge")
        if len(members) < 2:
            raise ValueError(f"a panel needs at least two judges, got {len(members)}")
        self.members = dict(members)
        sizes = {name: len(judge.principles) for name, judge in self._judges().items()}
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise ValueError(
                f"the judges of a panel need the same number of principles, so that each has the "
                f"same weight: {shown}"
            )

    def _judges(self) -> dict[str, Judge]:
        return {name: own for name, own in self.members.items() if isinstance(own, Judge)}

    def with_initial(self, initial: Mapping[str, Judge]) -> Panel:
        """Returns the panel with judges in place of the members that are `InitialModel`."""
        return Panel({**self.members, **initial})

    @property
    def judges(self) -> tuple[Judge, ...]:
        """The members.

        Raises:
            ValueError: a member is `InitialModel`, which only self-training replaces.
        """
        found = self._judges()
        if len(found) < len(self.members):
            raise ValueError(
                "a member of the panel names no judge, and only self-training has an initial "
                "model: set model, server or endpoint"
            )
        return tuple(found.values())

    @property
    def principles(self) -> tuple[str, ...]:
        """The names of the votes: the members, with their principles if there are several."""
        return tuple(
            name if len(judge.principles) == 1 else f"{name}/{principle}"
            for name, judge in zip(self.members, self.judges, strict=True)
            for principle in judge.principles
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies this panel in files and cards, as plain data."""
        named = zip(self.members, self.judges, strict=True)
        return {
            "model": "panel of " + ", ".join(self.members),
            "panel": {name: judge.identity for name, judge in named},
            "principles": list(self.principles),
        }

    @property
    def thought_tokens(self) -> int:
        """The number of tokens in all thoughts so far."""
        return sum(judge.thought_tokens for judge in self.judges)

    def compare(
        self, comparisons: Iterable[Comparison], *, progress: bool = False
    ) -> list[Verdict]:
        """Judges every comparison with every member; see `Judge.compare`."""
        given = comparisons if isinstance(comparisons, Comparison) else list(comparisons)
        # One row per member; a column has the members' verdicts on the same comparison:
        #
        #   member m   (orders of principle p, orders of principle q)
        #   member n   (orders of principle p, orders of principle q)   -> four votes
        each = [judge.compare(given, progress=progress) for judge in self.judges]
        return [_joined(own) for own in zip(*each, strict=True)]

    @contextmanager
    def prefix_cache(self) -> Iterator[None]:
        """See `Judge.prefix_cache`."""
        with ExitStack() as stack:
            for judge in self.judges:
                stack.enter_context(judge.prefix_cache())
            yield


AnyJudge: TypeAlias = Judge | Panel


def _joined(verdicts: tuple[Verdict, ...]) -> Verdict:
    lacking = next((v for v in verdicts if not v.probabilities), None)
    if lacking is not None:
        return undecidable((), lacking.undecidable_because or "a judge cannot decide")
    return aggregate([orders for verdict in verdicts for orders in verdict.probabilities])

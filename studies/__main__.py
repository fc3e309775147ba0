"""Runs the studies: `python studies [STUDY ...]`. docs/evidence.md shows their results.

python studies                       all studies, five seeds
python studies demo --seeds 10       the demo on all ten seeds
python studies learning --seeds 3    one study
python studies real --seeds 1        SmolLM2 on HH-helpful: about 7 hours on two cores, in parts
python studies --quick               two seeds of a small world, to check that all arms run
python studies --report              only write docs/evidence.md
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import demo
import evidence
import improvements
import judges
import judging
import learning
import real
import self_rejection
from study import run

STUDIES = {
    module.STUDY.name: module.STUDY
    for module in (demo, learning, judging, self_rejection, improvements, judges, real)
}
# Drawn at random after the code of the synthetic world was final. All studies use the first ones.
SEEDS = (5000, 9827, 19838, 48106, 67456, 77343, 81454, 85283, 94795, 97097)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python studies", description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, len(SEEDS) + 1), metavar="N",
        help=f"number of seeds, up to {len(SEEDS)} (default: 5)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="two seeds of a small world")
    parser.add_argument("--report", action="store_true", help="only write docs/evidence.md")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/studies"), help="folder for models"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(
            f"unknown study {', '.join(sorted(unknown))}: choose from {', '.join(STUDIES)}"
        )
    if not given.report:
        for name in given.studies or STUDIES:
            world = STUDIES[name].world
            settings = world.QUICK if given.quick else None
            if not given.quick and (why := world.missing()):
                print(f"{name} is left out: {why}")
                continue
            run(
                STUDIES[name], partial(world, settings=settings, folder=given.output),
                range(2) if given.quick else SEEDS[: given.seeds],
                version=world.version(settings), jobs=given.jobs,
                results=given.output / f"{name}.jsonl" if given.quick else None,
            )  # fmt: skip
    if not given.quick:
        evidence.write(STUDIES.values())


if __name__ == "__main__":
    main()

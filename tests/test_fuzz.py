"""Broken files of every kind: each command ends with success or with one line, and never hangs."""

from __future__ import annotations

import fuzz


def test_no_broken_file_gives_a_traceback_or_a_hang() -> None:
    counts, failures = fuzz.run(cases=90, seed=0)
    assert not failures, "\n".join(failures)
    assert counts.total() == 90

"""Ends worker processes with the process that started them, even if that process is killed.

This module does not depend on the work.
"""

from __future__ import annotations

import functools
import os
import threading
import time


@functools.cache
def workers_end_with_parent() -> None:
    """Makes every later worker of `num_proc` end when this process is killed.

    Forked workers wait for work in a pipe that their siblings also hold open, so they would wait
    forever. Workers that are not forked notice a closed pipe by themselves.
    """
    from multiprocess import util  # the `multiprocessing` of the datasets library

    util.register_after_fork(workers_end_with_parent, lambda _: _end_with(os.getppid()))


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

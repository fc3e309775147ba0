"""When a device's memory is full: half as much at a time, with a warning, for the rest of the run.

It knows errors and numbers, not what was computed.
"""

from __future__ import annotations

import logging

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)


def halved(stage: str, size: int, unit: str, error: BaseException) -> int:
    """Half of `size`, after an error that says that memory is full.

    Args:
        stage: what was being done, as the warning says it.
        size: how much was done at a time.
        unit: of what, in the plural.
        error: what was raised; anything else than full memory is raised again.

    Raises:
        BaseException: `error` itself, where it is another one, or where there is nothing to halve.
    """
    if not (isinstance(error, Exception) and should_reduce_batch_size(error)) or size <= 1:
        raise error
    # The traceback holds the tensors of what failed.
    error.__traceback__ = None
    clear_device_cache(garbage_collection=True)
    half = size // 2
    logger.warning(
        "out of memory while %s %d %s at a time: from here on %d, with the same result. A smaller "
        "setting from the start saves this attempt",
        stage, size, unit, half,
    )  # fmt: skip
    return half

"""How many loader workers: from what one core loads, and the cores there are."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Literal

log = logging.getLogger(__name__)

Workers = int | Literal["auto"]

# A batch that takes less than this costs more to send from another process than to make here.
_HARDLY = 0.004
_MOST_SECONDS = 2.0


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def measure_loading(load: Callable[[int], object], count: int) -> float:
    """Seconds a sample, of up to ``count`` samples and two seconds.

    Args:
        load: makes the n-th sample, from 0 on; the first call is not timed.
        count: how many there are.
    """
    load(0)
    begun = time.perf_counter()
    done = 0
    while done < count:
        load(done)
        done += 1
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
    return (time.perf_counter() - begun) / max(done, 1)


def choose_workers(
    seconds: float, batch_size: int, cores: int, ranks_here: int, on_cpu: bool
) -> int:
    """Workers of one rank, and a line in the log of why.

    Args:
        seconds: that one core takes for a sample.
        batch_size: of a rank.
        cores: that all ranks of this machine share.
        ranks_here: how many those are.
        on_cpu: whether the model trains on these cores, too: workers then get half of them.
    """
    own = max(cores // max(ranks_here, 1), 1)
    free = own // 2 if on_cpu else own - 1
    chosen = 0 if batch_size * seconds < _HARDLY else max(free, 0)
    rate = 1.0 / max(seconds, 1e-9)
    log.info(
        "num_workers=auto: one core loads %.0f images/s, %d of %d cores are this process's own: "
        "%d workers, about %.0f images/s",
        rate,
        own,
        cores,
        chosen,
        rate * max(chosen, 1),
    )
    return chosen

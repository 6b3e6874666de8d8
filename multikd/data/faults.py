"""Counting of samples that could not be read, and the rate past which a run stops."""

from __future__ import annotations

import logging
from collections import Counter

from multikd.distributed import world_size
from multikd.types import Batch

logger = logging.getLogger(__name__)

_GRACE = 1000  # samples: below so many the rate is taken of this number


class FaultCounter:
    """Counts faults by cause over the batches of one process.

    Among several ranks it only counts and logs: one that stopped alone would leave the others
    waiting for it. There the callback ``DataFaults`` judges, over all ranks.

    Args:
        max_rate: share of samples that may be faulty. Counted over at least 1,000 samples, so
            that a single bad image among the first few does not stop a run; 0 stops at the first.
    """

    def __init__(self, max_rate: float) -> None:
        if not 0 <= max_rate <= 1:
            raise ValueError(f"max_fault_rate must be in 0 … 1, received {max_rate}")
        self.max_rate = max_rate
        self.seen = 0
        self.causes: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Count a batch; log the 1st, 10th, 100th … fault of each cause.

        Raises:
            ValueError: past the rate, in a run of one process; names causes and the last sample.
        """
        self.seen += len(batch)
        for fault in batch.faults:
            self.causes[fault.cause] += 1
            count = self.causes[fault.cause]
            if count == 10 ** (len(str(count)) - 1):
                logger.warning(
                    "sample %s of %s was replaced by a neighbour (%s: %s); %d of this cause so far",
                    fault.key,
                    fault.shard,
                    fault.cause,
                    fault.detail,
                    count,
                )
        total = self.causes.total()
        past = total > self.max_rate * max(self.seen, _GRACE)
        if batch.faults and past and world_size() == 1:
            causes = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
            last = batch.faults[-1]
            raise ValueError(
                f"{total} of {self.seen} samples could not be read ({causes}), more than "
                f"max_fault_rate={self.max_rate} allows; the last was {last.key} of {last.shard}: "
                "run  multikd shards inspect  on the shards, or raise the rate"
            )

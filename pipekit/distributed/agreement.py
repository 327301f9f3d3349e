"""Agreement of all ranks on numbers of each of them, once a batch, without waiting for one another."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from pipekit.distributed.mpu import ModelParallelUnit
from pipekit.distributed.processes import wait

# Where the time between two exchanges is longer on any rank, waiting for the others costs nothing in comparison.
_SLOW_MS = 1000


class Agreement:
    """The largest of the numbers that ranks give, such as requests to stop, which all ranks learn at the same batch.

    An exchange starts an all-reduce on a CPU group, and the next one reads its result, so that no rank waits for a
    message under way. Where a second or more passes between exchanges, or where they are told to, they wait. A single
    process has nobody to ask.

    Args:
        unit: makes the group, and frees it with its own.
    """

    def __init__(self, unit: ModelParallelUnit) -> None:
        size = dist.get_world_size()
        group = unit.build_group([range(size)], "gloo", purpose="agreement") if size > 1 else None
        self._group = None if group is None else group.process_group
        self._work: dist.Work | None = None
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self._exchanged_s = time.monotonic()
        self._is_slow = False

    def exchange(self, *mine: int, at_once: bool = False) -> list[int]:
        """Give this rank's numbers, and return the largest of all ranks: of now, or of the exchange before.

        All ranks call this together, with equally many numbers of at least 0. They get the same: zeros where nothing is
        known yet.

        Args:
            mine: the numbers.
            at_once: whether to wait for those of now, the same on all ranks.

        Raises:
            CommunicationError: if another rank is gone, or does not come within the group's time limit.
        """
        if self._group is None:
            return list(mine)
        known = self._read() if self._work is not None else [0] * len(mine)
        passed_ms = int(1000 * (time.monotonic() - self._exchanged_s))
        self._numbers = torch.tensor([*mine, passed_ms], dtype=torch.int64)
        self._work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self._is_slow or at_once:
            known = [max(pair) for pair in zip(known, self._read(), strict=True)]
        self._exchanged_s = time.monotonic()
        return known

    def finish(self) -> None:
        """Wait for what is under way, after the last exchange; all ranks call this together."""
        if self._work is not None:
            self._read()

    def _read(self) -> list[int]:
        assert self._work is not None
        wait(self._work, "the other ranks to end the same batch")
        self._work = None
        *numbers, passed_ms = self._numbers.tolist()
        self._is_slow = passed_ms >= _SLOW_MS
        return numbers

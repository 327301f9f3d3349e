"""Clocks of ranks: how far each is from that of rank 0, found by messages to and fro."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipekit.distributed.processes import wait

_ROUNDS = 16


@dataclass(frozen=True)
class ClockReading:
    """Offset of a rank's clock at one moment.

    Attributes:
        at_s: the moment, of the rank's own clock.
        offset_s: seconds by which it is ahead of rank 0's.
        error_s: the offset is wrong by no more than this.
    """

    at_s: float
    offset_s: float
    error_s: float


@dataclass(frozen=True)
class CommonClock:
    """Translation of a rank's clock into rank 0's, with a drift that is linear between two readings."""

    first: ClockReading
    last: ClockReading

    def __call__(self, own_s: float) -> float:
        """Second of rank 0's clock at a second of the rank's own.

        Example:
            >>> clock = CommonClock(ClockReading(100.0, 5.0, 0.0), ClockReading(110.0, 5.5, 0.0))
            >>> clock(100.0), clock(104.0), clock(110.0)
            (95.0, 98.8, 104.5)
        """
        span_s = self.last.at_s - self.first.at_s
        share = (own_s - self.first.at_s) / span_s if span_s > 0 else 0.0
        return own_s - (self.first.offset_s + share * (self.last.offset_s - self.first.offset_s))

    @property
    def error_s(self) -> float:
        """Bound of its error between the readings."""
        return max(self.first.error_s, self.last.error_s)


def estimate_offset(rounds: Sequence[tuple[float, float, float, float]]) -> ClockReading:
    """Offset of a clock from the times of messages to and fro, by the round that lasted shortest.

    Args:
        rounds: of each, when the first message was sent and the answer came, of the common clock, and between them when
            the message came and the answer was sent, of the other clock: sent, came, answered, returned.

    Source: Mills 1991, "Internet Time Synchronization: The Network Time Protocol", section 4.

    Example:
        >>> estimate_offset([(0.0, 5.9, 6.0, 2.0), (3.0, 8.1, 8.2, 3.3)])
        ClockReading(at_s=8.2, offset_s=5.0, error_s=0.1)
    """
    sent, came, answered, returned = min(rounds, key=lambda each: (each[3] - each[0]) - (each[2] - each[1]))
    offset_s = ((came - sent) + (answered - returned)) / 2
    error_s = ((returned - sent) - (answered - came)) / 2
    return ClockReading(answered, round(offset_s, 9), round(error_s, 9))


def read_clock(group: dist.ProcessGroup | None) -> ClockReading:
    """Offset of this rank's `time.perf_counter` from rank 0's. All ranks call this together.

    Args:
        group: all ranks, over gloo.

    Raises:
        CommunicationError: if a rank does not answer.
    """
    rank, reading = dist.get_rank(), ClockReading(time.perf_counter(), 0.0, 0.0)
    for other in range(1, dist.get_world_size()):
        if rank == 0:
            rounds = []
            for _ in range(_ROUNDS):
                sent = time.perf_counter()
                _send([sent], other, group)
                came, answered = _receive(2, other, group)
                rounds.append((sent, came, answered, time.perf_counter()))
            found = estimate_offset(rounds)
            _send([found.at_s, found.offset_s, found.error_s], other, group)
        elif rank == other:
            for _ in range(_ROUNDS):
                _receive(1, 0, group)
                came = time.perf_counter()
                _send([came, time.perf_counter()], 0, group)
            reading = ClockReading(*_receive(3, 0, group))
    return reading


def _send(values: Sequence[float], other: int, group: dist.ProcessGroup | None) -> None:
    work = dist.isend(torch.tensor(values, dtype=torch.float64), other, group=group)
    assert work is not None
    wait(work, f"rank {other} to read its clock")


def _receive(count: int, other: int, group: dist.ProcessGroup | None) -> list[float]:
    values = torch.empty(count, dtype=torch.float64)
    work = dist.irecv(values, other, group=group)
    assert work is not None
    wait(work, f"the clock of rank {other}")
    found: list[float] = values.tolist()
    return found

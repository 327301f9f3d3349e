"""Saves that hold a training up for too large a share of its time."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipekit.number_text import bytes_text

# What is shorter, and what takes a smaller share of the time between saves, is no trouble.
_LEAST_S, _LARGEST_SHARE = 3.0, 0.1


class SlowSaves:
    """Finds saves that hold a training up for too large a share of the time between them. Each rank has one.

    Args:
        clock: a monotonic clock, in seconds.

    Attributes:
        write_s: seconds that the last checkpoint took to be written, in the background or not; 0 before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended_s = self._began_s = clock()
        self.write_s = 0.0

    def begin(self) -> None:
        """Note that training stands still for a save, or until the one before is written."""
        self._began_s = self._clock()

    def end(self) -> tuple[float, float]:
        """Note that training goes on; return for how many seconds it stood still, of how many since the last save."""
        now_s, last_s = self._clock(), self._ended_s
        self._ended_s = now_s
        return now_s - self._began_s, now_s - last_s

    def describe(self, stood_s: float, passed_s: float, count_bytes: Callable[[], int], *, remedy: str) -> str | None:
        """Warning about a save: how long training stood still, and how fast the disk was; None if it was not slow.

        Args:
            stood_s: seconds for which training stood still.
            passed_s: seconds since the save before.
            count_bytes: returns the size of the checkpoint, 0 if unknown; called for slow saves only.
            remedy: advice.
        """
        if stood_s < _LEAST_S or stood_s <= _LARGEST_SHARE * passed_s:
            return None
        num_bytes = count_bytes()
        what = bytes_text(num_bytes) if num_bytes else "a checkpoint"
        speed = f" ({num_bytes / 1e6 / self.write_s:,.0f} MB/s)" if num_bytes and self.write_s else ""
        times = f"{stood_s:.1f} of the last {passed_s:.1f} s"
        return f"training stood still for {times} to save {what}{speed}; {remedy}"

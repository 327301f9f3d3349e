"""Requests to stop or to save that a training hears between batches: from signals and clocks of any rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pipekit.distributed.agreement import Agreement
from pipekit.signals import StopSignals, name_signal

# Beyond the numbers of signals.
_MAX_TIME = 1000
# Until a save has been measured it is taken to last this share of `run.max_time`, and at most so many seconds.
_FIRST_SAVE_SHARE, _FIRST_SAVE_S = 0.05, 60.0
# A process that has saved still has to end.
_END_SHARE, _END_S = 0.02, 5.0


class Requests:
    """Requests to stop or to save, which all ranks learn at the same batch. All ranks make one together.

    A signal may reach any rank. The clock is that of one rank, since clocks differ.

    Args:
        agreement: tells all ranks.
        signals: of this process.
        has_clock: whether this rank's clock counts: that of rank 0.
        save_every_s: seconds between checkpoints; None makes none by time.
        max_time_s: seconds after `started_s` by which the run has saved and ended; None sets no limit.
        started_s: when the run was started, by `clock`.
        measure: a number of this rank, at least 0, which travels along.
        clock: a monotonic clock, in seconds.

    Attributes:
        largest: the largest number that `measure` has returned on any rank, as far as it is known.
        reason: why the training stops, the same on all ranks: a signal, or that its time is up; 0 as long as it goes
            on.
    """

    def __init__(
        self,
        agreement: Agreement,
        signals: StopSignals,
        *,
        has_clock: bool,
        save_every_s: float | None = None,
        max_time_s: float | None = None,
        started_s: float = 0.0,
        measure: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agreement, self._signals, self._measure, self._clock = agreement, signals, measure, clock
        self._save_every_s = save_every_s if has_clock and save_every_s is not None else math.inf
        self._max_time_s = max_time_s if has_clock and max_time_s is not None else math.inf
        self._ends_s = started_s + self._max_time_s
        self._save_due_s = clock() + self._save_every_s
        self._exchanged_s: float | None = None
        self._longest_gap_s = 0.0
        self._longest_save_s: float | None = None
        self._asks_save = False
        self.reason = self.largest = 0

    def exchange(self, *, at_once: bool = False) -> int:
        """Tell the other ranks what this one was asked for, hear the same of them, and return `reason`.

        All ranks call this together: after each batch, and between the batches of a validation. `at_once` waits for
        them, where they meet anyway; otherwise a request may be heard of at the next exchange.
        """
        now_s = self._clock()
        if self._exchanged_s is not None:
            self._longest_gap_s = max(self._longest_gap_s, now_s - self._exchanged_s)
        self._exchanged_s = now_s
        is_save_due = now_s >= self._save_due_s
        if is_save_due:
            self._save_due_s = now_s + self._save_every_s
        mine = self._signals.number or (_MAX_TIME if now_s + self._needed_s() >= self._ends_s else 0)
        reason, asks_save, largest = self._agreement.exchange(mine, int(is_save_due), self._measure(), at_once=at_once)
        self.largest = max(self.largest, largest)
        self.reason = self.reason or reason
        self._asks_save = self._asks_save or bool(asks_save)
        return self.reason

    def _needed_s(self) -> float:
        """Seconds until this process has ended, if one more batch is trained."""
        save_s = self._longest_save_s
        if save_s is None:
            save_s = min(_FIRST_SAVE_S, _FIRST_SAVE_SHARE * self._max_time_s)
        # All learn after the next batch that the time is up.
        return 2 * self._longest_gap_s + 1.5 * save_s + min(_END_S, _END_SHARE * self._max_time_s)

    @property
    def asks_save(self) -> bool:
        """True if it is time for a checkpoint; the same on all ranks."""
        return self._asks_save

    def note_save(self) -> None:
        """Note that a checkpoint has just been made, or begun in the background."""
        self._asks_save = False
        self._save_due_s = self._clock() + self._save_every_s
        self._exchanged_s = None  # the time of a save is none of a batch

    def note_written(self, seconds: float) -> None:
        """Note that a checkpoint took so many seconds to write."""
        self._longest_save_s = max(self._longest_save_s or 0.0, seconds)

    def describe(self) -> str:
        """Why the training stops, such as "SIGTERM"."""
        return "run.max_time" if self.reason == _MAX_TIME else name_signal(self.reason)

    def finish(self) -> None:
        """Wait for what is under way; all ranks call this together."""
        self._agreement.finish()

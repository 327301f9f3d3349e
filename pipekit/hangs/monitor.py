"""Monitor of the ranks' heartbeats: a warning when they stall, and a report when they hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipekit.files import write_atomically
from pipekit.hangs.heartbeat import Heartbeat, heartbeat_file
from pipekit.line_files import append_record, utc_now
from pipekit.storage import storage_error

STALL_STEPS = 10
"""A step that lasts longer than this many usual ones is a stall."""

REPORT_FILE = "hang.txt"
"""Name of the report of a hang in the folder of the logs."""

STALLS_FILE = "stalls.jsonl"
"""Name of the file of stalls in the folder of the logs: one JSON object a line, with its `time` and `text`."""

# No stall is shorter. Until the usual step is known, only a silent rank is a stall, and after a longer time.
_SHORTEST_STALL_S = 5.0
_FIRST_STALL_S = 10.0
_LISTEN_S = 0.5
_MISSED_BEATS = 5
_BEFORE_LIMIT_S = 30.0


@dataclass(frozen=True)
class _Heard:
    """The newest heartbeat of a rank, and when it was heard by the clock of this machine."""

    beat: Heartbeat
    time_s: float

    def silence_s(self, now_s: float) -> float:
        return now_s - self.time_s

    def is_silent(self, now_s: float) -> bool:
        return self.silence_s(now_s) > _MISSED_BEATS * self.beat.interval_s

    def doing_s(self, now_s: float) -> float:
        return self.beat.doing_s + self.silence_s(now_s)

    def phase_s(self, now_s: float) -> float:
        return self.beat.phase_s + self.silence_s(now_s)


class HangMonitor:
    """Listener to heartbeats of ranks.

    Args:
        folder: folder of the logs, where the heartbeats are.
        ranks: the global ranks to listen to; those whose heartbeats are elsewhere stay unknown.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, folder: Path, ranks: Iterable[int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stalls = folder / STALLS_FILE
        self._files = {rank: heartbeat_file(folder, rank) for rank in ranks}
        self._clock = clock
        self._heard: dict[int, _Heard] = {}
        self._now_s = float("-inf")
        self._has_warned = False

    def listen(self) -> None:
        """Read the heartbeats, unless that was a moment ago. All times below are those of the last reading."""
        now_s = self._clock()
        if now_s - self._now_s < _LISTEN_S:
            return
        self._now_s = now_s
        for rank, file in self._files.items():
            beat = Heartbeat.read(file)
            last = self._heard.get(rank)
            if beat is None:
                if last is not None and not file.exists():
                    del self._heard[rank]  # it has succeeded
            elif last is None or beat.number != last.beat.number:
                self._heard[rank] = _Heard(beat, now_s)

    def first_speaker(self) -> int | None:
        """The lowest rank that is heard from; None if there is none."""
        return min((rank for rank, heard in self._heard.items() if not heard.is_silent(self._now_s)), default=None)

    def longest_silence_s(self) -> float:
        """Seconds since the last heartbeat of the rank that has been silent the longest; 0 before the first."""
        return max((heard.silence_s(self._now_s) for heard in self._heard.values()), default=0.0)

    def longest_wait_s(self) -> float:
        """Seconds of the longest operation that a rank is in; 0 before the first heartbeat."""
        return max((heard.doing_s(self._now_s) for heard in self._heard.values()), default=0.0)

    def warn(self, terminal: TextIO) -> None:
        """Write a warning, if there is one, to the terminal and to the file of stalls.

        The launchers of several hosts may append to the same file.
        """
        warning = self.warning()
        if warning is None:
            return
        terminal.write(f"warning: {warning}\n")
        terminal.flush()
        append_record(self._stalls, {"time": utc_now(), "text": warning})

    def warning(self) -> str | None:
        """One line about a stall; None if there is none, or there was a warning about it before."""
        usual_s = max((heard.beat.usual_step_s or 0.0 for heard in self._heard.values()), default=0.0)
        limit_s = max(STALL_STEPS * usual_s, _SHORTEST_STALL_S if usual_s else _FIRST_STALL_S)
        stalled = [heard for heard in self._heard.values() if self._is_stalled(heard, limit_s, is_timed=usual_s > 0)]
        if not stalled:
            self._has_warned = False
        if not stalled or self._has_warned:
            return None
        self._has_warned = True
        # A silent rank may have gone on after its last heartbeat.
        speaking = [heard for heard in self._heard.values() if not heard.is_silent(self._now_s)]
        longest = max(speaking or stalled, key=lambda heard: heard.doing_s(self._now_s))
        usual = f" ({STALL_STEPS} usual steps take {STALL_STEPS * usual_s:.2g} s)" if usual_s else ""
        return f"{longest.beat.phase} has lasted {longest.phase_s(self._now_s):.0f} s{usual}: {self._blame()}"

    def _is_stalled(self, heard: _Heard, limit_s: float, *, is_timed: bool) -> bool:
        if heard.silence_s(self._now_s) > limit_s:
            return True
        # Each operation of an evaluation is short; a checkpoint takes as long as the storage does.
        lasted_s = {"step": heard.phase_s, "evaluation": heard.doing_s}.get(heard.beat.phase.split()[0])
        return is_timed and lasted_s is not None and lasted_s(self._now_s) > limit_s

    def report(self, ended: Container[int] = ()) -> str:
        """Report of a hang: the rank at fault, and a table of all ranks with their activities and waits.

        Args:
            ended: ranks that gave up waiting, so that their processes are gone.
        """
        rows = [("rank", "stage", "phase", "doing", "waits for", "for")]
        for heard in (self._heard[rank] for rank in sorted(self._heard)):
            beat = heard.beat
            awaited = " ".join(map(str, beat.waits_for)) or ("others" if beat.is_waiting else "-")
            if heard.is_silent(self._now_s) and beat.rank not in ended:
                awaited = "(silent)"
            stages = " ".join(map(str, beat.stages)) or "-"
            rows.append(
                (f"{beat.rank}", stages, beat.phase, beat.doing, awaited, f"{heard.doing_s(self._now_s):.0f} s")
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([f"the run hangs: {self._blame(ended)}", "", *table])

    def _blame(self, ended: Container[int] = ()) -> str:
        """Sentence about the rank that the others wait for."""
        now_s = self._now_s
        present = [heard for rank, heard in sorted(self._heard.items()) if rank not in ended]
        silent = [heard for heard in present if heard.is_silent(now_s)]
        if silent:
            guilty = max(silent, key=lambda heard: heard.silence_s(now_s))
            fault = (
                f"has not been heard from for {guilty.silence_s(now_s):.0f} s, and was last seen in "
                f"{guilty.beat.phase}, {guilty.beat.doing}"
            )
        elif busy := [heard for heard in present if not heard.beat.is_waiting]:
            guilty = max(busy, key=lambda heard: heard.doing_s(now_s))
            fault = f"waits for nobody, and has been {guilty.beat.doing} for {guilty.doing_s(now_s):.0f} s"
        else:
            return "every rank waits for another"
        waiting = [
            heard.beat.owner for rank, heard in sorted(self._heard.items()) if guilty.beat.rank in heard.beat.waits_for
        ]
        waiters = f"; {' and '.join(waiting)} wait{'s' * (len(waiting) == 1)} for it" if waiting else ""
        return f"{guilty.beat.name} {fault}{waiters}"


class HangReporter:
    """Warning and report of a hang from the lowest rank that is heard from, under launchers that do not listen.

    Called on the thread of the heartbeat with each beat of this rank. Where machines share no file system, a rank knows
    only those of its own machine.

    Args:
        folder: folder of the logs.
        world_size: the number of ranks.
        timeout_s: the longest wait for another rank; the report is made shortly before.
        terminal: where to write warning and report.
    """

    def __init__(self, folder: Path, world_size: int, timeout_s: float, terminal: TextIO) -> None:
        self._folder = folder
        self._ranks = range(world_size)
        self._report_s = max(timeout_s - _BEFORE_LIMIT_S, 0.8 * timeout_s)
        self._terminal = terminal
        self._monitor: HangMonitor | None = None
        self._num_beats = 0
        self._has_reported = False

    def __call__(self, beat: Heartbeat) -> None:
        # The heartbeats of the others are not read before there is a reason to.
        if beat.doing_s < _SHORTEST_STALL_S / 2:
            self._monitor = None
            return
        if self._monitor is None:
            self._monitor, self._num_beats, self._has_reported = HangMonitor(self._folder, self._ranks), 0, False
        self._monitor.listen()
        self._num_beats += 1
        if self._num_beats <= _MISSED_BEATS + 1 or self._monitor.first_speaker() != beat.rank:
            return
        self._monitor.warn(self._terminal)
        if beat.is_waiting and beat.doing_s > self._report_s and not self._has_reported:
            self._has_reported = True
            self._terminal.write(f"{save_report(self._monitor.report(), self._folder)}\n")
            self._terminal.flush()


def save_report(report: str, folder: Path) -> str:
    """Write a report of a hang into the folder of the logs, and return it with the path of its file."""
    path = folder / REPORT_FILE
    try:
        write_atomically(path, f"{report}\n")
    except OSError as error:
        return f"{report}\n\n{storage_error(error, path)}"
    return f"{report}\n\nsaved in {path}"

"""Starting a run again after a rank was lost or hung, from its newest checkpoint, and never without progress."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from pipekit.errors import CheckpointError, ExitCode, PipekitError
from pipekit.launch.environment import RankEnvironment
from pipekit.launch.failures import RankError
from pipekit.launch.worker import error_file_from
from pipekit.line_files import append_record, utc_now
from pipekit.signals import ending_at_once

# Mistakes, numbers and full disks would be the same again.
_WORTH_ANOTHER_START = (ExitCode.RANK_LOST, ExitCode.HANG)
# Drivers and ports of the ranks that were ended are free by then.
_PAUSE_S = 1.0


def start_until_done(
    start: Callable[[bool], None],
    *,
    restarts: int,
    failures: Path,
    checkpoints: Path | None,
    page: Path | None = None,
    pause_s: float = _PAUSE_S,
) -> None:
    """Start the ranks of a run, and again when a rank is lost or hangs, `restarts` times at most.

    Where a start fails that has written no checkpoint since the failure before, there is no other, whatever `restarts`
    is. Every failure is written down, and told in one line on stderr.

    Args:
        start: starts all ranks and returns when they have succeeded. It is told whether checkpoints have been written
            since the first start, from the newest of which it must go on then, whatever the first began with.
        restarts: the most starts beside the first.
        failures: the file to which a line of JSON is appended for each failure.
        checkpoints: the folder of the checkpoints; None where it is not known, and `restarts` alone is the limit.
        page: the run's page, which is written again after a failure if there is one.
        pause_s: seconds between the end of one start and the next.

    Raises:
        PipekitError: the error of the last start, which says why there is no other; and at once any error of the kinds
            that a start would not change.
        Interrupted: if a signal comes between two starts.
    """
    first = before = _newest(checkpoints)
    for number in count(1):
        try:
            start(before != first)
            return
        except PipekitError as error:
            if error.exit_code not in _WORTH_ANOTHER_START:
                raise
            newest = _newest(checkpoints)
            place = "the start" if newest is None else newest[0]
            reason = None
            if number > restarts:
                reason = f"started {number} times, which is all that restarts={restarts} allows" if restarts else ""
            elif number > 1 and checkpoints is not None and newest == before:
                where = "before the first checkpoint" if newest is None else f"after {place}"
                reason = f"failed twice {where} without a newer checkpoint, and is not started again"
            outcome = f"restart {number} of {restarts}, from {place}" if reason is None else "the end"
            _record(error, failures, number, None if newest is None else newest[0], outcome)
            if page is not None and page.exists():
                _write_again(page)
            if reason is not None:
                if reason:
                    error.args = (f"{error}\n{reason}",)
                raise
            what = str(error).splitlines()[0].rstrip(":")
            sys.stderr.write(f"{what}{_phase(error)}; {outcome} (see {failures})\n")
            before = newest
        _pause(pause_s, outcome)


def warn_of_restarts(restarts: int, ranks: RankEnvironment) -> None:
    """Say that `run.restarts` is ignored where another launcher has started the ranks, which starts them again."""
    if restarts and ranks.rank == 0 and error_file_from(os.environ) is None:
        instead = " with --max-restarts" if ranks.launcher == "torchrun" else ""
        sys.stderr.write(
            f"run.restarts={restarts} is ignored: starting ranks again is left to {ranks.launcher}{instead}\n"
        )


def _pause(seconds: float, outcome: str) -> None:
    with ending_at_once(lambda: f"next was {outcome}"):
        time.sleep(seconds)


def _newest(checkpoints: Path | None) -> tuple[str, int] | None:
    """The newest checkpoint, and when it was written; one of the same step may be written again."""
    from pipekit.checkpoint.manifest import MANIFEST_FILE, find_latest

    with suppress(CheckpointError, OSError):
        if checkpoints is not None and (latest := find_latest(checkpoints)) is not None:
            return latest.name, (latest / MANIFEST_FILE).stat().st_mtime_ns
    return None


def _phase(error: PipekitError) -> str:
    phase = error.failure.phase if isinstance(error, RankError) else ""
    return f", last seen in {phase}" if phase else ""


def _write_again(page: Path) -> None:
    from pipekit.pages.run_page import write_run_page
    from pipekit.pages.run_record import RunRecord

    # A faulty page must not hide the failure.
    with suppress(Exception):
        write_run_page([RunRecord.read(page.parent)], page)


def _record(error: PipekitError, file: Path, number: int, checkpoint: str | None, outcome: str) -> None:
    failure = error.failure if isinstance(error, RankError) else None
    record = {
        "time": utc_now(),
        "failure": number,
        "kind": error.exit_code.name.lower(),
        "rank": None if failure is None else failure.rank,
        "host": getattr(error, "host", None) or socket.gethostname(),
        "phase": None if failure is None else failure.phase or None,
        "message": str(error).splitlines()[0],
        "checkpoint": checkpoint,
        "then": outcome,
    }
    append_record(file, record)

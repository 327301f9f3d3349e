"""Failures of ranks: reports, the first failure, and its message.

When one rank fails, its neighbours lose their connection and fail too. The user wants to read about the first
one only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pipekit.errors import ExitCode, LaunchError
from pipekit.files import write_atomically

_SHOWN_LINES = 20
_TAIL_BYTES = 64 * 1024
# A character takes 6 bytes at most in JSON.
_ROOM_BYTES = 32 * 1024

FailureKind = Literal["user", "crash", "peer"]


@dataclass(frozen=True)
class FailureReport:
    """Report that a failing worker writes about itself.

    Attributes:
        kind: "user" is an error with a message of its own; "peer" is the loss of another rank, so the fault is
            elsewhere; "crash" is any other exception.
        message: one line, or a few.
        traceback: the whole traceback.
        time_s: when it happened, in seconds since 1970.
        exit_code: with which the run ends.
    """

    kind: FailureKind
    message: str
    traceback: str
    time_s: float
    exit_code: int

    def write(self, path: Path) -> None:
        """Write the report to `path`, whole or not at all; where the disk is full, into the room that is kept there."""
        try:
            write_atomically(path, json.dumps(asdict(self)))
        except OSError:
            shortened = replace(
                self, message=self.message[: _ROOM_BYTES // 16], traceback=self.traceback[-_ROOM_BYTES // 16 :]
            )
            with path.open("rb+") as file:
                file.write(json.dumps(asdict(shortened)).ljust(_ROOM_BYTES).encode())

    @staticmethod
    def keep_room(path: Path) -> None:
        """Make a file that is no report, and has room for one when the disk is full."""
        path.write_bytes(b" " * _ROOM_BYTES)

    @classmethod
    def read(cls, path: Path) -> FailureReport | None:
        """Return the report at `path`, or None where there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        return None


@dataclass(frozen=True)
class RankFailure:
    """End of one rank that failed.

    Attributes:
        rank: the rank.
        returncode: exit code, or minus the number of the signal that killed it.
        time_s: when it was seen to have ended, in seconds since 1970.
        report: what it wrote about itself; None where it had no chance to.
        log: the rank's log file.
        log_start: size of the log in bytes before this launch.
        phase: what its last heartbeat was in, such as "step 12"; empty if there was none.
    """

    rank: int
    returncode: int
    time_s: float
    report: FailureReport | None
    log: Path
    log_start: int = 0
    phase: str = ""

    @property
    def has_stopped(self) -> bool:
        """True if the rank has not failed, but stopped on request, with a checkpoint."""
        # One that has saved and said so may still be killed on its way out.
        return ExitCode.STOPPED in (self.returncode, None if self.report is None else self.report.exit_code)


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure that caused the others.

    A rank that only lost another one is blamed last. Among the rest the earliest counts.
    """

    def order(failure: RankFailure) -> tuple[bool, float, int]:
        report = failure.report
        return report is not None and report.kind == "peer", (report or failure).time_s, failure.rank

    return min(failures, key=order)


class RankError(LaunchError):
    """One rank's failure, as the end of the run.

    Attributes:
        failure: the rank, what it wrote about itself, and where its log is.
    """

    def __init__(self, failure: RankFailure) -> None:
        self.failure = failure
        self.exit_code = ExitCode.RANK_LOST if failure.report is None else ExitCode(failure.report.exit_code)
        super().__init__(describe_failure(failure))


class HangError(LaunchError):
    """Ranks of a run have waited too long for another; the message is the report."""

    exit_code = ExitCode.HANG


class TimeLimitError(LaunchError):
    """Ranks were ended since they had not finished within a time limit."""


def describe_failure(failure: RankFailure, *, names_rank: bool = True, names_log: bool = True) -> str:
    """Return the message for the user: the rank, what happened, and where to read on.

    An error with a message of its own is shown as that message alone; a crash with the end of its traceback, or of its
    log.
    """
    report = failure.report
    if report is None:
        tail = tail_of_log(failure.log, start=failure.log_start) or "(nothing)"
        ending, text = "", f"{_describe_end(failure.returncode)}\nits last output:\n{tail}"
    elif report.kind == "user":
        ending, text = ":", report.message
    elif report.kind == "peer":
        ending, text = "", f"lost contact with another rank: {report.message}"
    else:
        lines = report.traceback.rstrip().splitlines()[-_SHOWN_LINES:]
        ending, text = " failed:", "\n".join([report.message, *lines])
    text = f"rank {failure.rank}{ending} {text}" if names_rank else text
    logs = names_log and (report is None or report.kind != "user")
    return f"{text}\nthe whole log of rank {failure.rank}: {failure.log}" if logs else text


def tail_of_log(log: Path, *, start: int = 0) -> str:
    """Return the last lines of a log, not counting its first `start` bytes."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-_SHOWN_LINES:])


def _describe_end(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}, without a message"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = "; out of memory?" if -returncode == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"

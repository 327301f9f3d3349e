"""Clock: plausible time, and time synchronization."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from pipekit.doctor.rows import Row, Site

_STA_UNSYNC = 0x0040  # linux/timex.h
_STATUS_OFFSET = 5 * ctypes.sizeof(ctypes.c_long)


def check_clock(site: Site) -> list[Row]:
    """Time and date of this machine."""
    return judge_clock(time.time(), Path(__file__).stat().st_mtime, has_time_service())


def judge_clock(now_s: float, newest_file_s: float, is_set: bool | None) -> list[Row]:
    """Row of the clock.

    Args:
        now_s: seconds since 1970.
        newest_file_s: modification time of one of pipekit's files, which cannot be in the future.
        is_set: whether the clock is synchronized; None if unknown.
    """
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    advice = "Turn on time synchronization: sudo timedatectl set-ntp true"
    if now_s < newest_file_s - 86400:
        return [Row("clock", "bad", f"{shown}, which is before pipekit's files were written", advice)]
    # Hosts need clocks that agree, and are compared with each other.
    notes = {True: ", synchronized", False: ", not synchronized", None: ""}
    return [Row("clock", "ok", f"{shown}{notes[is_set]}")]


def has_time_service() -> bool | None:
    """True if the kernel's clock is synchronized; None if unknown.

    Source: adjtimex(2).
    """
    if sys.platform != "linux":
        return None
    request = ctypes.create_string_buffer(512)  # a struct timex, with modes=0: read only
    if ctypes.CDLL(None, use_errno=True).adjtimex(request) < 0:
        return None
    status = ctypes.c_int.from_buffer(request, _STATUS_OFFSET).value
    return not status & _STA_UNSYNC

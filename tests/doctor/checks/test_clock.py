"""Verdicts on the clock."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from pipekit.doctor.checks.clock import has_time_service, judge_clock

NOW_S = 1_800_000_000.0


def test_a_clock_before_the_files_of_pipekit_is_bad() -> None:
    assert judge_clock(0.0, NOW_S, None)[0].verdict == "bad"
    (row,) = judge_clock(NOW_S, NOW_S - 1000, True)
    assert (row.verdict, row.found) == ("ok", "2027-01-15 08:00:00 UTC, synchronized")
    # A file that was written on another machine a little ahead.
    assert judge_clock(NOW_S, NOW_S + 3600, False)[0].verdict == "ok"


def test_the_kernel_is_asked() -> None:
    assert (has_time_service() is not None) == (sys.platform == "linux")


class Timex(ctypes.Structure):
    """The beginning of a struct timex. Source: adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((name, ctypes.c_long) for name in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
    )


@pytest.mark.parametrize(("status", "is_set"), [(0x0040, False), (0x2001, True), (0x2041, False)])
def test_the_status_of_the_kernel_says_whether_the_clock_is_set(
    status: int, is_set: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adjtimex(request: ctypes.Array[ctypes.c_char]) -> int:
        assert Timex.from_buffer(request).modes == 0, "nothing is changed"
        Timex.from_buffer(request).status = status
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: SimpleNamespace(adjtimex=adjtimex))
    monkeypatch.setattr(sys, "platform", "linux")
    assert has_time_service() is is_set

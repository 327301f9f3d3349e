"""Verdicts on the clock."""

from __future__ import annotations

import sys

from pipekit.doctor.checks.clock import has_time_service, judge_clock

NOW_S = 1_800_000_000.0


def test_a_clock_before_the_files_of_pipekit_is_bad() -> None:
    assert judge_clock(0.0, NOW_S, None)[0].verdict == "bad"
    (row,) = judge_clock(NOW_S, NOW_S - 1000, True)
    assert (row.verdict, row.found) == ("ok", "2027-01-15 08:00:00 UTC, set by a time service")
    # A file that was written on another machine a little ahead.
    assert judge_clock(NOW_S, NOW_S + 3600, False)[0].verdict == "ok"


def test_the_kernel_is_asked() -> None:
    assert (has_time_service() is not None) == (sys.platform == "linux")

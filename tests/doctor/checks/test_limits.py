"""Verdicts on the limits of a process."""

from __future__ import annotations

from math import inf

from pipekit.doctor.checks.limits import judge_locked_memory, judge_open_files, judge_processes


def test_few_open_files() -> None:
    assert [judge_open_files(soft, 1e6)[0].verdict for soft in (inf, 4096.0, 1024.0, 128.0)] == [
        "ok",
        "ok",
        "warning",
        "bad",
    ]
    assert judge_open_files(1024.0, 524288.0)[0].advice == "Type before the start: ulimit -n 65536"
    assert judge_open_files(1024.0, 8192.0)[0].advice == "Type before the start: ulimit -n 8192"
    assert "limits.conf" in judge_open_files(1024.0, 1024.0)[0].advice


def test_locked_memory_matters_where_there_is_infiniband() -> None:
    assert judge_locked_memory(65536.0, 0)[0].verdict == "ok"
    assert judge_locked_memory(65536.0, 8)[0].verdict == "bad"
    assert judge_locked_memory(inf, 8)[0].verdict == "ok"


def test_few_processes() -> None:
    assert judge_processes(100.0)[0].verdict == "warning"
    assert judge_processes(inf)[0].found == "unlimited"

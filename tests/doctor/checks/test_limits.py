"""Verdicts on the limits of a process."""

from __future__ import annotations

import resource
from math import inf
from pathlib import Path

import pytest

from pipekit.doctor.checks.limits import (
    check_locked_memory,
    check_open_files,
    judge_locked_memory,
    judge_open_files,
    judge_processes,
)
from pipekit.doctor.rows import Site


def test_few_open_files() -> None:
    assert [judge_open_files(soft, 1e6)[0].verdict for soft in (inf, 4096.0, 1024.0, 128.0)] == [
        "ok",
        "ok",
        "warning",
        "bad",
    ]
    assert judge_open_files(1024.0, 524288.0)[0].advice == "Before a run, type: ulimit -n 65536"
    assert judge_open_files(1024.0, 8192.0)[0].advice == "Before a run, type: ulimit -n 8192"
    assert "limits.conf" in judge_open_files(1024.0, 1024.0)[0].advice


def test_locked_memory_matters_where_there_is_infiniband() -> None:
    assert judge_locked_memory(65536.0, 0)[0].verdict == "ok"
    assert judge_locked_memory(65536.0, 8)[0].verdict == "bad"
    assert judge_locked_memory(inf, 8)[0].verdict == "ok"


def test_few_processes() -> None:
    assert judge_processes(100.0)[0].verdict == "warning"
    assert judge_processes(inf)[0].found == "unlimited"


def test_the_limits_of_the_system_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site({}, Path("runs"), Path("cache"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert check_open_files(site) == judge_open_files(float(soft), float(hard))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert check_open_files(site)[0].found == "unlimited"
    assert check_locked_memory(site)[0].found == "unlimited"

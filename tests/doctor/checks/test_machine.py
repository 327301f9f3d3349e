"""Verdicts on cores, memory and shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipekit.doctor.checks.machine import (
    MemoryFacts,
    judge_cores,
    judge_memory,
    judge_shared_memory,
    measure_memory,
)

GB, MIB = 1e9, 2.0**20


def test_cores_of_a_container_are_told_from_those_of_the_machine() -> None:
    assert judge_cores(8, 8, None)[0].found == "8"
    assert judge_cores(8, 2, None)[0].found == "2 of the machine's 8 may be used"
    assert judge_cores(64, 4, 8)[0].verdict == "warning"


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        (MemoryFacts(64 * GB, 60 * GB), "ok"),
        (MemoryFacts(64 * GB, 3 * GB), "warning"),
        (MemoryFacts(64 * GB, 1 * GB), "bad"),
        (MemoryFacts(64 * GB, 60 * GB, limit=1 * GB, used=0.5 * GB), "bad"),
        (MemoryFacts(64 * GB, 60 * GB, limit=32 * GB, used=31 * GB), "ok"),
    ],
)
def test_little_memory(facts: MemoryFacts, verdict: str) -> None:
    assert judge_memory(facts)[0].verdict == verdict


@pytest.mark.parametrize(
    ("limit_file", "used_file"),
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_memory_and_the_limits_of_both_kinds_of_control_groups_are_read(
    tmp_path: Path, limit_file: str, used_file: str
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000000 kB\nMemFree:  10 kB\nMemAvailable:    5000000 kB\n")
    assert measure_memory(meminfo, tmp_path) == MemoryFacts(8.192e9, 5.12e9)
    (tmp_path / limit_file).parent.mkdir(exist_ok=True)
    (tmp_path / used_file).write_text("1000000\n")
    (tmp_path / limit_file).write_text("4000000000\n")
    assert measure_memory(meminfo, tmp_path) == MemoryFacts(8.192e9, 5.12e9, 4e9, 1e6)
    for unlimited in ("max\n", "9223372036854771712\n"):
        (tmp_path / limit_file).write_text(unlimited)
        assert measure_memory(meminfo, tmp_path).limit is None


@pytest.mark.parametrize(
    ("total", "free", "num_gpus", "verdict"),
    [
        (16384 * MIB, 16000 * MIB, 8, "ok"),
        (64 * MIB, 64 * MIB, None, "warning"),
        (64 * MIB, 64 * MIB, 1, "warning"),
        (64 * MIB, 64 * MIB, 2, "bad"),
        (16384 * MIB, 0, 2, "bad"),
        (512 * MIB, 512 * MIB, 2, "warning"),
        (None, 0, None, "warning"),
        (None, 0, 8, "bad"),
    ],
)
def test_a_small_shared_memory(total: float | None, free: float, num_gpus: int | None, verdict: str) -> None:
    (row,) = judge_shared_memory(total, free, num_gpus)
    assert row.verdict == verdict
    assert ("--shm-size" in row.advice) == (verdict != "ok")

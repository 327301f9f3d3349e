"""Verdicts on disks, and what writing into a folder finds out."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipekit.doctor.checks import storage
from pipekit.doctor.checks.storage import StorageFacts, check_cache_folder, judge_storage, measure_storage
from pipekit.doctor.rows import Site

GOOD = StorageFacts("/data", "ext4", 500e9, 1_000_000, bytes_per_s=500e6, small_file_s=0.002)


def verdicts(keeps: bool = True, **changes: object) -> list[str]:
    return [row.verdict for row in judge_storage("runs", replace(GOOD, **changes), keeps=keeps)]  # type: ignore[arg-type]


def test_a_good_disk() -> None:
    assert verdicts() == ["ok", "ok", "ok"]
    assert [row.found for row in judge_storage("runs", GOOD, keeps=True)] == [
        "/data (ext4), 500.0 GB free",
        "500 MB/s; a small file in 2.0 ms",
        "files can be locked, and renames replace them",
    ]


def test_a_full_disk_is_bad() -> None:
    assert verdicts(free_bytes=0.5e9) == ["bad", "ok", "ok"]
    assert verdicts(free_bytes=5e9) == ["warning", "ok", "ok"]
    assert verdicts(free_inodes=12) == ["bad", "ok", "ok"]
    assert verdicts(free_inodes=None) == ["ok", "ok", "ok"]


def test_a_folder_that_cannot_be_written_is_bad() -> None:
    (row,) = judge_storage("runs", replace(GOOD, error="Read-only file system"), keeps=True)
    assert (row.verdict, row.found) == ("bad", "/data (ext4) cannot be written: Read-only file system")


def test_runs_in_memory_are_a_warning_and_a_cache_is_none() -> None:
    assert verdicts(file_system="tmpfs")[0] == "warning"
    assert verdicts(file_system="tmpfs", keeps=False)[0] == "ok"


def test_a_slow_disk_is_a_warning() -> None:
    assert verdicts(bytes_per_s=5e6) == ["ok", "warning", "ok"]
    assert verdicts(small_file_s=0.5) == ["ok", "warning", "ok"]


def test_a_file_system_that_does_not_keep_its_promises() -> None:
    assert verdicts(renames=False)[2] == "bad"
    assert verdicts(locks=False)[2] == "warning"
    assert verdicts(clock_ahead_s=-60.0)[2] == "warning"


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MOST_CHUNKS", 1)
    monkeypatch.setattr(storage, "_MOST_SMALL", 2)
    facts = measure_storage(tmp_path)
    assert facts.error is None
    assert facts.locks
    assert facts.renames
    assert abs(facts.clock_ahead_s) < 5
    assert facts.bytes_per_s > 0
    assert facts.small_file_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_is_the_error_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert measure_storage(tmp_path).error == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_cache_on_the_disk_of_the_runs_is_measured_once(tmp_path: Path) -> None:
    (row,) = check_cache_folder(Site({}, tmp_path / "runs", tmp_path / "cache"))
    assert (row.verdict, row.found) == ("ok", f"{tmp_path}, on the same disk as the runs")


def test_a_cache_that_cannot_be_written_is_a_finding_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    (row,) = check_cache_folder(Site({}, tmp_path / "runs", tmp_path / "cache"))
    assert (row.check, row.verdict) == ("cache", "bad")
    assert row.found.endswith("cannot be written: Permission denied")


def test_locks_that_hold_nobody_off_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_MOST_CHUNKS", 1)
    monkeypatch.setattr(storage, "_MOST_SMALL", 1)
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    assert not measure_storage(tmp_path).locks

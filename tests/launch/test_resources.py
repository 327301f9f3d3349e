"""Counting devices and cores."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from pipekit.launch import resources
from pipekit.launch.resources import (
    num_accelerators,
    num_usable_cpus,
    num_visible,
    thread_environ,
    threads_per_process,
)


@pytest.mark.parametrize(
    ("setting", "num_local_ranks", "num_cpus", "expected"),
    [("auto", 1, 16, 16), ("auto", 4, 18, 4), ("auto", 8, 2, 1), (3, 8, 2, 3)],
)
def test_threads_per_process(setting: int, num_local_ranks: int, num_cpus: int, expected: int) -> None:
    assert threads_per_process(setting, num_local_ranks, num_cpus) == expected


def test_the_users_own_thread_count_wins_over_auto_only() -> None:
    assert thread_environ("auto", 1, {"OMP_NUM_THREADS": "7"}) == {"OMP_NUM_THREADS": "7"}
    assert thread_environ(2, 1, {"OMP_NUM_THREADS": "7"}) == {"OMP_NUM_THREADS": "2"}
    assert thread_environ("auto", 10**6, {}) == {"OMP_NUM_THREADS": "1"}


def test_usable_cpus_are_held_to_the_container_limit(tmp_path: Path) -> None:
    unlimited = num_usable_cpus(tmp_path / "missing")
    assert 1 <= unlimited <= (os.cpu_count() or 1)
    limit = tmp_path / "cpu.max"
    limit.write_text("max 100000\n")
    assert num_usable_cpus(limit) == unlimited
    limit.write_text("100000 100000\n")
    assert num_usable_cpus(limit) == 1
    limit.write_text("50000 100000\n")  # half a core is one thread all the same
    assert num_usable_cpus(limit) == 1


@pytest.fixture
def four_gpus(tmp_path: Path) -> Path:
    for bus in range(4):
        (tmp_path / "gpus" / f"0000:0{bus}:00.0").mkdir(parents=True)
    return tmp_path / "gpus"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 4),
        ("0,1", 2),
        (" 3 , 2 ", 2),
        ("GPU-6d1b3b2e,GPU-aa", 2),
        ("", None),
        ("-1", None),
        ("NoDevFiles", None),
        ("7", None),
    ],
)
def test_visible_devices_are_honoured(four_gpus: Path, visible: str | None, expected: int | None) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert num_accelerators(environ, four_gpus) == expected


def test_counting_stops_at_the_first_device_that_does_not_exist() -> None:
    assert num_visible("0,1,9,2", 4) == 2


def test_no_driver_means_no_device(tmp_path: Path) -> None:
    assert num_accelerators({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path / "none") is None


def nvidia_smi(folder: Path, script: str) -> dict[str, str]:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": str(folder)}


def test_nvidia_smi_is_asked_where_the_driver_lists_nothing(tmp_path: Path) -> None:
    script = "echo 'GPU 0: A (UUID: GPU-1)'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'; echo 'GPU 1: A'"
    assert num_accelerators(nvidia_smi(tmp_path, script), tmp_path / "none") == 2


@pytest.mark.parametrize("script", ["exit 9", "exec /bin/sleep 60"])
def test_an_nvidia_smi_that_fails_or_hangs_counts_as_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(resources, "_NVIDIA_SMI_TIMEOUT_S", 0.3)
    started_s = time.monotonic()
    assert num_accelerators(nvidia_smi(tmp_path, script), tmp_path / "none") is None
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 3),
        ({"HIP_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0,1"}, 1),
        ({"HIP_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_amd_gpus_are_counted_where_torch_is_for_rocm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: int | None
) -> None:
    for node, num_simds in enumerate([0, 0, 304, 304, 304]):  # two processors, three GPUs
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"cpu_cores_count 8\nsimd_count {num_simds}\nmem_banks 1\n")
    nothing = {"PATH": str(tmp_path)}
    assert num_accelerators({**environ, **nothing}, tmp_path / "none", tmp_path) is None
    monkeypatch.setattr(resources, "_torch_is_for_rocm", lambda: True)
    assert num_accelerators({**environ, **nothing}, tmp_path / "none", tmp_path) == expected

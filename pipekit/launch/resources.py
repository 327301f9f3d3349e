"""Accelerators and processor cores of this machine, counted without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

_NVIDIA_SMI_TIMEOUT_S = 20.0


def threads_per_process(setting: Literal["auto"] | int, num_local_ranks: int, num_cpus: int) -> int:
    """Number of threads that each process computes with.

    Args:
        setting: the configured number; "auto" divides the cores among the processes.
        num_local_ranks: number of processes on this machine.
        num_cpus: number of cores that they may use together.

    Example:
        >>> threads_per_process("auto", 4, 10)
        2
        >>> threads_per_process("auto", 8, 2)
        1
        >>> threads_per_process(3, 8, 2)
        3
    """
    return max(1, num_cpus // num_local_ranks) if setting == "auto" else setting


def thread_environ(setting: Literal["auto"] | int, num_local_ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that limit numerical libraries to a process's threads.

    An `OMP_NUM_THREADS` of the user's own wins over "auto", and a configured number wins over both.
    """
    if setting == "auto" and environ.get("OMP_NUM_THREADS"):
        return {"OMP_NUM_THREADS": environ["OMP_NUM_THREADS"]}
    return {"OMP_NUM_THREADS": str(threads_per_process(setting, num_local_ranks, num_usable_cpus()))}


def num_usable_cpus(cgroup_limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of cores that this process may use: its affinity, and its container's limit.

    Args:
        cgroup_limit: the file with the container's quota and period, in microseconds.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        return max(1, min(num_cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return num_cpus


def num_accelerators(environ: Mapping[str, str], driver_dir: Path = Path("/proc/driver/nvidia/gpus")) -> int | None:
    """Return the number of CUDA devices that a process would see, or None where there is none.

    Asks the NVIDIA driver, not torch: it takes milliseconds, and holds no memory on any device.

    Args:
        environ: the environment variables; `CUDA_VISIBLE_DEVICES` is honoured.
        driver_dir: where the driver lists its devices.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return None
    present = _num_present(environ, driver_dir)
    if visible is None or present == 0:
        return present or None
    return num_visible(visible, present) or None


def num_visible(cuda_visible_devices: str, num_present: int) -> int:
    """Number of devices that `CUDA_VISIBLE_DEVICES` leaves visible.

    As CUDA counts: those named before the first that does not exist.

    Example:
        >>> num_visible("2,3", 8)
        2
        >>> num_visible("0,-1,1", 8)
        1
    """
    count = 0
    for name in cuda_visible_devices.split(","):
        name = name.strip()
        exists = int(name) < num_present if name.isdigit() else name.startswith(("GPU-", "MIG-"))
        if not exists:
            break
        count += 1
    return count


def _num_present(environ: Mapping[str, str], driver_dir: Path) -> int:
    try:
        count = sum(1 for _ in driver_dir.iterdir())
    except OSError:
        count = 0
    if count > 0:
        return count
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))  # under WSL the driver has no /proc entries
    if program is None:
        return 0
    try:
        listing = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())

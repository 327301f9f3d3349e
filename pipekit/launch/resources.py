"""Resources of this machine: accelerators, processor cores and memory, counted without importing torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipekit.errors import ConfigError
from pipekit.plan.resources import Resources, threads_per_process

if TYPE_CHECKING:
    from pipekit.config import Config
    from pipekit.config.trial_config import TrialConfig

_NVIDIA_SMI_TIMEOUT_S = 20.0
_NEVER_ASK_MEMORY = ("parameters", "uniform", "flops", "profile", "manual")


def find_resources(
    environ: Mapping[str, str],
    config: Config,
    *,
    world_size: int | None = None,
    local_world_size: int | None = None,
    asks_gpu: bool = False,
) -> Resources:
    """Find what a run may use on this machine. Of GPUs, torch is asked only where a decision needs it.

    Args:
        environ: the environment variables.
        config: the configuration.
        world_size: number of processes, where another launcher has started them.
        local_world_size: number of those on this machine, where that is known.
        asks_gpu: whether name and memory of the GPU are needed whatever is configured.
    """
    num_gpus = None if config.run.device == "cpu" else num_accelerators(environ)
    found = Resources(
        num_cpus=num_usable_cpus(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        num_gpus=num_gpus,
        world_size=world_size,
        local_world_size=local_world_size,
    )
    parallel = config.parallel
    if num_gpus and (asks_gpu or parallel.auto or parallel.partition not in _NEVER_ASK_MEMORY):
        import torch

        gpu = torch.cuda.get_device_properties(0)
        found = replace(found, gpu_name=gpu.name, gpu_memory_bytes=gpu.total_memory)
    return found


def thread_environ(setting: Literal["auto"] | int, num_local_ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that limit numerical libraries to a process's threads.

    An `OMP_NUM_THREADS` of the user's own wins over "auto", and a configured number wins over both.
    """
    if setting == "auto" and environ.get("OMP_NUM_THREADS"):
        return {"OMP_NUM_THREADS": environ["OMP_NUM_THREADS"]}
    return {"OMP_NUM_THREADS": str(threads_per_process(setting, num_local_ranks, num_usable_cpus()))}


def num_usable_cpus(cgroup_limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of cores that this process may use: its affinity, and its container's limit.

    `cgroup_limit` is the file with the container's quota and period, in microseconds.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text().split()
        return max(1, min(num_cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or a quota of "max"
        return num_cpus


def num_accelerators(
    environ: Mapping[str, str],
    driver_dir: Path = Path("/proc/driver/nvidia/gpus"),
    amd_dir: Path = Path("/sys/class/kfd/kfd/topology/nodes"),
) -> int | None:
    """Number of NVIDIA's GPUs, or AMD's under a torch for ROCm, that a process would see; None where there is none.

    Asks the driver, not torch: it takes milliseconds, and holds no memory on any device.

    `driver_dir` and `amd_dir` are where the drivers list their devices. `CUDA_VISIBLE_DEVICES` is honoured, and under
    ROCm `HIP_VISIBLE_DEVICES`, which wins over it, and `ROCR_VISIBLE_DEVICES`, which hides devices from both.
    """
    if _torch_is_for_rocm():
        present = sum(_is_amd_gpu(node) for node in amd_dir.glob("*/properties"))
        hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
        lists = [environ.get("ROCR_VISIBLE_DEVICES"), environ.get(hip)]
    else:
        lists = [environ.get("CUDA_VISIBLE_DEVICES")]
        if lists[0] is not None and not lists[0].strip():
            return None
        present = _num_present(environ, driver_dir)
    for visible in lists:
        present = num_visible(visible, present) if visible is not None and present else present
    return present or None


def count_gpus(device: Literal["auto", "cpu", "cuda"], environ: Mapping[str, str]) -> int | None:
    """Number of GPUs to compute on; None for the CPU, which `auto` takes where there are none.

    Raises:
        ConfigError: if GPUs are asked for, and there are none.
    """
    num_gpus = None if device == "cpu" else num_accelerators(environ)
    if device == "cuda" and not num_gpus:
        raise ConfigError("device=cuda: no GPU is present; use auto or cpu")
    return num_gpus


def processes_text(number: int) -> str:
    """Number of processes in words.

    Example:
        >>> processes_text(1), processes_text(4)
        ('1 process', '4 processes')
    """
    return f"{number} {'process' if number == 1 else 'processes'}"


def check_process_count(number: int, key: str) -> None:
    """Check that this machine can start so many processes; `key` is what asks for them.

    Raises:
        ConfigError: if it cannot.
    """
    most = max(64, 16 * num_usable_cpus())
    if number > most:
        raise ConfigError(
            f"{key}: {number:,} processes are more than this machine of {num_usable_cpus()} cores runs, which starts "
            f"{most} at most; ask for fewer, or start them on several machines"
        )


def check_degrees(config: Config | TrialConfig, *, world_size: int | None, num_devices: int | None) -> int:
    """Check that the parallel degrees and the batch fit the number of processes, or of devices where that is not known.

    Returns:
        The number of ranks; 1 where planning chooses the degrees, or a trial its own.

    Raises:
        ConfigError: if they do not fit.
    """
    from pipekit.config import plan_batch, resolve_layout

    if hasattr(config, "trial") or config.parallel.auto:
        return 1
    layout = resolve_layout(config, world_size=world_size, num_devices=num_devices)
    plan_batch(config, layout.dp)
    return layout.world_size


def num_visible(cuda_visible_devices: str, num_present: int) -> int:
    """Number of devices that `CUDA_VISIBLE_DEVICES`, or ROCm's variable in its place, leaves visible.

    As CUDA counts: those named before the first that does not exist.

    Example:
        >>> num_visible("2,3", 8)
        2
        >>> num_visible("0,-1,1", 8)
        1
    """
    names = (name.strip() for name in cuda_visible_devices.split(","))
    exist = (int(name) < num_present if name.isdigit() else name.startswith(("GPU-", "MIG-")) for name in names)
    return sum(takewhile(bool, exist))


def _torch_is_for_rocm() -> bool:
    found = find_spec("torch")
    folders = (found and found.submodule_search_locations) or []
    return any(Path(folder, "lib", "libtorch_hip.so").exists() for folder in folders)


def _is_amd_gpu(properties: Path) -> bool:
    # Processors are nodes, too, and have no SIMD units.
    with suppress(OSError):
        return re.search(r"^simd_count [1-9]", properties.read_text(), re.MULTILINE) is not None
    return False


def _num_present(environ: Mapping[str, str], driver_dir: Path) -> int:
    with suppress(OSError):
        if count := len(list(driver_dir.iterdir())):
            return count
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))  # under WSL the driver has no /proc entries
    if program is None:
        return 0
    with suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
        return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return 0

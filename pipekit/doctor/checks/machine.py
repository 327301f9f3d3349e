"""Cores, memory and shared memory, with the limits of a container."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipekit.doctor.rows import Row, Site, Verdict
from pipekit.launch.resources import num_usable_cpus

_CGROUP = Path("/sys/fs/cgroup")
# Files with the limit and the use, in both versions of control groups.
_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# Docker's default is 64 MiB.
_SMALL_SHM, _TINY_SHM = 1 << 30, 128 << 20
_LITTLE_MEMORY, _TINY_MEMORY = 4e9, 1.5e9


@dataclass(frozen=True)
class MemoryFacts:
    """Memory in bytes: total and available on the machine, and the limit and use of a container, if any."""

    total: float
    available: float
    limit: float | None = None
    used: float = 0.0


def check_cores(site: Site) -> list[Row]:
    """Processor cores."""
    return judge_cores(os.cpu_count() or 1, num_usable_cpus(), site.num_gpus)


def check_memory(site: Site) -> list[Row]:
    """Host memory."""
    return judge_memory(measure_memory())


def check_shared_memory(site: Site) -> list[Row]:
    """Shared memory in `/dev/shm`, which NCCL and torch's data loaders use."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return judge_shared_memory(None, 0, site.num_gpus)
    usage = shutil.disk_usage(folder)
    return judge_shared_memory(usage.total, usage.free if os.access(folder, os.W_OK) else 0, site.num_gpus)


def judge_cores(present: int, usable: int, num_gpus: int | None) -> list[Row]:
    """Row of the machine's cores, and those that this process may use."""
    text = f"{usable}" if usable == present else f"{usable} of the machine's {present} may be used"
    measured = {"present": present, "usable": usable}
    if num_gpus and usable < num_gpus:
        advice = "Give the container (--cpus) or the job (--cpus-per-task) more cores; each GPU's process needs one."
        return [Row("cores", "warning", f"{text}, for {num_gpus} GPUs", advice, measured)]
    return [Row("cores", "ok", text, measured=measured)]


def measure_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> MemoryFacts:
    """Read the machine's and the container's memory."""
    sizes: dict[str, float] = {}
    with suppress(OSError):
        sizes = {
            name: 1024.0 * int(number)
            for name, number in re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        }
    total = sizes.get("MemTotal") or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    available = sizes.get("MemAvailable", total)
    for limit_file, used_file in _MEMORY_FILES:
        with suppress(OSError, ValueError):  # no such file, or a limit of "max"
            limit = float(int((cgroup / limit_file).read_text()))
            if limit < total:
                return MemoryFacts(total, available, limit, float(int((cgroup / used_file).read_text())))
    return MemoryFacts(total, available)


def judge_memory(facts: MemoryFacts) -> list[Row]:
    """Row of the memory."""
    free, text = facts.available, f"{facts.available / 1e9:.1f} of {facts.total / 1e9:.1f} GB are available"
    if facts.limit is not None:
        # The use includes cached files, which the system drops when it needs memory.
        text += f"; the container's limit is {facts.limit / 1e9:.1f} GB"
        free = min(free, facts.limit)
    measured = {"total_bytes": facts.total, "available_bytes": facts.available, "limit_bytes": facts.limit}
    if free < _TINY_MEMORY:
        advice = "A rank takes about 1 GB without a model; end other programs, or raise the container's limit."
        return [Row("memory", "bad", text, advice, measured)]
    if free < _LITTLE_MEMORY:
        advice = "That is only enough for small models; pipekit plan shows what a run needs."
        return [Row("memory", "warning", text, advice, measured)]
    return [Row("memory", "ok", text, measured=measured)]


def judge_shared_memory(total: float | None, free: float, num_gpus: int | None) -> list[Row]:
    """Row of shared memory: its size in bytes, None if it is missing, and its free and writable bytes."""
    several = (num_gpus or 0) > 1
    verdict: Verdict = "bad" if several else "warning"
    advice = "Start a container with --shm-size=8g or --ipc=host; outside one: sudo mount -o remount,size=8G /dev/shm"
    if total is None:
        return [Row("shared memory", verdict, "there is no /dev/shm", advice)]
    text = f"{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB of /dev/shm are free"
    measured = {"total_bytes": total, "free_bytes": free}
    if free < _TINY_SHM:
        why = "NCCL needs more for several GPUs." if several else "Workers of torch's DataLoader may need more."
        return [Row("shared memory", verdict, text, f"{why} {advice}", measured)]
    if free < _SMALL_SHM:
        return [
            Row("shared memory", "warning", text, f"Workers of torch's DataLoader may need more. {advice}", measured)
        ]
    return [Row("shared memory", "ok", text, measured=measured)]

"""Host memory: its size, page faults, and settings of the C library's allocator."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_NEVER = -1
_MMAP_FROM = 2**30
_GROW_BY = 2**26
_RETURN_FROM = 2**20


def count_page_faults() -> int:
    """Number of fresh pages that the system has given this process so far; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    """Resident memory of this process in bytes; outside Linux, its peak."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def peak_resident_bytes() -> int:
    """Largest resident memory that this process has had, in bytes; 0 on Windows."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            # Not that of getrusage, in which Linux counts the program that has started this one.
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return 0
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones, as the caching allocators of GPUs do.

    By default the C library returns large blocks to the system at once, and every micro-batch pays for fresh pages
    again: tens of thousands of page faults a step, more under schedules that hold more activations. With this setting
    a process keeps its peak memory until it ends. Settings in the environment (`MALLOC_*`, `GLIBC_TUNABLES`) win.

    Returns:
        True if it was set: under glibc on Linux only.
    """
    return _set_allocator({_M_TRIM_THRESHOLD: _NEVER, _M_MMAP_THRESHOLD: _MMAP_FROM, _M_TOP_PAD: _GROW_BY})


def return_freed_memory() -> bool:
    """Return the memory of freed tensors to the system at once, for work that is done on one tensor after another.

    By default the C library keeps blocks of up to 32 MiB, and tensors of many sizes leave gaps between them that add up
    to several times what is in use. Settings in the environment win, as for `keep_freed_memory`.

    Returns:
        True if it was set: under glibc on Linux only.
    """
    return _set_allocator({_M_MMAP_THRESHOLD: _RETURN_FROM})


def _set_allocator(settings: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux") or any(
        name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())

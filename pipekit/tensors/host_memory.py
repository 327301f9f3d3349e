"""The memory that tensors on the CPU live in: how much there is, and how the C library manages it."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_NEVER = -1
_MMAP_FROM = 2**30
_GROW_BY = 2**26


def share_of_memory(num_processes: int) -> int:
    """Return the bytes of this machine's memory that each of some processes may take for its own."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes


def count_page_faults() -> int:
    """Return how many fresh pages this process has been given by the system so far; 0 where that is not told."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, as caching allocators of GPUs do.

    By default it gives large pieces back to the system at once, and every micro-batch pays for fresh pages anew: tens
    of thousands of page faults a step, the more the more of activations a schedule holds. A process that has this keeps
    its peak until it ends. What the environment says (`MALLOC_*`, `GLIBC_TUNABLES`) is left as it is.

    Returns:
        Whether it was set: under glibc on Linux only.
    """
    if not sys.platform.startswith("linux") or any(
        name == "GLIBC_TUNABLES" or (name.startswith("MALLOC_") and name.endswith("_")) for name in os.environ
    ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_TRIM_THRESHOLD: _NEVER, _M_MMAP_THRESHOLD: _MMAP_FROM, _M_TOP_PAD: _GROW_BY}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())

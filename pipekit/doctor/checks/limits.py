"""System limits on a process: open files, locked memory, processes."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

from pipekit.doctor.rows import Row, Site, Verdict

_FEW_FILES, _TOO_FEW_FILES = 4096, 256
_FEW_PROCESSES = 512
_UNLIMITED = float("inf")


def check_open_files(site: Site) -> list[Row]:
    """Limit on the open files and connections of a process."""
    soft, hard = map(_number, resource.getrlimit(resource.RLIMIT_NOFILE))
    return judge_open_files(soft, hard)


def check_locked_memory(site: Site) -> list[Row]:
    """Limit on locked memory, which InfiniBand adapters need."""
    adapters = Path("/sys/class/infiniband")
    num_adapters = len(list(adapters.iterdir())) if adapters.is_dir() else 0
    soft, _ = map(_number, resource.getrlimit(resource.RLIMIT_MEMLOCK))
    return judge_locked_memory(soft, num_adapters)


def check_processes(site: Site) -> list[Row]:
    """Limit on processes and threads."""
    limits = [_number(resource.getrlimit(resource.RLIMIT_NPROC)[0])]
    with suppress(OSError, ValueError):  # no such file, or a limit of "max"
        limits.append(float(int(Path("/sys/fs/cgroup/pids.max").read_text())))
    return judge_processes(min(limits))


def judge_open_files(soft: float, hard: float) -> list[Row]:
    """Row of the soft and hard limits on open files. A rank connects to its peers in every group."""
    measured = {"limit": _plain(soft)}
    if soft >= _FEW_FILES:
        return [Row("open files", "ok", _text(soft), measured=measured)]
    advice = f"Before a run, type: ulimit -n {_text(min(hard, 65536.0)).replace(',', '')}"
    if hard < _FEW_FILES:
        advice = "Raise nofile to 65536 in /etc/security/limits.conf, and log in again."
    verdict: Verdict = "bad" if soft < _TOO_FEW_FILES else "warning"
    return [Row("open files", verdict, f"{_text(soft)} at most", advice, measured)]


def judge_locked_memory(soft: float, num_adapters: int) -> list[Row]:
    """Row of the limit on locked memory, in bytes."""
    measured = {"limit_bytes": _plain(soft), "infiniband": num_adapters}
    if soft == _UNLIMITED:
        return [Row("locked memory", "ok", "unlimited", measured=measured)]
    text = f"{soft / 2**20:,.0f} MiB at most"
    if not num_adapters:
        return [Row("locked memory", "ok", f"{text}, which matters only for InfiniBand", measured=measured)]
    advice = "Set memlock to unlimited in /etc/security/limits.conf; a container needs --ulimit memlock=-1."
    return [Row("locked memory", "bad", f"{text}, but NCCL over InfiniBand needs more", advice, measured)]


def judge_processes(limit: float) -> list[Row]:
    """Row of the limit on processes and threads."""
    measured = {"limit": _plain(limit)}
    if limit >= _FEW_PROCESSES:
        return [Row("processes", "ok", _text(limit), measured=measured)]
    advice = "Raise it: ulimit -u 4096, or --pids-limit of the container. A rank has about thirty threads."
    return [Row("processes", "warning", f"{_text(limit)} at most, including threads", advice, measured)]


def _number(limit: int) -> float:
    return _UNLIMITED if limit in (resource.RLIM_INFINITY, -1) else float(limit)


def _plain(limit: float) -> int | None:
    return None if limit == _UNLIMITED else int(limit)


def _text(limit: float) -> str:
    return "unlimited" if limit == _UNLIMITED else f"{limit:,.0f}"

"""Folders of runs and of the cache: free space, speed, locks, renames, and the file system's clock."""

from __future__ import annotations

import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipekit.doctor.rows import Row, Site, existing_parent
from pipekit.files import file_system, replace_folder, write_atomically
from pipekit.launch.facts import CLOCK_LIMIT_S

_WRITE_S, _SMALL_FILES_S = 1.0, 0.5
_CHUNK_BYTES, _MOST_CHUNKS = 4 << 20, 16
_SMALL_BYTES, _MOST_SMALL = 4096, 20
_FULL_BYTES, _LITTLE_BYTES = 1e9, 10e9
_FEW_INODES = 10_000
_SLOW_BYTES_PER_S, _SLOW_FILE_S = 30e6, 0.1
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class StorageFacts:
    """Measurements of a folder.

    Attributes:
        folder: the folder, or its nearest existing parent.
        file_system: type of its file system; empty if unknown.
        free_bytes: free space for this user.
        free_inodes: number of files that can still be created; None without a limit.
        error: reason why it is not writable; None if it is.
        bytes_per_s: write speed to the disk.
        small_file_s: time to write a small file to the disk and rename it.
        locks: whether a second lock on a file is refused.
        renames: whether renames replace files and folders.
        clock_ahead_s: seconds by which the file system's clock is ahead of the machine's.
    """

    folder: str
    file_system: str
    free_bytes: float
    free_inodes: int | None
    error: str | None = None
    bytes_per_s: float = 0.0
    small_file_s: float = 0.0
    locks: bool = True
    renames: bool = True
    clock_ahead_s: float = 0.0


def check_run_folder(site: Site) -> list[Row]:
    """Disk of checkpoints and logs."""
    return judge_storage("runs", measure_storage(existing_parent(site.run_dir)), keeps=True)


def check_cache_folder(site: Site) -> list[Row]:
    """Disk of prepared tokens and compiled extensions."""
    folder, run_folder = existing_parent(site.cache_dir), existing_parent(site.run_dir)
    if os.stat(folder).st_dev == os.stat(run_folder).st_dev and os.access(folder, os.W_OK):
        return [Row("cache", "ok", f"{folder}, on the same disk as the runs")]
    return judge_storage("cache", measure_storage(folder), keeps=False)


def measure_storage(folder: Path) -> StorageFacts:
    """Measure writes in a temporary folder, which is removed at the end."""
    usage = os.statvfs(folder)
    facts = StorageFacts(
        folder=str(folder),
        file_system=file_system(folder),
        free_bytes=float(usage.f_bavail * usage.f_frsize),
        free_inodes=usage.f_favail if usage.f_files else None,
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".pipekit-doctor-", dir=folder) as work:
            return replace(facts, **_measure_in(Path(work)))
    except OSError as error:
        return replace(facts, error=error.strerror or str(error))


def judge_storage(name: str, facts: StorageFacts, *, keeps: bool) -> list[Row]:
    """Rows of a folder.

    Args:
        name: purpose of the folder, with which each row's name begins.
        facts: measurements of the folder.
        keeps: whether its files must survive a reboot.
    """
    measured: Mapping[str, object] = asdict(facts)
    where = facts.folder if not facts.file_system else f"{facts.folder} ({facts.file_system})"
    other = "Set run.dir" if keeps else "Set data.cache_dir and TORCH_EXTENSIONS_DIR"
    other += " to a folder elsewhere"
    if facts.error is not None:
        advice = f"{other}, or make this one writable."
        return [Row(name, "bad", f"{where} cannot be written: {facts.error}", advice, measured)]
    text = f"{where}, {facts.free_bytes / 1e9:,.1f} GB free"
    if facts.free_bytes < _FULL_BYTES:
        room = Row(name, "bad", text, f"Free some space, or {other[0].lower()}{other[1:]}.", measured)
    elif facts.free_inodes is not None and facts.free_inodes < _FEW_INODES:
        text += f", but only {facts.free_inodes:,} more files fit"
        room = Row(name, "bad", text, f"Remove files, or {other[0].lower()}{other[1:]}.", measured)
    elif facts.free_bytes < _LITTLE_BYTES:
        advice = "A checkpoint takes 12 to 16 bytes per parameter; checkpoint.keep limits their number."
        room = Row(name, "warning", text, advice, measured)
    elif keeps and facts.file_system in _IN_MEMORY:
        room = Row(name, "warning", f"{text}, in memory", f"A reboot deletes checkpoints. {other}.", measured)
    else:
        room = Row(name, "ok", text, measured=measured)
    speed = f"{facts.bytes_per_s / 1e6:,.0f} MB/s; a small file in {1000 * facts.small_file_s:.1f} ms"
    advice = "Checkpoints take long here; set a longer checkpoint.interval and checkpoint.async=true."
    if facts.bytes_per_s < _SLOW_BYTES_PER_S or facts.small_file_s > _SLOW_FILE_S:
        rows = [room, Row(f"{name}: speed", "warning", speed, advice)]
    else:
        rows = [room, Row(f"{name}: speed", "ok", speed)]
    return [*rows, _judge_promises(name, facts, other)]


def _judge_promises(name: str, facts: StorageFacts, other: str) -> Row:
    check = f"{name}: locks"
    if not facts.renames:
        advice = f"Checkpoints could be incomplete. {other}."
        return Row(check, "bad", "renames do not replace files and folders", advice)
    if not facts.locks:
        advice = f"Without locks, pipekit takes longer to detect that a run is already running. {other}."
        return Row(check, "warning", "files cannot be locked", advice)
    if abs(facts.clock_ahead_s) > CLOCK_LIMIT_S:
        which = "ahead of" if facts.clock_ahead_s > 0 else "behind"
        text = f"the file system's clock is {abs(facts.clock_ahead_s):.0f} s {which} this machine's clock"
        return Row(check, "warning", text, "Turn on time synchronization on both: sudo timedatectl set-ntp true")
    return Row(check, "ok", "files can be locked, and renames replace them")


def _measure_in(work: Path) -> dict[str, Any]:
    data = os.urandom(_CHUNK_BYTES)
    start_s, num_written = time.perf_counter(), 0
    with (work / "large").open("wb") as file:
        while num_written < _MOST_CHUNKS and time.perf_counter() - start_s < _WRITE_S:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            num_written += 1
    bytes_per_s = num_written * _CHUNK_BYTES / (time.perf_counter() - start_s)
    ahead_s = (work / "large").stat().st_mtime - time.time()
    times_s: list[float] = []
    end_s = time.perf_counter() + _SMALL_FILES_S
    while len(times_s) < _MOST_SMALL and (not times_s or time.perf_counter() < end_s):
        start_s = time.perf_counter()
        write_atomically(work / f"small-{len(times_s)}", data[:_SMALL_BYTES])
        times_s.append(time.perf_counter() - start_s)
    return {
        "bytes_per_s": bytes_per_s,
        "small_file_s": statistics.median(times_s),
        "locks": _can_lock(work / "lock"),
        "renames": _can_rename(work),
        "clock_ahead_s": ahead_s,
    }


def _can_lock(path: Path) -> bool:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _can_rename(work: Path) -> bool:
    with suppress(OSError):
        for name in ("new", "old"):
            (work / name).mkdir()
            (work / name / "file").write_text(name)
            (work / f"{name}-file").write_text(name)
        os.replace(work / "new-file", work / "old-file")
        replace_folder(work / "new", work / "old")
        return (
            (work / "old-file").read_text() == (work / "old/file").read_text() == "new"
            and not (work / "new").exists()
            and not (work / "new-file").exists()
        )
    return False

"""Folders of the cache that are built once: under a lock, whole or not there, and gone on with after a kill."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from pipekit.errors import DataError
from pipekit.files import is_on_local_disk, replace_folder
from pipekit.progress import ProgressCallback
from pipekit.storage import storing

T = TypeVar("T")

PROGRESS_FILE = "progress.json"
"""A folder that holds it was left by a builder that can be gone on from."""

# A builder writes more often.
_ABANDONED_S = 6 * 3600.0


def build_once(
    folder: Path,
    *,
    load: Callable[[Path], T | None],
    build: Callable[[Path], None],
    timeout_s: float,
    report: ProgressCallback,
) -> T:
    """Return a folder of the cache as `load` finds it, built first where it is not there.

    Any number of processes may call this at the same time: one builds, the others wait for it. A folder is filled under
    a temporary name and then renamed, so it is whole or not there.

    Args:
        folder: to load from.
        load: returns None where the folder is missing or broken.
        build: fills a folder; where that holds `PROGRESS_FILE`, a builder was killed, and its work may be gone on with.
        timeout_s: the longest wait for another process that builds, in seconds.
        report: is told of a wait.

    Raises:
        DataError: if another process builds for longer than `timeout_s`.
        StorageError: if the cache cannot be written.
    """
    found = load(folder)
    if found is not None:
        return found
    with storing(f"data.cache_dir: {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _build_lock(folder, timeout_s=timeout_s, report=report):
            found = load(folder)  # another process may have built it while this one waited
            if found is None:
                _build(folder, load, build)
                found = load(folder)
    assert found is not None, f"{folder} was just built"
    return found


def _build(folder: Path, load: Callable[[Path], object | None], build: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    _take_over_leftover(folder, temporary)
    temporary.mkdir(exist_ok=True)
    is_kept = False
    try:
        build(temporary)
        # Another machine's, which it may read already, stays; any other is broken, or it would have been used.
        if load(folder) is None:
            replace_folder(temporary, folder)
    except BaseException as error:
        # What is wrong with the data stays wrong; after an interrupt or a full disk, the work is gone on with.
        is_kept = (not isinstance(error, Exception) or isinstance(error, OSError)) and _can_go_on(temporary)
        raise
    finally:
        if not is_kept:
            shutil.rmtree(temporary, ignore_errors=True)


def _take_over_leftover(folder: Path, temporary: Path) -> None:
    """Go on with what a killed builder has left, and remove the rest.

    Who holds the lock is the only builder of this machine. On a shared file system that does not honour the lock,
    another machine may be building.
    """
    is_local, now_s = is_on_local_disk(folder.parent), time.time()
    for leftover in folder.parent.glob(f"{folder.name}.building-*"):
        with suppress(OSError):
            changed_s = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if not is_local and now_s - changed_s <= _ABANDONED_S:
                continue
            if _can_go_on(leftover) and not temporary.exists():
                leftover.rename(temporary)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _can_go_on(folder: Path) -> bool:
    return (folder / PROGRESS_FILE).is_file()


def _build_lock(folder: Path, *, timeout_s: float, report: ProgressCallback) -> AbstractContextManager[object]:
    # The operating system frees the lock of a process that has ended, however it ended.
    lock_path = folder.with_name(f"{folder.name}.lock")
    lock = FileLock(lock_path, poll_interval=0.1)
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    report(f"waiting for another process to prepare the data ({lock_path})", None)
    try:
        return lock.acquire(timeout=timeout_s)
    except Timeout as error:
        raise DataError(
            f"waited {timeout_s:g} s for another process to prepare the data in {folder}, and it still holds "
            f"the lock {lock_path}; let it finish and start again, or raise run.timeout_s"
        ) from error

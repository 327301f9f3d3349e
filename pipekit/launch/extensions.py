"""Guarding the folder in which torch compiles C++ extensions, such as DeepSpeed's operators at first use.

A build is protected by a file named `lock`. A process that is killed while it builds leaves that file, and
every later process waits for its removal for ever, without a word. The file holds no process number, but its
builder keeps it open as long as the build runs, so on Linux one can tell whether the builder is still there.

Source: torch/utils/file_baton.py and torch/utils/cpp_extension.py (`_jit_compile`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipekit.errors import LaunchError
from pipekit.files import file_system, is_on_local_disk

_POLL_S = 0.2
_PROC = Path("/proc")
# Linux's first process namespace (PROC_PID_INIT_INO). In any other one, some processes are out of sight.
_FIRST_PID_NAMESPACE = "pid:[4026531836]"


def extensions_dir(environ: Mapping[str, str]) -> Path:
    """Return the folder for compiled extensions: `TORCH_EXTENSIONS_DIR`, or one for this environment alone.

    torch's own default is shared by all environments with the same versions of Python and CUDA, which then
    rebuild each other's extensions, or load ones that were built against another torch.
    """
    if environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(environ["TORCH_EXTENSIONS_DIR"])
    home = Path(environ.get("HOME") or Path.home())
    default = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    cache = Path(environ.get("XDG_CACHE_HOME") or default)
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = "none"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    return cache / "torch_extensions" / f"{python}-torch{torch_version}-{prefix}"


def guard_extension_builds(
    environ: Mapping[str, str], *, stale_after_s: float = 900.0, limit_s: float = 1200.0
) -> list[str]:
    """Remove the locks of builds whose process is gone, and wait for builds that are under way.

    Call it in one process of each machine before any process imports deepspeed.

    A lock is removed when no process has it open and no ninja runs in its folder. Where that cannot be known
    (another user's lock, a folder shared with other machines or containers, not Linux), it is removed when
    nothing in its folder has changed for `stale_after_s`.

    Args:
        environ: the environment variables; see `extensions_dir`.
        stale_after_s: seconds without change after which a build that cannot be seen is given up.
        limit_s: seconds to wait for each lock.

    Returns:
        One line for each lock that was removed.

    Raises:
        LaunchError: if a lock is still there after `limit_s`; the message says what to type.
    """
    notes = []
    # A build has a folder of its own below the root; the lock stands directly in it.
    for lock in sorted(extensions_dir(environ).glob("*/lock")):
        deadline_s = time.monotonic() + limit_s
        while True:
            with _one_guard_at_a_time(lock.parent):
                state = _inspect(lock, stale_after_s=stale_after_s)
                if state.abandoned:
                    _remove(lock)
                    notes.append(f"removed {lock}: the build that held it was ended before it finished")
            if state.gone or state.abandoned:
                break
            if time.monotonic() >= deadline_s:
                raise LaunchError(_still_locked(lock, state, limit_s))
            time.sleep(_POLL_S)
    return notes


@dataclass(frozen=True)
class _LockState:
    """State of a lock. With neither `gone` nor `abandoned`, a build may be under way."""

    gone: bool = False
    abandoned: bool = False
    holder_pid: int | None = None


def _inspect(lock: Path, *, stale_after_s: float) -> _LockState:
    try:
        identity = lock.stat()
        if not _sees_every_builder(lock):
            return _LockState(abandoned=time.time() - _last_change_s(lock.parent) > stale_after_s)
        holder = _holder(lock)
        if holder is None:
            # A builder closes its lock a moment before it removes it: look again.
            time.sleep(_POLL_S)
            holder = _holder(lock)
        same = lock.stat().st_ino == identity.st_ino
        return _LockState(abandoned=holder is None and same, holder_pid=holder)
    except FileNotFoundError:
        return _LockState(gone=True)


def _sees_every_builder(lock: Path) -> bool:
    """True if /proc shows every process that could hold the lock."""
    if sys.platform != "linux" or lock.stat().st_uid != os.geteuid():
        return False
    if file_system(lock.parent) == "overlay":  # a container's own layer, which no other container has
        return True
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE and is_on_local_disk(lock.parent)
    except OSError:
        return False


def _holder(lock: Path) -> int | None:
    """Return a process that has the lock open, or that is a ninja at work in its folder."""
    identity = lock.stat()
    folder = str(lock.parent.resolve())
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile, or it is another user's
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    names_lock = os.path.basename(os.readlink(descriptor)) == lock.name
                    if names_lock and os.path.samestat(descriptor.stat(), identity):
                        return int(process.name)
            # ninja outlives a builder that was killed, and goes on writing into the folder.
            is_ninja = (process / "comm").read_text().startswith("ninja")
            if is_ninja and os.readlink(process / "cwd") == folder:
                return int(process.name)
    return None


def _last_change_s(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


@contextlib.contextmanager
def _one_guard_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two launchers from judging one lock at once.

    The second would remove the lock that a worker of the first has taken since.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove(lock: Path) -> None:
    try:
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{lock} is left over from a build that was ended, and cannot be removed ({error.strerror}): a run would "
            "wait for it without end; ask its owner to remove it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
        ) from None


def _still_locked(lock: Path, state: _LockState, limit_s: float) -> str:
    remove = f"rm {shlex.quote(str(lock))}"
    if state.holder_pid is not None:
        return (
            f"{lock} is held by process {state.holder_pid}, which has been compiling for more than {limit_s:g} s: only "
            f"one process may compile an extension; wait for it, or type: kill {state.holder_pid}; {remove}"
        )
    return (
        f"{lock} has been there for more than {limit_s:g} s, and whether its build is still running cannot be seen "
        f"from here: a run would wait for it without end; if no other run is compiling, type: {remove}"
    )

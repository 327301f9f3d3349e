"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipekit.errors import PipekitError, StorageError
from pipekit.storage import existing_folder, storing

LATE_S = 90.0
"""Seconds after which each machine sees in a shared folder what another has written: NFS shows for up to 60 s what it
knew before, unless mounted otherwise."""
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0

_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}


def read_regular(path: str | Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file, of at most `max_bytes`. Pipes and devices, which may not end, are refused.

    Raises:
        OSError: if it cannot be read, is no regular file, or is longer; `strerror` says which.
    """
    # A pipe that nobody writes to would hold up an ordinary open.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is a pipe or a device, and only files are read", str(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"is longer than {max_bytes:,} bytes", str(path))
    return data


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. A ValueError if it is none, or nested deeper than anybody writes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, and rename it once it is on the disk.

    Whoever reads meanwhile sees the old file or the new one; several processes may write the same one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder, with the names of what is in it, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def building_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which gets its final name where the block succeeds, and is removed where it fails.

    It lies beside the final one, in place of which it comes; see `replace_folder`.

    Raises:
        StorageError: in place of an `OSError`, also of the block's.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with storing(final):
            temporary.mkdir(parents=True)
            yield temporary
            replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path, *, marker: str, what: str, overwrite: bool) -> None:
    """Check that a folder can be written: it is not there, empty, or to be overwritten and `what` it has a marker of.

    Raises:
        PipekitError: if it cannot.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / marker).is_file():
        raise PipekitError(
            f"{out}: is there already and is no earlier {what} (it has no {marker}), so it is not replaced; give "
            "another folder"
        )
    if not overwrite:
        raise PipekitError(f"{out}: is there already; give another folder, or replace it with --overwrite")


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a folder that is complete its final name, in place of an earlier folder of that name.

    At every moment one of the two has that name, on file systems that can swap two names at once (not NFS). The earlier
    one is removed when the new one is in its place and on the disk.
    """
    sync_folder(temporary)
    is_earlier = final.exists()
    if not is_earlier:
        temporary.rename(final)
    elif not _swap(temporary, final):
        earlier = final.with_name(f".{final.name}.{uuid.uuid4().hex}.old")
        final.rename(earlier)
        temporary.rename(final)
        earlier.rename(temporary)
    sync_folder(final.parent)
    if is_earlier:
        shutil.rmtree(temporary)


def _swap(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the C library or the file system cannot.

    Source: renameat2(2) of the Linux manual.
    """
    rename: Any = getattr(ctypes.CDLL(None), "renameat2", None)
    working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None:
        return False
    status: int = rename(working_directory, os.fsencode(one), working_directory, os.fsencode(other), exchange)
    return status == 0


def file_system(folder: Path) -> str:
    """Name of the kind of file system that a folder is on, such as `ext4` or `nfs4`; empty where it is not known."""
    real, best, kind = folder.resolve(), -1, ""
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, mount_point, fs_type, *_ = line.split()
            mount = Path(mount_point.encode().decode("unicode_escape"))  # spaces are written as \040
            if real.is_relative_to(mount) and len(mount.parts) >= best:
                best, kind = len(mount.parts), fs_type
    return kind


def is_on_local_disk(folder: Path) -> bool:
    """True if a folder is on a file system that no other machine writes to; False where that is not known."""
    return file_system(folder) in _LOCAL_FILE_SYSTEMS


def look_anew(path: Path) -> int | None:
    """Size of a file or folder in bytes, as its file system shows it once it is asked; None where it is not there.

    A client of NFS answers from memory, also that something is missing, until a folder or file is opened.
    """
    for each in (path.parent, path):
        try:
            descriptor = os.open(each, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            raise
        try:
            num_bytes = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    return num_bytes


def late_limit_s(timeout_s: float) -> float:
    """Longest wait for files that another machine has written, in a run whose waits may last `timeout_s`."""
    return min(LATE_S, timeout_s / 2)


def wait_until_seen(
    sizes: Mapping[Path, int | None],
    *,
    find_fault: Callable[[], str | None] = lambda: None,
    limit_s: float = LATE_S,
) -> None:
    """Wait until this machine sees in a shared folder what another has just written there.

    On a disk that no other machine writes to, there is nothing to wait for.

    Args:
        sizes: bytes of the files; None for a folder, or for a file of any size.
        find_fault: called once all are there; what is wrong with them, or None where they are as they were written.
        limit_s: the longest wait, in seconds.

    Raises:
        StorageError: if something is missing or another until then, with its name.
    """
    began_s, pause_s = time.monotonic(), _SHORTEST_PAUSE_S
    while (fault := _find_late(sizes) or find_fault()) is not None:
        waited_s = time.monotonic() - began_s
        is_local = is_on_local_disk(existing_folder(next(iter(sizes)).parent))
        if is_local or waited_s >= limit_s:
            remedy = "give a folder that all machines of the run share"
            if is_local:
                raise StorageError(f"{fault} on this machine, which shares this disk with no other; {remedy}")
            raise StorageError(
                f"{fault} on this machine, {waited_s:.0f} s after another has written it; {remedy}, or have them see "
                "each other's files sooner (NFS: mount with lookupcache=none)"
            )
        time.sleep(min(pause_s, limit_s - waited_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _find_late(sizes: Mapping[Path, int | None]) -> str | None:
    for path, num_bytes in sizes.items():
        with storing(path, doing="read"):
            found = look_anew(path)
        if found is None:
            return f"{path}: is not there"
        if num_bytes is not None and found != num_bytes:
            return f"{path}: has {found:,} bytes of {num_bytes:,}"
    return None

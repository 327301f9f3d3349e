"""Errors of disks as one clear message: which path, what is wrong, how much room there is, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipekit.errors import PathError, PipekitError, StorageError
from pipekit.number_text import bytes_text

_FAULTS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "make room there, or use another folder"),
    errno.EDQUOT: ("your quota there is used up", "remove files of yours there, or ask for a larger quota"),
    errno.EFBIG: ("the file would be larger than the system allows", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "use another folder, or have it mounted for writing"),
    errno.EACCES: ("no permission", "use another folder, or change who owns this one"),
    errno.EPERM: ("the system does not permit it", "use another folder, or change who owns this one"),
    errno.EIO: ("the disk failed (input/output error)", "look for its faults in the system's log (dmesg)"),
    errno.EMFILE: ("this process has too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system has too many open files", "end other programs, or raise fs.file-max"),
    errno.ESTALE: ("the file server no longer knows it (stale handle)", "have the file system mounted again"),
}
"""Meaning of an error number of the system for a file, and the remedy."""

_MISTAKES: dict[int, tuple[str, str]] = {
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "give another path"),
    errno.ENOENT: ("no such folder", "make it, or give another path"),
    errno.EISDIR: ("it is a folder", "give another path"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.EEXIST: ("something else of that name is there", "give another path"),
    errno.ELOOP: ("its links lead in a circle", "give another path"),
}

# Without a path they may be of something else than a file: a terminal, another process.
_NEED_A_PATH = {errno.EACCES, errno.EPERM, errno.EIO}

# safetensors tells the system's error in its text ("... (os error 28)"), and so does torch ("... (28)").
_CODE_IN_TEXT = re.compile(r"\b(?:code: |os error )(\d+)|\((\d+)\)$")


def existing_folder(path: Path) -> Path:
    """The nearest folder of a path that is there."""
    absolute = path.absolute()
    return next((folder for folder in (absolute, *absolute.parents) if folder.is_dir()), Path("/"))


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where a path is, or would be.

    Raises:
        OSError: if the file system does not say.
    """
    found = os.statvfs(existing_folder(path))
    return found.f_bavail * found.f_frsize


def error_number(error: BaseException) -> int | None:
    """The system's number of an error that is one of a file; also of one that a library has wrapped into its own.

    Example:
        >>> error_number(OSError(28, "No space left on device"))
        28
        >>> error_number(RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"))
        12
    """
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" or isinstance(error, RuntimeError):
        text = str(error).strip()
        found = _CODE_IN_TEXT.search(text)
        number = int(found[1] or found[2]) if found else 0
        return number if number and os.strerror(number) in text else None
    return None


def find_storage_error(
    error: BaseException, path: str | Path | None, *, doing: str = "written", needed_bytes: int | None = None
) -> StorageError | None:
    """The error of a disk that an exception is; None where it is none.

    Args:
        error: the exception.
        path: the file or folder, as the user knows it; None where that is not known.
        doing: what could not be done with it.
        needed_bytes: of what was to be written.
    """
    number = error_number(error)
    if number not in _FAULTS or (path is None and number in _NEED_A_PATH):
        return None
    what, remedy = _FAULTS[number]
    room = ""
    if path is not None and number in (errno.ENOSPC, errno.EDQUOT):
        needed = f"{bytes_text(needed_bytes)} to be written, " if needed_bytes else ""
        with contextlib.suppress(OSError):
            room = f" ({needed}{bytes_text(free_bytes(Path(path)))} free)"
    return StorageError(f"{path or 'a file'}: cannot be {doing}: {what}{room}; {remedy}")


def storage_error(
    error: BaseException, path: str | Path, *, doing: str = "written", needed_bytes: int | None = None
) -> StorageError:
    """The error for the user of an `OSError` at a path, whatever it is; see `find_storage_error`.

    Returns:
        A PathError where the path itself is wrong.
    """
    found = find_storage_error(error, path, doing=doing, needed_bytes=needed_bytes)
    if found is not None:
        return found
    number = error_number(error)
    if number in _MISTAKES and not (number == errno.ENOENT and Path(path).parent.is_dir()):
        what, remedy = _MISTAKES[number]
        return PathError(f"{path}: cannot be {doing}: {what}; {remedy}")
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return StorageError(f"{path}: cannot be {doing}: {reason}")


@contextlib.contextmanager
def storing(path: str | Path, *, doing: str = "written", needed_bytes: int | None = None) -> Iterator[None]:
    """Run the block, and raise an error of the disk in it as one that names the path and says what to do.

    Args:
        path: the file or folder, as the user knows it.
        doing: what the block does with it.
        needed_bytes: of what is to be written.

    Raises:
        StorageError: in place of an `OSError`, or of a library's error that wraps one.
        PathError: where the path itself is wrong, such as one below a file.
    """
    try:
        yield
    except PipekitError:
        raise
    except OSError as error:
        raise storage_error(error, path, doing=doing, needed_bytes=needed_bytes) from error
    except Exception as error:
        found = find_storage_error(error, path, doing=doing, needed_bytes=needed_bytes)
        if found is None:
            raise
        raise found from error


def check_writable(folder: Path, *, name: str = "") -> None:
    """Check that files can be written in a folder, or where it would be made; leaves nothing there.

    Args:
        folder: the folder.
        name: what the user types before it, such as `run.dir=`.

    Raises:
        StorageError: if there is no room or no permission, or the file system is read-only.
        PathError: if the path is below a file, or is one.
    """
    with storing(f"{name}{folder}"):
        for place in (folder, *folder.parents):
            if os.path.lexists(place) and not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing_folder(folder)) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())

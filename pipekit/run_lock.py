"""Lock of a run's folder, so that one process at a time writes into it: `hold_run`.

The file `.lock` in the folder is locked by `flock`, which the system frees when its owner has died, however it died. It
says who the owner is. Some shared file systems do not honour `flock` between machines, so an owner also touches the
file every few seconds: a start on another machine waits to see whether it does. No clocks are compared.

The filelock library would mark the folder by a plain file where there is no `flock`, and so a dead machine would hold
it for ever.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipekit.errors import ConfigError, InUseError
from pipekit.files import is_on_local_disk
from pipekit.storage import storage_error

LOCK_FILE = ".lock"

_BEAT_S = 5.0
_STALE_S = 30.0
_POLL_S = 0.2
_WRITTEN_S = 0.05
# After this time, machines that share a folder see what the others have written.
_SETTLE_S = 1.0
# One write replaces a record of one size as a whole.
_RECORD_BYTES = 1024
_SHOWN_CHARACTERS = 200
_WITHOUT_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)


@dataclass(frozen=True)
class Owner:
    """Owner of a run's folder, as its lock tells it.

    Attributes:
        host: name of its machine.
        pid: number of its process there.
        since: when it took the folder, in local time.
        command: what was typed.
        boot: the machine's present start; the same for all containers of a machine.
        token: of this owner alone.
    """

    host: str
    pid: int
    since: str
    command: str
    boot: str
    token: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """This process, from now on."""
        command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
        return cls(
            host=socket.gethostname()[:_SHOWN_CHARACTERS],
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=command if len(command) <= _SHOWN_CHARACTERS else f"{command[:_SHOWN_CHARACTERS]}...",
            boot=_boot(),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, descriptor: int) -> Owner | None:
        """The owner that a lock names; None where it names nobody."""
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(os.pread(descriptor, _RECORD_BYTES, 0))
            # No control character gets from a file to the terminal.
            texts = {key: "".join(filter(str.isprintable, str(value))) for key, value in record.items()}
            return cls(pid=int(texts.pop("pid")), **texts)
        return None

    def write(self, descriptor: int) -> None:
        """Name this owner in a lock."""
        # Each character that is not ASCII takes six bytes.
        record = {**asdict(self), "command": self.command.encode("ascii", "replace").decode()}
        os.pwrite(descriptor, json.dumps(record).encode().ljust(_RECORD_BYTES)[:_RECORD_BYTES], 0)


@contextmanager
def hold_run(folder: str | Path, *, stale_s: float = _STALE_S) -> Iterator[None]:
    """Hold a run's folder for the time of the block; it is made, and removed in the end if nothing was written into it.

    Args:
        folder: the folder.
        stale_s: seconds for which an owner on another machine must be silent to be taken for dead, where the file
            system may not honour `flock`.

    Raises:
        InUseError: if another process holds it; nothing has been written then.
        ConfigError: if its path leads through a file.
        StorageError: if it cannot be written.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        descriptor = _acquire(folder, stale_s)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"run.dir={folder} is a file, or leads through one; give a folder, or a name that is free"
        ) from None
    except OSError as error:
        _remove_empty(made)
        raise storage_error(error, f"run.dir={folder}") from None
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(descriptor, ended), name="lock of the run", daemon=True)
    thread.start()
    # A process that is forked, such as one that reads data, must not hold it longer than this one.
    in_child = _ClosesInChild(descriptor)
    try:
        yield
    finally:
        ended.set()
        thread.join()
        in_child.descriptor = None
        # It is still held here: a process that has opened this file already finds that it is gone, and looks again.
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()
        os.close(descriptor)
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def seems_held(folder: Path) -> bool:
    """True if the owner of a run's folder has touched its lock a short time ago, by the clock of this machine.

    Nothing is locked for it, so that no start is disturbed.
    """
    touched = _touched(folder / LOCK_FILE)
    return touched is not None and time.time() - touched / 1e9 < _STALE_S


class _ClosesInChild:
    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor
        os.register_at_fork(after_in_child=self._close)

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _acquire(folder: Path, stale_s: float) -> int:
    """Return the descriptor of the folder's lock, which is held."""
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if any(os.path.lexists(each) and not each.is_dir() for each in (folder, *folder.parents)):
                raise
            continue  # it was there, and another owner's end has removed it
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another owner's end has removed the folder
            continue
        try:
            is_honoured = _flock(descriptor, folder)
            if _is_removed(path, descriptor):
                os.close(descriptor)
                continue
            owner = Owner.read(descriptor)
            is_local = is_on_local_disk(folder)
            if owner is not None and not (is_honoured and _has_died(owner, is_local=is_local)):
                _watch(path, owner, folder, stale_s)
            mine = Owner.of_this_process()
            try:
                mine.write(descriptor)
            except OSError:  # the disk is full
                path.unlink()
                raise
            if not (is_honoured and is_local):
                time.sleep(_SETTLE_S)
                with path.open("rb") as file:
                    found = Owner.read(file.fileno())
                if found is not None and found.token != mine.token:
                    raise InUseError(_describe(found, folder))
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _flock(descriptor: int, folder: Path) -> bool:
    """Lock a file; False where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):  # some file systems call it so
        owner = Owner.read(descriptor)
        if owner is None:  # it has only just taken it
            time.sleep(_WRITTEN_S)
            owner = Owner.read(descriptor)
        raise InUseError(_describe(owner, folder)) from None
    except OSError as error:
        if error.errno not in _WITHOUT_FLOCK:
            raise
        return False


def _is_removed(path: Path, descriptor: int) -> bool:
    """True if the lock's last owner has removed the file since it was opened here."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return True


def _has_died(owner: Owner, *, is_local: bool) -> bool:
    """True if an owner whose file could be locked is known to be dead: one of this machine, or of its last start."""
    return owner.boot == _boot() or (owner.host == socket.gethostname() and is_local)


def _watch(path: Path, owner: Owner, folder: Path, stale_s: float) -> None:
    """Wait until an owner on another machine has been silent for `stale_s`."""
    sys.stderr.write(
        f"{folder}: was held by process {owner.pid} on {owner.host}, which may still be there; waiting {stale_s:g} s "
        "for a sign of it\n"
    )
    deadline_s = time.monotonic() + stale_s
    first = _touched(path)
    while time.monotonic() < deadline_s:
        time.sleep(min(_POLL_S, stale_s / 10))
        if (touched := _touched(path)) is None:
            return
        if touched != first:
            raise InUseError(_describe(owner, folder))


def _touched(path: Path) -> int | None:
    """Time at which a lock was last touched, by the clock of its file system; None where it is gone."""
    # Network file systems ask their server when a file is opened, and not whenever it is looked at.
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        with suppress(OSError):
            os.utime(descriptor)


def _describe(owner: Owner | None, folder: Path) -> str:
    if owner is None:
        return f"{folder}: is held by another process; wait until it has ended, or give another run.dir"
    is_here = owner.boot == _boot()
    where, end = ("", f", end it (kill {owner.pid})") if is_here else (f" on {owner.host}", ", end it there")
    return (
        f"{folder}: is held by process {owner.pid}{where} since {owner.since} ({owner.command}), and a run has one "
        f"writer; wait until it has ended{end}, or give another run.dir"
    )


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()

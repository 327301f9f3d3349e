"""Lines of metrics and output of processes, for which training does not stop where the disk is full."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from io import RawIOBase
from pathlib import Path
from typing import Any

from pipekit.storage import find_storage_error, storage_error, storing


def utc_now() -> str:
    """The present second in UTC, in ISO format, as records of a run have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file; nothing if it cannot be written.

    It is one write, so that the line stays whole beside those that other processes append.
    """
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        file.write(f"{json.dumps(record)}\n".encode())


class LineFile:
    """A file to which lines are appended; those for which there is no room are kept, and written once there is.

    Args:
        path: the file; it and its folder are made if they are not there.
        warn: called with one message when a line cannot be written, and with another when that has ended, or lines are
            lost.

    Raises:
        StorageError: if it cannot be opened.
    """

    _MOST_KEPT = 100_000

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._kept: deque[bytes] = deque()
        self._cut = 0  # bytes of the first kept line that are in the file
        self._num_late = self._num_lost = 0
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, line: str) -> None:
        """Append a line, with those that are still to be written."""
        self._kept.append(line.encode())
        try:
            self._write_kept()
        except OSError as error:
            if not self._num_late:
                self._warn(f"{storage_error(error, self._path)}; training goes on, and the lines are kept until then")
            self._num_late += 1
            if len(self._kept) > self._MOST_KEPT:
                # The first one may be in the file in part.
                del self._kept[1]
                self._num_lost += 1
            return
        if self._num_late:
            lost = f"; {self._num_lost} older ones are lost" if self._num_lost else ""
            self._warn(f"{self._path}: written again, with {self._num_late - self._num_lost} lines that waited{lost}")
            self._num_late = self._num_lost = 0

    def _write_kept(self) -> None:
        while self._kept:
            self._cut += os.write(self._file, self._kept[0][self._cut :])
            if self._cut == len(self._kept[0]):
                self._kept.popleft()
                self._cut = 0

    def close(self) -> None:
        """Write what is kept, or say that it is lost, and close the file, which then ends with a whole line."""
        try:
            with contextlib.suppress(OSError):
                self._write_kept()
            if self._kept:
                if self._cut:
                    os.ftruncate(self._file, os.fstat(self._file).st_size - self._cut)
                self._warn(f"{self._path}: {len(self._kept) + self._num_lost} lines are lost, since there was no room")
        finally:
            os.close(self._file)


class LossyOutput(RawIOBase):
    """Output of a process to a descriptor, of which what cannot be written is lost, so that nothing stops for a log."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._num_lost = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write bytes, or count those that cannot be written; return their number either way."""
        content = bytes(data)
        if self._num_lost:
            content = f"({self._num_lost} bytes of output are lost: they could not be written)\n".encode() + content
        try:
            done = 0
            while done < len(content):
                done += os.write(self._descriptor, content[done:])
            self._num_lost = 0
        except OSError as error:
            if find_storage_error(error, ".") is None:
                raise
            self._num_lost += len(bytes(data))
        return len(bytes(data))

"""Watcher process that ends the workers when their launcher is killed."""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType

# `read` fails when the last writer of the pipe is gone: the launcher, however it ended.
_SCRIPT = """
groups=
while read -r group; do groups="$groups $group"; done
for group in $groups; do kill -s KILL -- "-$group"; done
"""


class Watcher:
    """Kills process groups after the death of the process that created the watcher, even by SIGKILL.

    The workers need not cooperate: one that hangs, or has not run its first line yet, is ended too, and so
    are the processes that it started. Leaving the `with` block ends the watcher, and no group.
    """

    def __enter__(self) -> Watcher:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # what ends the launcher's group or terminal must not end its watcher
        )
        return self

    def watch(self, process_group: int) -> None:
        """Add a process group."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody ended the watcher: the run goes on without
            self._process.stdin.write(f"{process_group}\n".encode())
            self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Killed before its pipe closes, so that it never sees the end of the pipe.
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

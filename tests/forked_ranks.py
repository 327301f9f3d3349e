"""Ranks of a command under test, forked from a process that has imported everything, in place of new interpreters."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import pickle
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO, Any, NoReturn

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_RANKS = ("pipekit.launch.rank", "pipekit.launch.collective_rank", "pipekit.launch.script")


class ForkedRank:
    """A rank's process, as far as `pipekit.launch.local` asks a `subprocess.Popen` for it.

    Args:
        pid: a child of this process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end_s:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return code


class RankForker:
    """Forks ranks for this process, from a child that is forked now, while there is one thread."""

    def __init__(self) -> None:
        # Orphans of the server's become this process's children, so that it learns how they ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        launcher_pid = os.getpid()
        self._socket, server = socket.socketpair()
        if os.fork() == 0:
            self._socket.close()
            _serve(server, launcher_pid)
        server.close()

    def replace_popen_of(self, module: Any) -> None:
        """Let a module start ranks by forks, and anything else as before."""
        known = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
        module.subprocess = SimpleNamespace(Popen=self._popen, **known)

    def _popen(self, command: Sequence[str], **options: Any) -> Any:
        if command[1] != "-m" or command[2] not in _RANKS:
            return subprocess.Popen(command, **options)
        assert options["start_new_session"]
        return self._fork(command[2:], options["env"], options["stdout"], options["stderr"])

    def _fork(
        self, arguments: Sequence[str], environ: Mapping[str, str], stdout: IO[bytes] | None, stderr: IO[bytes]
    ) -> ForkedRank:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        request = pickle.dumps((list(arguments), dict(environ)))
        files = [1 if stdout is None else stdout.fileno(), stderr.fileno()]
        socket.send_fds(self._socket, [len(request).to_bytes(8, "big")], files)
        self._socket.sendall(request)
        return ForkedRank(int.from_bytes(self._socket.recv(8, socket.MSG_WAITALL), "big"))


def _serve(server: socket.socket, launcher_pid: int) -> NoReturn:
    while True:
        size, files, _, _ = socket.recv_fds(server, 8, 2)
        if not size:
            os._exit(0)
        arguments, environ = pickle.loads(server.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                for file in (server.detach(), read, write):
                    os.close(file)
                _be_rank(arguments, environ, files, launcher_pid)
            os.write(write, pid.to_bytes(8, "big"))
            os._exit(0)
        # Told when the rank is an orphan, and so the launcher's child.
        os.waitpid(between, 0)
        server.sendall(os.read(read, 8))
        for file in (*files, read, write):
            os.close(file)


def _be_rank(arguments: list[str], environ: dict[str, str], files: list[int], launcher_pid: int) -> NoReturn:
    while os.getppid() != launcher_pid:
        time.sleep(0.001)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environ)
    faulthandler.enable()
    sys.argv = arguments
    sys.modules.pop(arguments[0], None)  # which the launcher may have imported
    code = 1
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

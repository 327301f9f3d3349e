"""A server that has imported torch, DeepSpeed and pipekit once, and forks processes in which tests run.

The imports take seconds in each process, a fork some milliseconds. It has one thread, so that a fork of it is whole.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from forked_ranks import RankForker

# A start looks at all other processes, too, and how a process has ended is told to the first alone who looks.
_looking_at_processes = threading.Lock()


def fork(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start a process that calls a function at the top level of an importable module."""
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # The server gets its environment and its path when it starts, and hands them to all processes.
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with _looking_at_processes:
        with mock.patch.dict(os.environ, environ):
            multiprocessing.forkserver.ensure_running()
        process = context.Process(target=function, args=args, daemon=True)
        process.start()
    return process


def stop() -> None:
    """End the server, if it runs."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run_pipekit(
    arguments: Sequence[str],
    *,
    cwd: Path,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 180.0,
    fork_ranks: bool = True,
    said: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the `pipekit` command in a fork, which is there at once.

    Args:
        arguments: what follows `pipekit`.
        cwd: the folder to run in.
        environ: variables to set on top of this process's own.
        timeout_s: seconds after which the command is killed.
        fork_ranks: whether the ranks that it starts are forks too, or new interpreters, as for a user.
        said: what it reads from stdin.

    Raises:
        subprocess.TimeoutExpired: after that.
    """
    return _run(["pipekit", *arguments], cwd, environ, timeout_s, fork_ranks, said)


def run_joining(
    command: Sequence[str], *, cwd: Path, world_size: int, port: int, timeout_s: float = 180.0
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in each of the processes that another launcher would start, and return their ends."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(world_size):
            output = Path(folder) / str(rank)
            output.mkdir()
            environ = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            started.append(StartedCommand(command, cwd=cwd, output=output, environ=environ))
        return [each.wait(timeout_s) for each in started]


def run_script(
    path: Path, *, cwd: Path, timeout_s: float = 180.0, fork_ranks: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a fork, alone, as `python path` does."""
    return _run([str(path)], cwd, None, timeout_s, fork_ranks)


class StartedCommand:
    """A `pipekit` command that runs in a fork.

    Args:
        command: program and arguments.
        cwd: the folder to run in.
        output: an existing folder for what it prints.
        environ: variables to set on top of this process's own.
        fork_ranks: as for `run_pipekit`.
        said: as for `run_pipekit`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        output: Path,
        environ: Mapping[str, str] | None = None,
        fork_ranks: bool = True,
        said: str = "",
    ) -> None:
        self._command, self._stdout, self._stderr = command, output / "stdout", output / "stderr"
        stdin = output / "stdin"
        for file, text in ((stdin, said), (self._stdout, ""), (self._stderr, "")):
            file.write_text(text)
        # Commands compile nothing, and do not wait for what ranks of a test beside them compile for a minute or two.
        own = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": os.path.join(tempfile.gettempdir(), "extensions")}
        with _looking_at_processes:  # while no thread has other variables in place
            variables = {**os.environ, **own, **(environ or {})}
        files = tuple(map(str, (stdin, self._stdout, self._stderr)))
        self._process = fork(_main, command, str(cwd), variables, *files, fork_ranks)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        with _looking_at_processes:
            return self._process.exitcode is not None

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end. A TimeoutExpired after so many seconds, when the command is killed."""
        wait([self._process.sentinel], timeout_s)
        if not self.has_ended:
            self._process.kill()
            wait([self._process.sentinel])
            assert self.has_ended
            raise subprocess.TimeoutExpired(self._command, timeout_s, self.stdout, self.stderr)
        done = subprocess.CompletedProcess(self._command, self._process.exitcode, self.stdout, self.stderr)
        self._process.close()
        return done


def _run(
    command: Sequence[str],
    cwd: Path,
    environ: Mapping[str, str] | None,
    timeout_s: float,
    fork_ranks: bool,
    said: str = "",
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        started = StartedCommand(command, cwd=cwd, output=output, environ=environ, fork_ranks=fork_ranks, said=said)
        return started.wait(timeout_s)


def _main(
    command: Sequence[str],
    cwd: str,
    environ: dict[str, str],
    stdin: str,
    stdout: str,
    stderr: str,
    fork_ranks: bool,
) -> None:
    # A shell that runs the tests in the background has the signals of the terminal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    tempfile.tempdir = None
    for number, (path, mode) in enumerate(((stdin, "rb"), (stdout, "wb"), (stderr, "wb"))):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = list(command)
    if fork_ranks:
        from pipekit.launch import local

        RankForker().replace_popen_of(local)

    if command[0].endswith(".py"):
        sys.path[0:0] = [os.path.dirname(command[0])]
        runpy.run_path(command[0], run_name="__main__")
        return
    sys.path[0:0] = [cwd]
    from pipekit.cli import main

    main()

"""Processes that are started once and become the ranks of one job after another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

from pipekit.launch.ports import choose_port

Say = Callable[[str], None]
"""Tells what a rank does next; the time limit starts anew with it."""

Result = TypeVar("Result")

WAIT_LIMIT_S = 120.0
"""No rank waits longer for another."""

LIMIT_S = 180.0
"""No rank may take longer over one thing that it says it does; long enough for a rank that waits in vain to say so."""


WAITING = "wait for"
"""Beginning of what a rank says where others are at work."""


class RankError(RuntimeError):
    """A rank failed, ended or took too long; the message says which, and over what."""


@dataclass
class _Rank:
    """A process, the pipe to it, and what it said last."""

    process: BaseProcess
    connection: Connection
    log: Path
    doing: str = ""
    since_s: float = field(default_factory=time.monotonic)

    def note(self, doing: str) -> None:
        self.doing, self.since_s = doing, time.monotonic()

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() - self.since_s > LIMIT_S


class RankPool:
    """A pool of processes, with one thread each; leaving it as a context ends them all.

    Args:
        log_dir: what the processes print goes into one file each here.
        show: called with what rank 0 does next.
    """

    def __init__(self, log_dir: Path, *, show: Say) -> None:
        self._log_dir = log_dir
        self._show = show
        self._context = multiprocessing.get_context("spawn")
        self._ranks: list[_Rank] = []
        self._manager: SyncManager | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
        if self._manager is not None:
            self._manager.shutdown()

    def run(self, world_size: int, job: Callable[..., Result], *args: Any) -> list[Result]:
        """Run `job(say, *args)` on `world_size` ranks that have joined each other, and return what each returned.

        Args:
            world_size: number of ranks.
            job: a function at the top level of a module; calls `say` before each thing that it does.
            *args: passed on to it.

        Raises:
            RankError: if a rank fails, ends, or does not finish in time what it said it does.
        """
        return self.run_teams(world_size, [(job, *args)])[0]

    def run_teams(self, world_size: int, jobs: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
        """Run a job in each of several teams side by side, and return what each rank of each team returned.

        Args:
            world_size: number of ranks of a team; they have joined each other, and no other team's.
            jobs: for each team what `run` takes: a function and its arguments.

        Raises:
            RankError: as `run`.
        """
        size = world_size * len(jobs)
        while len(self._ranks) < size:
            self._start()
        team = self._ranks[:size]
        ports = [choose_port(None) for _ in jobs]
        for index, rank in enumerate(team):
            number, own = divmod(index, world_size)
            job, *args = jobs[number]
            rank.note("start of the process")
            rank.connection.send((own, world_size, ports[number], job, tuple(args)))
        results: dict[int, Any] = {}
        while len(results) < size:
            waiting = {rank.connection: index for index, rank in enumerate(team) if index not in results}
            for connection in wait(list(waiting), timeout=1.0):
                assert isinstance(connection, Connection)
                self._receive(waiting[connection], results)
            late = [
                f"process {index}: {rank.doing}"
                for index, rank in enumerate(team)
                if index not in results and rank.is_overdue
            ]
            if late:
                raise RankError("\n".join([f"not finished within {LIMIT_S:g} s:", *late]))
        return [[results[first + own] for own in range(world_size)] for first in range(0, size, world_size)]

    def barrier(self, parties: int) -> Barrier:
        """Return a barrier for so many ranks of any teams, to be passed to their jobs."""
        if self._manager is None:
            self._manager = self._context.Manager()
        return self._manager.Barrier(parties, timeout=LIMIT_S)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        log = self._log_dir / f"process_{len(self._ranks)}.log"
        process = self._context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        process.start()
        theirs.close()
        self._ranks.append(_Rank(process, ours, log))

    def _receive(self, index: int, results: dict[int, Any]) -> None:
        rank = self._ranks[index]
        try:
            kind, value = rank.connection.recv()
        except EOFError:
            last_words = rank.log.read_text(errors="replace")[-2000:] if rank.log.exists() else ""
            raise RankError(f"process {index} ended without a word, over: {rank.doing}\n{last_words}") from None
        if kind == "error":
            raise RankError(f"process {index} failed, over: {rank.doing}\n{value}")
        if kind == "result":
            results[index] = value
            return
        rank.note(value)
        if not value.startswith(WAITING):
            self._show(value)


def _serve(connection: Connection, log: str) -> None:
    """Do jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent hears it too, and ends this process.
    _redirect_output(log)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

    def say(doing: str) -> None:
        connection.send(("doing", doing))

    while True:
        try:
            rank, world_size, port, job, args = connection.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            say(f"join of {world_size} processes")
            connection.send(("result", _run_joined(rank, job, say, args)))
        except BrokenPipeError:  # The parent is gone.
            return
        except BaseException:
            connection.send(("error", traceback.format_exc()))
            return


def _redirect_output(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())


def _run_joined(rank: int, job: Callable[..., Result], say: Say, args: tuple[Any, ...]) -> Result:
    import torch

    from pipekit.distributed.processes import join_processes, leave_processes

    torch.set_num_threads(1)
    join_processes(device="cpu", timeout_s=WAIT_LIMIT_S, local_rank=rank)
    result = job(say, *args)
    torch.distributed.barrier()
    leave_processes()
    return result

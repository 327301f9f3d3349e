"""Processes that talk over gloo, each forked for one job.

As every job has processes of its own, it leaves nothing to the next: no thread, no open file, no process group, no
replaced function.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import fork_server

TIMEOUT_S = 300.0
COMPILING_TIMEOUT_S = 550.0  # of jobs in which stages wait for each other's compiler
MAX_THREADS = 150


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


def free_port() -> int:
    """A free port, none of those that the system gives to connections: none takes it before rank 0 listens there."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class GlooWorkers:
    """Starts the ranks of one job after another."""

    _device, _max_threads = "cpu", MAX_THREADS

    def run(
        self,
        world_size: int,
        job: Callable[..., Any],
        *args: Any,
        nccl: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Any]:
        """Run `job(rank, *args)` on `world_size` ranks and return what each returned.

        Args:
            world_size: number of ranks.
            job: a function at the top level of an importable module.
            args: its arguments after the rank.
            nccl: whether process groups behave as NCCL's do (`nccl_double`).
            timeout_s: limit of the job; ranks wait for each other no longer than three fifths of it.
        """
        port = free_port()
        # Not multiprocessing's own pickling, which would share the memory of tensors with a process that is to end.
        task = pickle.dumps((job, args))
        team = []
        try:
            for rank in range(world_size):
                ours, theirs = Pipe()
                arguments = (theirs, rank, world_size, port, task, nccl)
                team.append((self._start(*arguments, self._device, self._max_threads, 0.6 * timeout_s), ours))
                theirs.close()
            return _collect([connection for _, connection in team], timeout_s)
        finally:
            for process, connection in team:
                connection.close()
                process.join(10.0)
                process.kill()
                process.join()
                process.close()

    def _start(self, *arguments: Any) -> BaseProcess:
        """Start a process that calls `serve_rank` with the arguments."""
        return fork_server.fork(serve_rank, *arguments)


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    """Receive what each rank has to say, until all have said it or one has failed and the others had time to."""
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait(list(waiting), timeout=30.0 if errors else timeout_s)
        if not ready:
            errors.update({rank: f"rank {rank} did not answer in time" for rank in waiting.values()})
            break
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                ok, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, f"rank {rank} ended without a word"
            (results if ok else errors)[rank] = value
    if errors:
        raise RankError("\n".join(errors[rank] for rank in sorted(errors)))
    return [results[rank] for rank in range(len(connections))]


def serve_rank(
    connection: Connection,
    rank: int,
    world_size: int,
    port: int,
    task: bytes,
    nccl: bool,
    device: Literal["cpu", "cuda"] = "cpu",
    max_threads: int = MAX_THREADS,
    waits_s: float = 180.0,
) -> None:
    """Do a pickled job as one rank, and send what it returned, or the traceback of its failure."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import torch

        import nccl_double
        from pipekit.distributed.processes import join_processes, leave_processes

        with nccl_double.installed() if nccl else contextlib.nullcontext():
            join_processes(device=device, timeout_s=waits_s, local_rank=rank)
            job, args = pickle.loads(task)
            result = job(rank, *args)
            torch.distributed.barrier()
        num_threads = len(os.listdir("/proc/self/task"))
        assert num_threads <= max_threads, f"rank {rank} has {num_threads} threads"
        leave_processes()
        connection.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))

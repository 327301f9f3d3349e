"""Processes that talk over gloo, started once and used by many tests: importing DeepSpeed takes seconds in each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 300.0


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


class GlooWorkers:
    """A pool of processes that become the ranks of one job after another."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `job(rank, *args)` on `world_size` ranks and return what each returned.

        `job` is a function at the top level of an importable module.
        """
        while len(self._workers) < world_size:
            self._workers.append(self._start())
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        team = self._workers[:world_size]
        for rank, (_, connection) in enumerate(team):
            connection.send((rank, world_size, port, job, args))
        results, errors = [], []
        for rank, (_, connection) in enumerate(team):
            if not connection.poll(TIMEOUT_S):
                errors.append(f"rank {rank} did not answer within {TIMEOUT_S:g} s")
                break
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = False, f"rank {rank} ended without a word"
            (results if ok else errors).append(value)
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return results

    def _start(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def close(self) -> None:
        """End all processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(connection: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch

    torch.set_num_threads(1)
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
            from pipekit.distributed.processes import join_processes, leave_processes

            join_processes(device="cpu", timeout_s=180.0, local_rank=rank)
            result = job(rank, *args)
            torch.distributed.barrier()
            leave_processes()
            connection.send((True, result))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
            return

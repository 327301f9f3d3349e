"""The process that `Workers` starts, and the workers that it forks: `python -m pipekit.data.worker_process FDS`."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

import torch

from pipekit.data.collate import Collate, MapDataset, read_micro_batch
from pipekit.data.workers import encode, failure_of, receive, send
from pipekit.errors import DataError

_POLL_S = 0.5
# The rank decides when a run ends, and closes the sockets then.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def main(descriptors: Sequence[int]) -> None:
    """Fork the workers, and wait until the rank has ended or closes its end of the pipe `descriptors[0]`.

    The other descriptors are sockets: one on which the dataset comes, and the end of a worker is told, and one for
    each worker.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    lifeline, control, *sockets = (descriptors[0], *(socket.socket(fileno=each) for each in descriptors[1:]))
    torch.set_num_threads(1)
    path, message = receive(control)
    sys.path[:] = path
    try:
        dataset, collate = pickle.loads(message)
    except Exception as error:  # whatever the dataset raises
        failure = DataError(
            f"data.workers: another process cannot read the dataset ({type(error).__name__}: {error}); define its "
            "class in a module that can be imported, or set data.workers=0"
        )
        send(control, encode(failure))
        return
    workers: dict[int, int] = {}
    for index, own in enumerate(sockets):
        pid = os.fork()
        if pid == 0:
            for other in (control, *sockets):
                if other is not own:
                    other.close()
            _work(dataset, collate, own)
        workers[pid] = index
    for each in sockets:
        each.close()
    send(control, encode(None))
    while workers and not select.select([lifeline], [], [], _POLL_S)[0]:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in workers:
            with contextlib.suppress(OSError):
                send(control, encode({workers.pop(pid): os.waitstatus_to_exitcode(status)}))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def _work(dataset: MapDataset, collate: Collate | None, rank: socket.socket) -> None:
    """Read micro-batches until the rank closes its end; never returns."""
    code = 1
    try:
        while True:
            indices = receive(rank)
            try:
                batch = encode(read_micro_batch(dataset, indices, collate))
            except Exception as error:  # whatever the dataset raises, or what cannot be sent
                batch = encode(failure_of(error, traceback.format_exc()))
            send(rank, batch)
    except (EOFError, OSError):
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]])

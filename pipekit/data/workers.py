"""Worker processes that read and collate micro-batches ahead of the rank that trains on them.

A rank starts one process, which imports the dataset, and forks the workers from it before any thread runs there. Each
worker has a socket to the rank: sample indices come in, a micro-batch goes out. None outlives the rank, however that
ends: the sockets are closed then, and the pipe on which the first process waits.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipekit.errors import DataError

if TYPE_CHECKING:
    from pipekit.data.batch_loader import BatchLoader

# Importing torch may take long where many ranks do it from one disk.
_START_S = 300.0
# A worker that has ended is reported within this time.
_REPORT_S = 20.0


class Workers:
    """Reads the micro-batches of coming steps in other processes, in place of `BatchLoader.iterate_step`.

    Whatever they have read ahead, a step gets the micro-batches of the position that it names.

    They start while the rank goes on, and are waited for where the first step is read.

    Args:
        loader: gives the samples of each micro-batch. Its dataset is sent to the workers.
        num_workers: number of processes.
        timeout_s: the longest wait for a micro-batch.

    Raises:
        DataError: if the dataset cannot be sent.
    """

    def __init__(self, loader: BatchLoader, num_workers: int, *, timeout_s: float) -> None:
        self._loader, self._timeout_s = loader, timeout_s
        # Of micro-batches that were asked for and have not come: worker, position of the step, place in it.
        self._asked: deque[tuple[int, int, int]] = deque()
        self._order = loader.order
        self._next_position, self._next_worker = 0, 0
        self._exit_codes: dict[int, int] = {}
        self._lock = Lock()
        try:
            message = pickle.dumps((loader.dataset, loader.collate))
        except Exception as error:  # whatever the dataset raises
            raise DataError(
                f"data.workers={num_workers}: {type(loader.dataset).__name__} cannot be sent to other processes "
                f"({error}); define its class at the top of a module, or set data.workers=0"
            ) from error
        pairs = [socket.socketpair() for _ in range(num_workers + 1)]
        lifeline, self._lifeline = os.pipe()
        (self._control, *self._sockets), far = [near for near, _ in pairs], [far for _, far in pairs]
        descriptors = [lifeline, *(each.fileno() for each in far)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipekit.data.worker_process", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
        )
        os.close(lifeline)
        for each in far:
            each.close()
        for each in self._sockets:
            each.settimeout(timeout_s)
        self._control.settimeout(max(_START_S, timeout_s))
        self._is_started = False
        with contextlib.suppress(OSError):  # told of where they are waited for
            send(self._control, encode((sys.path, message)))

    def _wait_for_start(self) -> None:
        try:
            failure = receive(self._control)
        except (OSError, EOFError) as error:
            raise DataError(
                f"data.workers={len(self._sockets)}: the data workers have not started ({error or 'they have ended'}); "
                "see the log of the rank, or set data.workers=0"
            ) from error
        if failure is not None:
            raise failure
        self._control.settimeout(_REPORT_S)
        self._is_started = True

    def iterate_step(self, consumed_samples: int) -> Iterator[Any]:
        """The micro-batches of the step that starts after `consumed_samples` samples, in order.

        Raises:
            DataError: if a worker has ended, or does not answer in time. What the dataset raises arises here, too.
        """
        for place in range(self._loader.num_micro_batches(consumed_samples)):
            with self._lock:
                if not self._is_started:
                    self._wait_for_start()
                batch = self._take(consumed_samples, place)
            if isinstance(batch, _Failure):
                raise batch.error from batch.cause
            yield batch

    def _take(self, position: int, place: int) -> Any:
        wanted = (position, place)
        if self._order is not self._loader.order or wanted not in (asked[1:] for asked in self._asked):
            self._order = self._loader.order
            while self._asked:
                self._receive()
            self._ask(position, skip=place)
        # While the rank trains on one step, and has the next, the workers read what follows.
        while len(self._asked) <= self._loader.num_micro_batches(position) + 2 * len(self._sockets):
            try:
                self._ask(self._next_position)
            except DataError:  # arises again where that step is read
                break
        while self._asked[0][1:] != wanted:
            self._receive()
        return self._receive()

    def _ask(self, position: int, skip: int = 0) -> None:
        """Ask for the micro-batches of a step, but for the first `skip`, each from the worker whose turn it is."""
        for place, indices in enumerate(self._loader.step_indices(position)):
            if place < skip:
                continue
            worker = self._next_worker
            try:
                send(self._sockets[worker], encode(indices))
            except OSError as error:
                raise self._ended(worker) from error
            self._asked.append((worker, position, place))
            self._next_worker = (worker + 1) % len(self._sockets)
        self._next_position = self._loader.end_of_step(position)

    def _receive(self) -> Any:
        worker, position, place = self._asked.popleft()
        try:
            return receive(self._sockets[worker])
        except TimeoutError as error:
            raise DataError(
                f"waited {self._timeout_s:g} s for a data worker to read micro-batch {place} of the step after "
                f"{position:,} samples; look at what the dataset reads from, or raise run.timeout_s"
            ) from error
        except (OSError, EOFError) as error:
            raise self._ended(worker) from error

    def _ended(self, worker: int) -> DataError:
        try:
            while worker not in self._exit_codes:
                self._exit_codes.update(receive(self._control))
            code = self._exit_codes[worker]
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except (OSError, EOFError):
            how = "was killed"
        return DataError(
            f"data worker {worker} of {len(self._sockets)} {how} while it read samples; if memory was short, lower "
            "data.workers, or set data.workers=0 to read in the rank itself"
        )

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        for each in (self._control, *self._sockets):
            each.close()
        try:
            self._process.wait(_REPORT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Failure:
    """An error in a worker, with its traceback as text."""

    def __init__(self, error: Exception, text: str) -> None:
        self.error, self.cause = error, RuntimeError(f"in a data worker:\n{text}")


def failure_of(error: Exception, text: str) -> _Failure:
    """Return the stand-in of an error, in place of a micro-batch, also for one that cannot be sent itself."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class raises
        error = DataError(f"{type(error).__name__}: {error}")
    return _Failure(error, text)


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes, which are sent without a copy."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided:
            return NotImplemented
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return _rebuild, (pickle.PickleBuffer(data.data), value.dtype, tuple(value.shape))


def _rebuild(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    whole = torch.frombuffer(data, dtype=dtype) if 0 not in shape else torch.empty(0, dtype=dtype)
    return whole.reshape(shape)


def encode(value: Any) -> list[memoryview]:
    """Return a value in parts that `send` takes: its pickle, and the bytes of each of its tensors."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    return [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]


def send(connection: socket.socket, parts: Sequence[memoryview]) -> None:
    """Send the parts of a value."""
    connection.sendall(struct.pack(f"<Q{len(parts)}Q", len(parts), *(len(part) for part in parts)))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> Any:
    """Receive what `send` has sent. An EOFError if the other end is closed."""
    (num_parts,) = struct.unpack("<Q", _read(connection, 8))
    sizes = struct.unpack(f"<{num_parts}Q", _read(connection, 8 * num_parts))
    message, *buffers = [_read(connection, size) for size in sizes]
    return pickle.loads(message, buffers=buffers)


def _read(connection: socket.socket, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise EOFError
        view = view[received:]
    return data
